"""MCUNet's files: the quantised graph against integer arithmetic in numpy; the float network."""

import pickle
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pockjax as pj
from pockjax import models
from pockjax.models import mcunet
from pockjax.models.quantized import Grid
from pockjax.weights import WeightsError, read_torch
from tests.weights.torch_files import write_zip

SCHEMES = Path(__file__).parents[2] / "configs" / "schemes"
CONFIGS = {
    "mcunet-5fps": mcunet.MCUNET_5FPS,
    "proxyless-w0.3": mcunet.PROXYLESS_W03,
    "mbv2-w0.35": mcunet.MBV2_W035,
}


@nnx.jit
def _logits(model, images):
    return model(images)


@pytest.fixture(scope="module", params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "weights" / "mcunet"


@pytest.fixture(scope="module")
def file(name, folder):
    return folder / f"{name}.pkl"


def _preprocess():
    preprocess = models.entry("mcunet-5fps").preprocess
    assert preprocess is not None
    return preprocess


@pytest.fixture(scope="module")
def pixels(shared_data):
    """All clothing photos of the test split."""
    preprocess = _preprocess()
    files = sorted((shared_data / "images" / "clothing" / "test").glob("*/*.jpg"))
    return np.stack([preprocess.pixels(file) for file in files])


def _convolve(x, kernel, stride, depthwise):
    """Sums of products of integers, in float64, which holds them exactly."""
    outputs, _, size, _ = kernel.shape
    border = size // 2
    x = np.pad(x, ((0, 0), (border, border), (border, border), (0, 0))).astype(np.float64)
    height, width = x.shape[1] - 2 * border, x.shape[2] - 2 * border
    total = np.zeros((len(x), -(-height // stride), -(-width // stride), outputs))
    for i in range(size):
        for j in range(size):
            window = x[:, i : i + height : stride, j : j + width : stride]
            tap = kernel[:, :, i, j].astype(np.float64)
            total += window * tap[:, 0] if depthwise else window @ tap.T
    return total.astype(np.int64)


def _round(x):
    return np.rint(x).astype(np.int64)


def _layer(q, given, real):
    params = given["params"]
    depthwise = given.get("depthwise", False)
    sums = _convolve(q - params["x_zero"], params["weight"], given.get("stride", 1), depthwise)
    sums += params["bias"].astype(np.int64)
    scale = params["w_scales"] * real(params["x_scale"] / params["y_scale"])
    return np.clip(_round(sums.astype(real) * scale) + params["y_zero"], -128, 127)


def _integer_logits(described, pixels, real: type[np.floating] = np.float32):
    """The network as its file describes it, in integers from the pixels on.

    `real` is the kind of numbers between a sum and its rounding: float32 is what devices have.
    """
    q = _layer(pixels.astype(np.int64) - 128, described["first_conv"], real)
    for block in described["blocks"]:
        before = q
        for layer in ("pointwise1", "depthwise", "pointwise2"):
            if block[layer] is not None:
                q = _layer(q, block[layer], real)
        if block["residual"] is not None:
            one, two = block["pointwise2"]["params"], block["residual"]["params"]
            sums = (q - one["y_zero"]).astype(real) * real(one["y_scale"])
            sums += (before - two["x_zero"]).astype(real) * real(two["x_scale"])
            q = np.clip(_round(sums / real(two["y_scale"])) + two["y_zero"], -128, 127)
    mean = _round(q.mean(axis=(1, 2), keepdims=True))
    params = described["classifier"]["params"]
    q = _layer(mean, described["classifier"], real)[:, 0, 0]
    return (q - params["y_zero"]) * params["y_scale"]


def _normalised(pixels):
    return _preprocess().normalise(pixels)


def _agreement(one, other):
    return np.mean(np.argmax(one, axis=1) == np.argmax(other, axis=1))


def test_quantised_graph_is_integer_arithmetic(name, file, pixels):
    some = pixels[::12]
    expected = _integer_logits(read_torch(file), some)
    found = _logits(models.load(f"{name}-int8", weights=file), _normalised(some))
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # less than a thousandth of a step


def test_float_network_is_near(name, file, pixels):
    some = pixels[::12]
    quantised = np.asarray(_logits(models.load(f"{name}-int8", weights=file), _normalised(some)))
    floats = np.asarray(_logits(models.load(name, weights=file), _normalised(some)))
    best = np.argsort(-quantised, axis=1)[:, :5]
    assert np.mean((best == floats.argmax(axis=1)[:, None]).any(axis=1)) > 0.95
    assert _agreement(floats, quantised) > 0.8
    assert np.corrcoef(floats.ravel(), quantised.ravel())[0, 1] > 0.98


@pytest.mark.slow
def test_agreement_on_all_photos(name, file, pixels):
    parts = np.array_split(pixels, 6)
    described = read_torch(file)
    integers, exact = (
        np.concatenate([_integer_logits(described, part, real) for part in parts])
        for real in (np.float32, np.float64)
    )
    found = {}
    for kind in (name, f"{name}-int8"):
        model = models.load(kind, weights=file)
        found[kind] = np.concatenate([_logits(model, _normalised(part)) for part in parts])
    quantised, floats = found[f"{name}-int8"], found[name]
    best = np.argsort(-integers, axis=1)[:, :5]
    in_best = np.mean((best == floats.argmax(axis=1)[:, None]).any(axis=1))
    print(
        f"\n{name}: {len(pixels)} photos, top-1 agreement with integer arithmetic: quantised graph "
        f"{_agreement(quantised, integers):.2%} (with scales in float64 "
        f"{_agreement(quantised, exact):.2%}), float network {_agreement(floats, integers):.2%} "
        f"(in the five best: {in_best:.2%})"
    )
    assert _agreement(quantised, integers) >= 0.99 and _agreement(quantised, exact) > 0.9
    assert _agreement(floats, integers) > 0.85 and in_best > 0.98


def test_int8_arrays_give_the_same_logits(folder, pixels):
    some = _normalised(pixels[:1, 32:96, 32:96])
    file = folder / "mbv2-w0.35.pkl"
    floats, integers = (
        mcunet.load_quantized_mcunet(file, mcunet.MBV2_W035, dtype=dtype, rngs=nnx.Rngs(0))
        for dtype in (jnp.float32, jnp.int8)
    )
    assert integers.stem.conv.kernel.dtype == jnp.int8
    assert integers.stem.conv.bias.dtype == jnp.int32
    np.testing.assert_array_equal(_logits(floats, some), _logits(integers, some))


def test_paths_are_those_of_the_float_network(folder):
    def paths(name):
        model = models.load(name, weights=folder / "mcunet-5fps.pkl", classes=10)
        return {
            "/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))
        }

    assert paths("mcunet-5fps") == paths("mcunet-5fps-int8")


def test_quantised_graph_can_be_trained(folder, pixels):
    model = models.load("mcunet-5fps-int8", weights=folder / "mcunet-5fps.pkl", classes=10)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    images = _normalised(pixels[:2, 32:96, 32:96])

    def loss(params, images, labels):
        logits = nnx.merge(graph, params, rest)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    mask = pj.mask(params, SCHEMES / "mcunet_49kb.yaml")
    _, grads = jax.jit(pj.value_and_grad(loss, mask))(params, images, jnp.array([1, 2]))
    sizes = {
        jax.tree_util.keystr(path): float(jnp.abs(leaf).max())
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }
    assert sizes and all(size > 0 for size in sizes.values()), sizes


def test_random_weights_have_no_scales():
    with pytest.raises(ValueError, match="mcunet-5fps-int8 takes its scales from the weights"):
        models.load("mcunet-5fps-int8", weights=None)


@pytest.mark.parametrize("kind", ["proxyless-w0.3", "proxyless-w0.3-int8"])
def test_file_of_another_network(folder, kind):
    with pytest.raises(WeightsError, match=r"the kernel of blocks/1/depthwise has shape \(5, 5, 1"):
        models.load(kind, weights=folder / "mcunet-5fps.pkl")


def test_files_that_are_no_networks(tmp_path):
    file = write_zip(tmp_path / "a.pkl", {"blocks": [1], "first_conv": None, "classifier": None})
    with pytest.raises(WeightsError, match="a.pkl is none of MCUNet's files"):
        models.load("mcunet-5fps", weights=file)


def test_a_file_cut_short_or_with_code_in_it(tmp_path, folder):
    file = tmp_path / "a.pkl"
    file.write_bytes((folder / "mcunet-5fps.pkl").read_bytes()[:-100])
    with pytest.raises(WeightsError, match="cut short"):
        models.load("mcunet-5fps", weights=file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"blocks": print}))
    with pytest.raises(WeightsError, match=r"refused: it names the global builtins\.print"):
        models.load("mcunet-5fps-int8", weights=file)


def test_grid():
    grid = Grid(0.5, -3)
    np.testing.assert_array_equal(grid.integers(jnp.array([0, 0.24, 0.26, 1e9, -1e9])),
                                  [-3, -3, -2, 127, -128])  # fmt: skip
    np.testing.assert_array_equal(grid.real(jnp.array([-3, 127], jnp.int8)), [0, 65])
