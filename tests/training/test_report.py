"""What a step says of itself."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import pockjax as pj

WIDTH, BATCH = 32, 16


def params() -> dict[str, Any]:
    return {
        f"layer{i}": {"kernel": jnp.ones((WIDTH, WIDTH)) / WIDTH, "bias": jnp.zeros(WIDTH)}
        for i in range(4)
    }


def loss(params: Any, x: Any) -> Any:
    for layer in params.values():
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return jnp.mean(x**2)


MASK = {
    "layer0": False,
    "layer1": {"kernel": False, "bias": True},
    "layer2": {"kernel": pj.part[:8], "bias": False},
    "layer3": False,
}
X = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)


@pytest.fixture(scope="module")
def report() -> pj.Report:
    return pj.compile(loss, MASK, optax.adam(1e-3), params(), X).report


def test_says_what_was_dropped(report: pj.Report) -> None:
    # The first trained bias is where the backward pass stops: it does not go through the product.
    assert report.dropped_backward == ("layer0/bias", "layer0/kernel", "layer1/kernel")
    assert "layer2/kernel" not in report.dropped_activations
    assert {"layer1/bias", "layer1/kernel", "layer3/kernel"} <= set(report.dropped_activations)
    assert report.fallbacks == ()


def test_counts_what_is_computed_and_kept(report: pj.Report) -> None:
    product = 2 * BATCH * WIDTH * WIDTH
    # Four forward products, dX of the last two layers, and a quarter of one dW.
    assert report.predicted.flops == pytest.approx(6.25 * product, rel=0.1)
    # Four forward products, three dX and four dW.
    assert report.full.flops == pytest.approx(11 * product, rel=0.1)
    elements = BATCH * WIDTH
    # A byte for each element after the trained bias; the trained channels; the last activation.
    assert report.residual_bytes == 2 * elements + 4 * BATCH * 8 + 4 * elements
    assert report.predicted.trained == 8 * WIDTH + WIDTH
    assert report.optimizer_bytes == 2 * 4 * (9 * WIDTH) + 4
    assert report.compiled.total_bytes > 0
    assert report.temp_bytes


def test_prints_in_every_form(report: pj.Report) -> None:
    data = json.loads(report.to_json())
    assert data["predicted"]["residual_bytes"] == report.residual_bytes
    assert data["compiled"]["temp_bytes"] == report.compiled.temp_bytes
    for text in (str(report), report.to_markdown()):
        assert "optimizer state" in text and "Compiled" in text
    console = pytest.importorskip("rich.console").Console(record=True, width=120)
    console.print(report)
    assert "optimizer state" in console.export_text()


def test_names_every_fallback() -> None:
    def dense(params: Any, x: Any) -> Any:
        return jnp.mean(x @ jnp.exp(params["w"]) + jnp.cumsum(params["b"]))

    step = pj.compile(
        dense, {"w": pj.part[:2], "b": pj.part[:1]}, optax.sgd(0.1),
        {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}, jnp.ones((2, 4)),
    )  # fmt: skip
    named = {(f.path, f.primitive) for f in step.report.fallbacks}
    assert ("w", "exp") in named and ("b", "cumsum") in named
    assert "exp" in str(step.report)


def test_compares_both_variants() -> None:
    step = pj.compile(loss, MASK, optax.adam(1e-3), params(), X, residuals="auto")
    variants = step.report.variants
    assert set(variants) == {"kept", "xla"}
    assert step.report.compiled.total_bytes == min(variants.values())
