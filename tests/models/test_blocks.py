"""Blocks of the convolutional networks, and folding of their batch norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pockjax import models
from pockjax.models._blocks import ConvNorm, FrozenBatchNorm
from pockjax.models._mobile import Block, Mobile, MobileNet, round_channels
from tests.models.made import made


def _paths(model, kind=nnx.Variable):
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, kind))}


def test_frozen_batch_norm_is_what_it_says():
    norm = made(lambda: FrozenBatchNorm(5, epsilon=0.1))
    x = jnp.asarray(np.random.default_rng(1).normal(3, 2, (4, 5)), jnp.float32)
    expected = (x - norm.mean[...]) / np.sqrt(norm.var[...] + 0.1) * norm.scale[...] + norm.bias[
        ...
    ]
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-5)


def test_statistics_are_no_parameters():
    model = ConvNorm(3, 4, 3, rngs=nnx.Rngs(0))
    assert _paths(model, nnx.Param) == {"conv/kernel", "norm/scale", "norm/bias"}
    assert _paths(model, nnx.BatchStat) == {"norm/mean", "norm/var"}


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_padding(kernel, stride, size):
    """Where the strides begin: with one colour and a kernel of ones, a sum over a window."""
    image = np.random.default_rng(2).normal(size=(size, size)).astype(np.float32)
    out = -(-size // stride)
    for padding in ("same", "centered"):
        model = ConvNorm(
            1, 1, kernel, stride=stride, padding=padding, norm_epsilon=None, rngs=nnx.Rngs(0)
        )
        model.conv.kernel.set_value(jnp.ones((kernel, kernel, 1, 1)))
        total = max((out - 1) * stride + kernel - size, 0)
        before = total // 2 if padding == "same" else kernel // 2
        padded = np.pad(image, (before, kernel))
        expected = [
            [padded[i : i + kernel, j : j + kernel].sum() for j in range(0, out * stride, stride)]
            for i in range(0, out * stride, stride)
        ]
        np.testing.assert_allclose(
            model(jnp.asarray(image)[None, :, :, None])[0, :, :, 0], expected, atol=1e-5
        )


_SMALL = {
    "mobile": lambda: MobileNet(
        Mobile(8, (Block(8, 3, 1, 8, expand=False), Block(16, 5, 2, 12)), 16, 3, padding="same"),
        rngs=nnx.Rngs(0),
    ),
    "basic": lambda: models.ResNet(
        models.ResNetConfig((1, 1), 4, "basic", "cifar", "pad", 3, 8), rngs=nnx.Rngs(0)
    ),
    "bottleneck": lambda: models.ResNet(
        models.ResNetConfig((1, 1), 4, "bottleneck", "imagenet", "project", 3, 8), rngs=nnx.Rngs(0)
    ),
}


@pytest.mark.parametrize("name", _SMALL)
def test_folded_model_is_the_same_function(name):
    """In float64, so that nothing but rounding can hide."""
    with jax.enable_x64(True):
        model = made(_SMALL[name], dtype=jnp.float64)
        folded = models.fold_batch_norm(model)
        paths = _paths(model)
        assert not any("norm" in path for path in _paths(folded))
        assert any("norm" in path for path in paths), "the model itself is left as it is"
        kernels = {path for path in paths if path.endswith("conv/kernel")}
        assert kernels | {path.replace("kernel", "bias") for path in kernels} == {
            path for path in _paths(folded) if "/conv/" in path
        }
        x = np.random.default_rng(3).normal(size=(2, 9, 8, 3))
        expected, found = nnx.jit(lambda a, b, x: (a(x), b(x)))(model, folded, x)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_folding_twice_changes_nothing():
    once = models.fold_batch_norm(ConvNorm(3, 4, 3, rngs=nnx.Rngs(0)))
    twice = models.fold_batch_norm(once)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(once), nnx.state(twice))


@pytest.mark.parametrize(
    ("channels", "expected"), [(3, 8), (11.2, 16), (8.4, 8), (12, 16), (33.6, 32), (112, 112)]
)
def test_round_channels(channels, expected):
    assert round_channels(channels) == expected
