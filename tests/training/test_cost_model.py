"""What a mask costs, predicted without compiling it, against what is compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pockjax as pj
from experiments import networks
from pockjax.autodiff import inlined
from pockjax.costs import CompiledCost, predict_temp_bytes
from pockjax.training import CostModel, _cost_model
from pockjax.training._program import Options, Program

LAYERS, WIDTH = 5, 128
TX = optax.adam(1e-3)


def params() -> list[Any]:
    keys = jax.random.split(jax.random.key(0), LAYERS)
    return [{"w": jax.random.normal(k, (WIDTH, WIDTH)) / 12, "b": jnp.zeros(WIDTH)} for k in keys]


def loss(params: Any, x: jax.Array) -> jax.Array:
    for layer in params:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jnp.mean(x**2)


def random_mask(seed: int) -> list[Any]:
    generator = np.random.default_rng(seed)
    choices = (True, pj.part[: WIDTH // 4], pj.part[:, : WIDTH // 2], False)
    lowest = int(generator.integers(LAYERS))
    mask = [
        {
            "w": choices[generator.integers(4)] if i > lowest else False,
            "b": bool(generator.random() < 0.5) if i > lowest else False,
        }
        for i in range(LAYERS)
    ]
    mask[lowest]["b"] = True
    return mask


@pytest.fixture(scope="module")
def model() -> CostModel:
    return CostModel(loss, TX, params(), jnp.ones((256, WIDTH)))


@pytest.mark.parametrize("seed", range(10))
def test_prediction_is_near_the_compiled_step(model: CostModel, seed: int) -> None:
    mask = random_mask(seed)
    predicted = model.predict(mask)
    compiled = pj.compile(loss, mask, TX, params(), jnp.ones((256, WIDTH)))
    cost = CompiledCost.of(compiled.compiled)
    assert predicted.argument_bytes == cost.argument_bytes
    # Without calibration.
    assert predicted.memory_bytes == pytest.approx(cost.total_bytes, rel=0.1)


def test_the_report_of_a_step_has_the_prediction_beside_it(model: CostModel) -> None:
    mask = random_mask(1)
    report = model.compile(mask).report
    assert report.expected == model.predict(mask)
    assert report.predicted_total_bytes == pytest.approx(report.compiled.total_bytes, rel=0.1)
    assert "Predicted: " in str(report)
    assert report.to_dict()["expected"]["memory_bytes"] == report.predicted_total_bytes


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_several_variants_is_predicted(seed: int) -> None:
    x, mask = jnp.ones((256, WIDTH)), random_mask(seed)
    kept, xla, auto = (
        CostModel(loss, TX, params(), x, residuals=name).predict(mask).memory_bytes
        for name in ("kept", "xla", "auto")
    )
    assert auto <= min(kept, xla)
    compiled = pj.compile(loss, mask, TX, params(), x, residuals="auto").report.compiled
    assert auto == pytest.approx(compiled.total_bytes, rel=0.1)


def test_units_of_a_depth_are_counted_beside_the_one_that_is_predicted(model: CostModel) -> None:
    units = [
        [{"w": j == 2 and w, "b": j == 2 and not w} for j in range(LAYERS)] for w in (False, True)
    ]
    costs = model.separable(units, [2, 2])
    for i, unit in enumerate(units):
        alone = model.predict(unit)
        assert costs.cost([i], "optimizer_bytes") == alone.optimizer_bytes
        assert costs.cost([i], "flops") == pytest.approx(alone.flops, rel=0.02)
        assert costs.cost([i], "memory_bytes") == pytest.approx(alone.memory_bytes, rel=0.1)


def test_training_more_is_never_cheaper_in_arrays(model: CostModel) -> None:
    before = None
    for i in reversed(range(LAYERS)):
        found = model.predict([{"w": j >= i, "b": j >= i} for j in range(LAYERS)])
        if before is not None:
            assert found.gradient_bytes > before.gradient_bytes
            assert found.optimizer_bytes > before.optimizer_bytes
            assert found.residual_bytes >= before.residual_bytes
            assert found.flops > before.flops
        before = found


def test_calibration_predicts_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    # Made-up times: two real ones may come out in any order on a busy machine.
    monkeypatch.setattr(_cost_model, "_timed", lambda steps, repeats: [1e-3, 4e-3])
    own = CostModel(loss, TX, params(), jnp.ones((256, WIDTH)))
    assert own.predict(True).seconds is None
    last = [i == LAYERS - 1 for i in range(LAYERS)]
    own.calibrate([last, True], repeats=2)
    cheap, dear = own.predict(last).seconds, own.predict(True).seconds
    assert cheap is not None and dear is not None and 0 < cheap < dear
    assert own.probes[1].compiled.total_bytes > own.probes[0].compiled.total_bytes


def test_sums_of_units_are_near_their_union(model: CostModel) -> None:
    units = [[{"w": j == i, "b": False} for j in range(LAYERS)] for i in range(LAYERS)]
    units += [[{"w": False, "b": j == i} for j in range(LAYERS)] for i in range(LAYERS)]
    depths = [*range(LAYERS), *range(LAYERS)]
    costs = model.separable(units, depths)
    for seed in range(8):
        generator = np.random.default_rng(seed)
        chosen = sorted(generator.choice(len(units), 4, replace=False).tolist())
        mask = [{"w": i in chosen, "b": i + LAYERS in chosen} for i in range(LAYERS)]
        union = model.predict(mask)
        assert costs.cost(chosen, "optimizer_bytes") == pytest.approx(
            union.optimizer_bytes, abs=4 * len(chosen)
        )
        assert costs.cost(chosen, "flops") == pytest.approx(union.flops, rel=0.05)
        assert costs.cost(chosen, "memory_bytes") == pytest.approx(union.memory_bytes, rel=0.25)


def test_options_are_checked_as_compile_checks_them() -> None:
    wrongs: list[dict[str, Any]] = [
        {"residuals": "foo"},
        {"rewrites": "x"},
        {"updates": "x"},
        {"frozen_dtype": int},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CostModel(loss, TX, params(), jnp.ones((256, WIDTH)), **wrong)
        with pytest.raises(ValueError, match=next(iter(wrong))):
            pj.compile(loss, True, TX, params(), jnp.ones((256, WIDTH)), **wrong)
    with pytest.raises(ValueError, match="no masks"):
        CostModel(loss, TX, params(), jnp.ones((256, WIDTH))).calibrate([])


def test_a_plan_is_of_the_program_that_is_compiled() -> None:
    """What is rounded to half precision, and so the equations, depends on the mask."""
    options: dict[str, Any] = {"frozen_dtype": "bfloat16", "rewrites": "none"}
    mask = [{"w": i >= 1, "b": True} for i in range(LAYERS)]
    plan = CostModel(loss, TX, params(), jnp.ones((256, WIDTH)), **options).best_plan(mask)
    step = pj.compile(loss, mask, TX, params(), jnp.ones((256, WIDTH)), remat=True, **options)
    assert plan == step.remat


@pytest.mark.parametrize("trained", ["everything", "biases"])
def test_memory_of_a_step_that_is_run_depth_first(trained: str) -> None:
    """Branches of an encoder are where the order of operands matters."""
    weights = networks.transformer_params(jax.random.key(0), 4, 64, 256)
    mask = True if trained == "everything" else pj.mask(weights, lambda _, x: x.ndim == 1)

    def encoder(params: Any, x: Any) -> Any:
        return jnp.mean(networks.transformer(params, x, 4) ** 2)

    update = Options(rewrites="none").update(encoder, mask, TX, weights, (jnp.ones((4, 64, 64)),))
    _, executable = Program(True, True, None, depth_first=True).compiled(update)
    step = jax.make_jaxpr(update.step(True, True))(update.example_state, *update.batch)
    predicted = predict_temp_bytes(inlined(step), depth_first=True)
    assert predicted == pytest.approx(CompiledCost.of(executable).temp_bytes, rel=0.1)


def test_operations_are_run_in_the_order_that_takes_less_memory() -> None:
    """Depth first is better for the encoder's gradient, and breadth first for a short chain."""
    weights = networks.transformer_params(jax.random.key(0), 4, 64, 256)
    x = jnp.ones((4, 64, 64))

    def encoder(params: Any, x: Any) -> Any:
        return jnp.mean(networks.transformer(params, x, 4) ** 2)

    step = pj.compile(encoder, True, TX, weights, x, rewrites="none")
    update = Options(rewrites="none").update(encoder, True, TX, weights, (x,))
    breadth, depth = (
        CompiledCost.of(Program(True, True, None, depth_first).compiled(update)[1]).total_bytes
        for depth_first in (False, True)
    )
    assert step.report.depth_first and "depth first" in str(step.report)
    assert step.report.compiled.total_bytes == depth < 0.9 * breadth
    predicted = CostModel(encoder, TX, weights, x, rewrites="none").predict(True)
    assert predicted.memory_bytes == pytest.approx(depth, rel=0.05)

    short = pj.compile(lambda w, x: jnp.mean(x @ w), True, TX, jnp.ones((4, 2)), jnp.ones((8, 4)))
    assert not short.report.depth_first
