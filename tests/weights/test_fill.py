"""Arrays put into modules, or the reason why they do not fit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pockjax.weights import WeightsError, fill

_NAMES = {"kernel": "fc.weight", "bias": "fc.bias"}


def _build():
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0))


def _tensors():
    return {"fc.weight": np.arange(6, dtype=np.float64).reshape(2, 3), "fc.bias": np.ones(2)}


def _fill(tensors, **kwargs):
    return fill(_build, _NAMES, tensors, file=Path("w.pth"), **kwargs)


def test_layout_and_dtype_are_the_modules():
    model = _fill(_tensors())
    assert model.kernel.dtype == np.float32
    np.testing.assert_array_equal(model.kernel[...], _tensors()["fc.weight"].T)
    np.testing.assert_array_equal(model(jnp.ones((1, 3))), [[4, 13]])


def test_fresh_arrays_stay_shapes():
    model = _fill({"fc.weight": np.zeros((2, 3))}, fresh=("bias",))
    assert model.bias is not None
    assert isinstance(model.bias.get_value(), jax.ShapeDtypeStruct)
    assert isinstance(model.kernel.get_value(), jax.Array)


def test_missing_array_is_named():
    with pytest.raises(WeightsError, match=r"w\.pth has no array 'fc\.bias' for bias"):
        _fill({"fc.weight": np.zeros((2, 3))})


def test_another_shape_names_path_and_both_shapes():
    message = r"kernel has shape \(3, 2\) in the model, and shape \(3, 5\) in the file"
    with pytest.raises(WeightsError, match=message):
        _fill(_tensors() | {"fc.weight": np.zeros((5, 3))})
