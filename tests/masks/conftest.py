"""Parameters as every library that we serve holds them."""

from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx


class Affine(NamedTuple):
    kernel: Any
    bias: Any


def linen_params() -> Any:
    model = nn.Sequential([nn.Dense(6), nn.Dense(3)])
    return model.init(jax.random.key(0), jnp.ones((1, 4)))


def nnx_params() -> Any:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.List([nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)])
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

    return nnx.state(Model(nnx.Rngs(0)))


def equinox_params() -> Any:
    return eqx.nn.MLP(4, 3, 6, depth=1, key=jax.random.key(0))


def plain_params() -> Any:
    return {
        "layers": [Affine(jnp.ones((4, 6)), jnp.zeros(6)), Affine(jnp.ones((6, 3)), jnp.zeros(3))],
        "steps": (jnp.array(3), 0.5, None),
    }


KINDS = {
    "linen": linen_params,
    "nnx": nnx_params,
    "equinox": equinox_params,
    "plain": plain_params,
}


@pytest.fixture(params=KINDS)
def params(request: pytest.FixtureRequest) -> Any:
    """Two dense layers, and leaves that cannot be trained."""
    return KINDS[request.param]()
