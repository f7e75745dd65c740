"""Published schemes on the language models they are for: by shapes at full size, run when small."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import pockjax as pj
from pockjax.masks import describe
from pockjax.models import Bert, Llama
from pockjax.models.bert import BERT_BASE, DISTILBERT, MINILM
from pockjax.models.llama import LLAMA_2_7B

SCHEMES = Path(__file__).parents[2] / "configs" / "schemes"
LAYER = 4 * 4096**2 + 4096 * 11_008 + 2 * 4096


@pytest.mark.parametrize(
    ("name", "model", "config", "trained"),
    [
        ("llama2_7b", Llama, LLAMA_2_7B, 5 * LAYER),
        (
            "bert",
            Bert,
            BERT_BASE,
            4 * (4 * 768**2 + 768 * 3072) + 6 * 9984 + 768 * 2 + 2 - 6 * 1536,
        ),
        ("distilbert", Bert, DISTILBERT, None),
        ("minilm", Bert, MINILM, None),
    ],
)
def test_scheme_resolves_on_the_full_size(name, model, config, trained):
    params = nnx.state(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    rows = describe(params, pj.mask(params, SCHEMES / f"{name}.yaml"))
    assert 0 < rows.trained < sum(leaf.size for leaf in jax.tree.leaves(params)) / 2
    if trained is not None:
        assert rows.trained == trained


def test_llama_2_7b_has_its_size():
    params = nnx.state(nnx.eval_shape(lambda: Llama(LLAMA_2_7B, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 6_738_415_616


@pytest.mark.parametrize(
    "name", ["llama2_7b", pytest.param("bert", marks=pytest.mark.slow), "distilbert"]
)
def test_small_version_takes_a_step(name):
    """As many layers as the scheme names, but narrow ones."""
    narrow = {"vocabulary": 16, "width": 8, "heads": 2, "ffn_width": 12}
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 16, (2, 5)).astype(np.int32)
    if name == "llama2_7b":
        config = replace(LLAMA_2_7B, **narrow, kv_heads=1)
        shapes = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        batch = (tokens[:, :-1], tokens[:, 1:])
    else:
        config = DISTILBERT if name == "distilbert" else BERT_BASE
        config = replace(config, **narrow, positions=8)
        shapes = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
        batch = (tokens, np.array([0, 1], np.int32))
    graph, params = nnx.split(shapes)
    # Drawn by numpy: JAX would compile every initialiser.
    params = jax.tree.map(lambda x: generator.normal(0, 0.5, x.shape).astype(x.dtype), params)

    def loss(params, tokens, targets):
        model = nnx.merge(graph, params)
        inputs = (tokens,) if isinstance(model, Llama) else (tokens, tokens >= 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(*inputs), targets)
        return losses.mean()

    mask = pj.mask(params, SCHEMES / f"{name}.yaml")
    # A rate at which even a small gradient moves a weight by more than its last bit.
    step = pj.compile(loss, mask, optax.sgd(1e4), params, *batch)
    state, metrics = step(step.init(params), *batch)
    assert np.isfinite(metrics.loss)
    before, after = (dict(nnx.to_flat_state(tree)) for tree in (params, state.params))
    moved = {path for path in before if np.any(after[path][...] != before[path][...])}
    trained = {row.path for row in describe(params, mask) if row.trained}
    changed = {"/".join(map(str, path)) for path in moved}
    # A key's bias shifts all of a query's scores alike, and so has no gradient but rounding.
    keys = {path for path in trained if path.endswith("key/bias")}
    assert changed <= trained and trained - changed <= keys
