"""The encoder against one written in numpy, for small random weights and for published ones."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from scipy.special import erf
from tokenizers import Tokenizer

from pockjax import models
from pockjax.models import BertConfig, bert, load_bert
from pockjax.weights import WeightsError

_BERT = {
    "layer": "encoder.layer.{}.",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_DISTILBERT = {
    "layer": "transformer.layer.{}.",
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "ffn_norm": "output_layer_norm",
}


def _numpy_embed(tensors, names, tokens, valid, *, layers, heads):
    """Mean-pooled sentence vectors in float64, from the tensors as they are published."""
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return centred / deviation * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + erf(x / np.sqrt(2)))

    x = tensors["embeddings.word_embeddings.weight"][tokens]
    x = x + tensors["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    if "embeddings.token_type_embeddings.weight" in tensors:
        x = x + tensors["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    for k in range(layers):
        layer = {key: names["layer"].format(k) + name for key, name in names.items()}
        mixed = np.empty_like(x)
        for text in range(len(x)):
            query, key, value = (linear(x[text], layer[n]) for n in ("query", "key", "value"))
            size = x.shape[-1] // heads
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                scores = query[:, part] @ key[:, part].T / np.sqrt(size)
                scores = np.where(valid[text], scores, -np.inf)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                mixed[text][:, part] = weights / weights.sum(-1, keepdims=True) @ value[:, part]
        x = norm(x + linear(mixed, layer["output"]), layer["attention_norm"])
        x = norm(x + linear(gelu(linear(x, layer["up"])), layer["down"]), layer["ffn_norm"])
    return np.stack([row[keep].mean(0) for row, keep in zip(x, valid, strict=True)])


def _load_tensors(folder):
    return load_file(folder / "model.safetensors")


def _embed(model, tokens, valid):
    return np.asarray(model.embed(jnp.asarray(tokens), jnp.asarray(valid)))


@pytest.mark.parametrize("distil", [False, True])
def test_small_encoder_equals_numpy(publish_bert, distil):
    folder = publish_bert(distil=distil)
    model = load_bert(folder, classes=3, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(1).integers(0, 40, (3, 9))
    valid = np.arange(9) < np.array([[9], [4], [1]])
    expected = _numpy_embed(
        _load_tensors(folder),
        _DISTILBERT if distil else _BERT,
        tokens,
        valid,
        layers=2,
        heads=4,
    )
    np.testing.assert_allclose(_embed(model, tokens, valid), expected, rtol=1e-4, atol=1e-5)


def _tokenize(folder, texts):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(texts)
    tokens = np.array([encoding.ids for encoding in encodings], np.int32)
    return tokens, np.array([encoding.attention_mask for encoding in encodings], bool)


def test_published_encoder_equals_numpy(minilm):
    model = load_bert(minilm, classes=5, rngs=nnx.Rngs(0))
    tokens, valid = _tokenize(
        minilm, ["Shares fell sharply in London.", "The striker scored twice, then limped off."]
    )
    expected = _numpy_embed(_load_tensors(minilm), _BERT, tokens, valid, layers=6, heads=12)
    error = np.abs(_embed(model, tokens, valid) - expected).max()
    assert error < 1e-4 * np.abs(expected).max()


def test_published_encoder_equals_transformers(minilm):
    """Tokens and vectors are those of tests/models/oracles/library.py."""
    expected = np.load(Path(__file__).parent / "data" / "library.npz")["minilm"]
    tokens = np.random.default_rng(1).integers(0, 30_522, (2, 11))
    valid = np.arange(11) < np.array([[11], [7]])
    model = load_bert(minilm, classes=5, rngs=nnx.Rngs(0))
    error = np.abs(_embed(model, tokens, valid) - expected).max()
    assert error < 1e-4 * np.abs(expected).max()


def test_published_encoder_knows_what_is_alike(minilm):
    model = load_bert(minilm, classes=5, rngs=nnx.Rngs(0))
    texts = ["A man is eating pasta.", "Someone has noodles for lunch.", "The central bank met."]
    vectors = _embed(model, *_tokenize(minilm, texts))
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    same, other, another = vectors[0] @ vectors[1], vectors[0] @ vectors[2], vectors[1] @ vectors[2]
    assert same > 0.5 > 0.2 > max(other, another)


def test_parameter_paths(publish_bert):
    model = load_bert(publish_bert(), classes=3, rngs=nnx.Rngs(0))
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    in_layer = {
        *(f"attention/{p}/{k}" for p in ("query", "key", "value", "output") for k in _DENSE),
        *(f"ffn/{p}/{k}" for p in ("up", "down") for k in _DENSE),
        *(f"{block}/norm/{k}" for block in ("attention", "ffn") for k in ("scale", "bias")),
    }
    assert paths == {
        *(f"embeddings/{table}/embedding" for table in ("word", "position", "token_type")),
        *(f"embeddings/norm/{k}" for k in ("scale", "bias")),
        *(f"layers/{layer}/{path}" for layer in range(2) for path in in_layer),
        *(f"classifier/{k}" for k in _DENSE),
    }


_DENSE = ("kernel", "bias")


def test_all_state_is_parameters(publish_bert):
    model = load_bert(publish_bert(), classes=3, rngs=nnx.Rngs(0))
    _, _, rest = nnx.split(model, nnx.Param, ...)
    assert not nnx.to_flat_state(rest)


def test_padding_changes_nothing(publish_bert):
    model = load_bert(publish_bert(), classes=3, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(2).integers(0, 40, (2, 6))
    padded = np.pad(tokens, ((0, 0), (0, 5)), constant_values=7)
    valid = np.ones_like(tokens, bool)
    longer = np.pad(valid, ((0, 0), (0, 5)))
    np.testing.assert_allclose(
        model(jnp.asarray(padded), jnp.asarray(longer)),
        model(jnp.asarray(tokens), jnp.asarray(valid)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_seed_decides_the_classifier_alone(publish_bert):
    folder = publish_bert()
    one, other = (load_bert(folder, classes=3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    assert not jnp.array_equal(one.classifier.kernel[...], other.classifier.kernel[...])
    assert jnp.array_equal(one.layers[1].ffn.up.kernel[...], other.layers[1].ffn.up.kernel[...])


def test_names_may_begin_with_the_architecture(publish_bert):
    model = load_bert(publish_bert(prefix="bert."), classes=3, rngs=nnx.Rngs(0))
    assert model.embeddings.word.embedding.shape == (40, 16)


def _edit_tensors(folder, edit):
    tensors = _load_tensors(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensor_is_named(publish_bert):
    folder = publish_bert()
    _edit_tensors(folder, lambda tensors: tensors.pop("encoder.layer.1.output.dense.bias"))
    with pytest.raises(WeightsError, match=r"no array 'encoder.layer.1.output.dense.bias'"):
        load_bert(folder, classes=3, rngs=nnx.Rngs(0))


def test_tensor_of_another_shape_is_named(publish_bert):
    folder = publish_bert()
    name = "embeddings.LayerNorm.bias"
    _edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros(17, np.float32)}))
    with pytest.raises(WeightsError, match=rf"shape \(16,\) in the model, .* \(17,\) .* '{name}'"):
        load_bert(folder, classes=3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("change", [{"model_type": "gpt2"}, {"hidden_act": "relu"}])
def test_other_architectures_are_refused(publish_bert, change):
    folder = publish_bert()
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(given | change))
    with pytest.raises(WeightsError, match=str(next(iter(change.values())))):
        load_bert(folder, classes=3, rngs=nnx.Rngs(0))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="10 is not a multiple of heads 4"):
        BertConfig(vocabulary=4, width=10, layers=1, heads=4, ffn_width=8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_gelu(dtype):
    """To the rounding of its dtype, and of float32 where that is coarser than the result."""
    x = jnp.linspace(-8, 8, 4001, dtype=dtype)
    exact = np.asarray(x, np.float64)
    exact = 0.5 * exact * (1 + erf(exact / 2**0.5))
    found = bert._gelu(x)
    assert found.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(found, np.float64), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-6
    )


def test_registry(minilm, publish_bert):
    model = models.load("all-minilm-l6-v2", classes=5)
    expected = load_bert(minilm, classes=5, rngs=nnx.Rngs(0))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(model), nnx.state(expected)))
    with pytest.raises(WeightsError, match="no distilbert:\n  expected .*width=768"):
        models.load("distilbert", weights=publish_bert(distil=True))
    with pytest.raises(ValueError, match="bert-base .*huggingface"):
        models.load("bert-base")
