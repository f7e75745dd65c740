"""Models with random weights from NumPy: JAX compiles its generator anew for each shape."""

from collections.abc import Callable
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx


def made[Module: nnx.Module](build: Callable[[], Module], *, dtype: Any = jnp.float32) -> Module:
    """The module, with kernels of a size that keeps activations', and no trivial batch norms."""
    graph, state = nnx.split(nnx.eval_shape(build))
    generator = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(state):
        shape = variable.shape
        if path[-1] == "kernel":
            value = generator.normal(0, (2 / prod(shape[:-1])) ** 0.5, shape)
        elif path[-1] in ("scale", "var"):
            value = generator.uniform(0.5, 2, shape)
        else:
            value = generator.normal(0, 0.3, shape)
        variable.set_value(jnp.asarray(value, dtype))
    return nnx.merge(graph, state)
