"""The language model against transformers and numpy, from every format, unrolled and scanned."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pockjax as pj
from pockjax import models
from pockjax.models import Llama, LlamaConfig, load_llama, to_scanned, to_unrolled
from pockjax.models.llama import rotate, rotation
from pockjax.weights import WeightsError
from tests.models.llama_files import (
    CONFIG,
    numpy_logits,
    random_tensors,
    write_folder,
    write_llama2c,
    write_llama_gguf,
)

ORACLE = np.load(Path(__file__).parent / "data" / "llama.npz")
TOKENS = np.random.default_rng(3).integers(0, CONFIG.vocabulary, (2, 11))


def relative_error(found, expected) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@nnx.jit
def logits(model, tokens):
    return model(tokens)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["folder", "gguf", "llama2c"])
def test_every_format_gives_the_model_that_numpy_computes(tmp_path, form, tied, scanned):
    tensors = random_tensors(tied=tied)
    if form == "folder":
        path = write_folder(tmp_path / "a", tensors)
        tensors = {k: v.astype(jnp.bfloat16).astype(np.float32) for k, v in tensors.items()}
    elif form == "gguf":
        path = write_llama_gguf(tmp_path / "a.gguf", tensors)
    else:
        path = write_llama2c(tmp_path / "a.bin", tensors)
    model = load_llama(path, scanned=scanned)
    rope = "halves" if form == "folder" else "interleaved"
    assert model.config == replace(CONFIG, tied=tied, scanned=scanned, rope=rope)
    assert relative_error(logits(model, TOKENS), numpy_logits(tensors, TOKENS)) < 1e-5


def test_stories_equal_transformers(shared_data):
    model = load_llama(shared_data / "weights" / "stories260k" / "stories260K.bin")
    assert model.config == models.STORIES_260K
    found = logits(model, ORACLE["stories_tokens"])[..., ::16]
    assert relative_error(found, ORACLE["stories_logits"]) < 1e-5


def test_smollm2_equals_transformers(smollm2):
    model = load_llama(smollm2, scanned=True)
    assert model.config == replace(models.SMOLLM2_135M, scanned=True, rope="interleaved")
    found = logits(model, ORACLE["smollm2_tokens"])[..., ::512]
    assert relative_error(found, ORACLE["smollm2_logits"]) < 1e-4


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_products_depend_on_distance_alone(interleaved):
    config = replace(CONFIG, positions=4096)
    x, y = np.random.default_rng(0).normal(size=(2, 1, 1, 1, config.head)).astype(np.float32)

    def product(at: int, other: int) -> float:
        turned = [
            rotate(jnp.asarray(z), rotation(config, jnp.array([k])), interleaved=interleaved)
            for z, k in ((x, at), (y, other))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-3)


def test_parameter_paths():
    def paths(config: LlamaConfig) -> set[str]:
        model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        assert len(flat) == len(nnx.to_flat_state(nnx.state(model)))  # nothing but parameters
        return {"/".join(map(str, path)) for path, _ in flat}

    inside = {
        *(f"attention/{name}/kernel" for name in ("query", "key", "value", "output")),
        *(f"ffn/{name}/kernel" for name in ("gate", "up", "down")),
        "attention_norm/scale",
        "ffn_norm/scale",
    }
    outside = {"embed/embedding", "norm/scale", "head/kernel"}
    unrolled = {f"layers/{k}/{path}" for k in range(3) for path in inside}
    assert paths(CONFIG) == outside | unrolled
    assert paths(replace(CONFIG, tied=True)) == (outside | unrolled) - {"head/kernel"}
    assert paths(replace(CONFIG, scanned=True)) == outside | {f"layers/{path}" for path in inside}


def test_kernels_are_matrices():
    model = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))
    assert isinstance(model.layers, nnx.List)
    layer = model.layers[0]
    assert layer.attention.query.kernel.shape == (32, 32)
    assert layer.attention.key.kernel.shape == (32, 16)
    assert layer.ffn.down.kernel.shape == (40, 32)


def test_conversion_there_and_back():
    model = Llama(CONFIG, rngs=nnx.Rngs(1))
    scanned = to_scanned(model)
    assert scanned.config.scanned and not model.config.scanned
    assert relative_error(logits(scanned, TOKENS), logits(model, TOKENS)) < 1e-5
    back = to_unrolled(scanned)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(back), nnx.state(model)))
    assert to_scanned(scanned) is scanned and to_unrolled(model) is model


def test_seed_decides_both_forms_alike():
    one = Llama(replace(CONFIG, scanned=True), rngs=nnx.Rngs(2))
    other = to_scanned(Llama(CONFIG, rngs=nnx.Rngs(2)))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(one), nnx.state(other)))


def test_both_forms_have_the_same_packed_gradients():
    """Output-channel parts of the projections in the last layers, and nothing in the first."""
    model = Llama(CONFIG, rngs=nnx.Rngs(3))
    channels = {"query": pj.part[:, :12], "value": pj.part[:, 3:10]}
    trained = range(1, 3)

    def gradients(model: Llama, scheme):
        graph, params = nnx.split(model)

        def loss(params, tokens):
            scores = nnx.merge(graph, params)(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:]).mean()

        mask = pj.mask(params, scheme)
        value, grads = jax.jit(pj.value_and_grad(loss, mask))(params, TOKENS)
        flat = {
            "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        }
        return value, {path.removesuffix("/value"): leaf for path, leaf in flat.items()}

    def by_layer(path: str, leaf):
        _, k, *rest = path.split("/")
        if int(k) not in trained:
            return False
        name = "/".join(rest)
        if name == "ffn/gate/kernel" or name == "ffn_norm/scale":
            return True
        return next((part for n, part in channels.items() if name.endswith(f"{n}/kernel")), False)

    def stacked(path: str, leaf):
        if not path.startswith("layers/"):
            return False
        name = path.removeprefix("layers/")
        if name in ("ffn/gate/kernel", "ffn_norm/scale"):
            return pj.part[1:3]
        for n, part in channels.items():
            if name.endswith(f"{n}/kernel"):
                return pj.part[(slice(1, 3), *part.indices)]
        return False

    value, one = gradients(
        model, lambda path, leaf: path.startswith("layers/") and by_layer(path, leaf)
    )
    other_value, other = gradients(to_scanned(model), stacked)
    assert float(value) == pytest.approx(float(other_value), rel=1e-6)
    assert len(one) == 2 * 4 and len(other) == 4
    for path, leaf in other.items():
        name = path.removeprefix("layers/")
        for k in trained:
            expected = one[f"layers/{k}/{name}"]
            assert leaf[k - 1].shape == expected.shape
            np.testing.assert_allclose(leaf[k - 1], expected, rtol=1e-4, atol=1e-6)


def test_lower_precision_is_near(tmp_path):
    path = write_llama_gguf(tmp_path / "a.gguf", random_tensors())
    model, half = load_llama(path), load_llama(path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("bfloat16")}
    assert logits(half, TOKENS).dtype == jnp.bfloat16
    error = relative_error(logits(half, TOKENS).astype(np.float32), logits(model, TOKENS))
    assert error < 0.3


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_missing_tensor_is_named(tmp_path, form):
    tensors = random_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    if form == "folder":
        path, name = write_folder(tmp_path / "a", tensors), "model.layers.1.mlp.up_proj.weight"
    else:
        path, name = write_llama_gguf(tmp_path / "a.gguf", tensors), "blk.1.ffn_up.weight"
    with pytest.raises(WeightsError, match=f"{re.escape(str(path))}.*{re.escape(name)}"):
        load_llama(path)


@pytest.mark.parametrize("scanned", [False, True])
def test_tensor_of_another_shape_is_named_with_both(tmp_path, scanned):
    path = write_llama_gguf(
        tmp_path / "a.gguf", random_tensors(), **{"llama.feed_forward_length": 44}
    )
    with pytest.raises(WeightsError, match=r"a.gguf.*ffn.*44.*40.*'blk\..*\.ffn_"):
        load_llama(path, scanned=scanned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "'mistral'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"attention_bias": True}, "biases True"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
    ],
)
def test_other_architectures_are_refused(tmp_path, change, message):
    folder = write_folder(tmp_path / "a", random_tensors(), **change)
    with pytest.raises(WeightsError, match=rf"config.json.*{message}"):
        load_llama(folder)


def test_other_gguf_architectures_are_refused(tmp_path):
    change = {"general.architecture": "qwen2"}
    path = write_llama_gguf(tmp_path / "a.gguf", random_tensors(), **change)
    with pytest.raises(WeightsError, match="'qwen2'"):
        load_llama(path)


def test_missing_weights_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither config.json nor exactly one .gguf"):
        load_llama(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_llama(tmp_path / "a.gguf")
    (tmp_path / "a.pth").touch()
    with pytest.raises(WeightsError, match=r"a\.pth: weights of a Llama are"):
        load_llama(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "changes", [{"heads": 3}, {"heads": 32}, {"kv_heads": 3}, {"rope": "spiral"}]
)
def test_impossible_shapes_are_refused(changes):
    with pytest.raises(ValueError, match=r"heads|rope"):
        replace(CONFIG, **changes)


def test_registry(shared_data, tmp_path):
    path = shared_data / "weights" / "stories260k" / "stories260K.bin"
    model = models.load("stories260k", weights=path)
    assert isinstance(model, Llama)
    with pytest.raises(ValueError, match="no classes"):
        models.load("stories260k", weights=path, classes=3)
    with pytest.raises(WeightsError, match="no stories260k"):
        models.load("stories260k", weights=write_llama2c(tmp_path / "a.bin", random_tensors()))
