"""Published schemes on the convolutional networks that they are for."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pockjax as pj
from pockjax import models
from tests.models.made import made

SCHEMES = {path.stem: path for path in (Path(__file__).parents[2] / "configs/schemes").glob("*")}
NETWORKS = (
    "mobilenet_v2",
    "mcunet-5fps",
    "proxyless-w0.3",
    "mbv2-w0.35",
    "resnet50",
    "efficientnet_lite0",
)
NAMED = sorted(name for name in SCHEMES if pj.Scheme.load(SCHEMES[name]).model in NETWORKS)
# One of each network is compiled and run; the others are traced and lowered.
RUN = ("mobilenet_v2", "mcunet_99kb", "proxyless_w03_98kb", "mbv2_w035_99kb", "resnet50")

BATCH = (
    np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32),
    np.array([1, 2], np.int32),
)


def _parts(model):
    """A loss, and the parameters that it is a function of."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, images, labels):
        logits = nnx.merge(graph, params, rest)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss, params


def _model(name):
    network = pj.Scheme.load(SCHEMES[name]).model
    return made(lambda: models.load(network, weights=None, classes=10))


def test_every_network_is_registered():
    assert set(NETWORKS) <= set(models.names())
    assert len(NAMED) == 18


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("folded", [False, True], ids=["norms", "folded"])
def test_scheme_resolves_and_trains_the_same_units(name, folded):
    model = nnx.eval_shape(
        lambda: models.load(pj.Scheme.load(SCHEMES[name]).model, weights=None, classes=10)
    )
    if folded:
        model = nnx.eval_shape(models.fold_batch_norm, model)
    params = nnx.state(model, nnx.Param)
    rows = pj.describe(params, pj.mask(params, SCHEMES[name]))
    trained = [row.path for row in rows if row.trained]
    assert {"classifier/kernel", "classifier/bias"} < set(trained)
    assert 0.01 < rows.trained / sum(leaf.size for leaf in jax.tree.leaves(params)) < 0.6
    frozen = ("stem/", "blocks/0/", "stages/0/")
    assert not any(path.startswith(frozen) for path in trained)


@pytest.mark.parametrize("name", [name for name in NAMED if name not in RUN])
def test_scheme_lowers(name):
    loss, params = _parts(_model(name))
    gradient = pj.value_and_grad(loss, pj.mask(params, SCHEMES[name]))
    jax.jit(gradient).lower(params, *BATCH)


@pytest.mark.parametrize("name", RUN)
def test_scheme_takes_a_step(name):
    loss, params = _parts(_model(name))
    mask = pj.mask(params, SCHEMES[name])
    step = pj.compile(loss, mask, optax.sgd(0.01), params, *BATCH)
    state, metrics = step(step.init(params), *BATCH)
    assert jnp.isfinite(metrics.loss)
    report = step.report
    assert not report.fallbacks
    assert report.residual_bytes < report.full.residual_bytes / 4
    assert report.predicted.flops < 0.7 * report.full.flops
    trained = {row.path: row.trained for row in report.rows}
    changed = {
        row.path: bool((before != after).any())
        for row, before, after in zip(
            report.rows, jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True
        )
    }
    assert {path for path, yes in changed.items() if yes} <= {p for p, t in trained.items() if t}
    assert changed["classifier/kernel"]
