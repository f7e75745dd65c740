"""What units are worth: criteria by name, resumable to the bit, and kept as a table."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import monitoring

import pockjax as pj
from pockjax.masks import MaskError
from pockjax.selection import Sensitivity, Unit, choose_channels, criteria, sensitivity
from pockjax.selection._candidates import Program
from pockjax.selection._measure import _divided
from tests.selection.problems import all_units, batches, closeness, loss, params

OPTIONS: dict[str, Any] = {"steps": 4, "seeds": (0, 1), "progress": False, "tx": optax.sgd(0.1)}


def measured(criterion: str = "finetune", **options: Any) -> Sensitivity:
    return sensitivity(loss, params(), batches(), criterion, **(OPTIONS | options))


def test_worth_is_what_fine_tuning_one_unit_gains() -> None:
    found = measured(evaluate=closeness)
    data, order = batches(), np.random.default_rng(1).permutation(6)
    train, held_out = [data[i] for i in (0, 1, 2, 4, 5, 6)], [data[3], data[7]]
    assert _divided(tuple(data)) == (tuple(train), tuple(held_out))
    unit = found.units[1]
    mask = pj.union(params(), [unit])
    step = pj.compile(loss, mask, OPTIONS["tx"], params(), *data[0])
    state = step.init(params())
    for i in order[:4]:
        state, _ = step(state, *train[i])
    before, after = (
        np.mean([closeness(p, *batch) for batch in held_out]) for p in (params(), state.params)
    )
    np.testing.assert_allclose(found.values[1, 1], after - before, rtol=1e-3, atol=1e-6)
    assert found.values.shape == (2, len(found.units)) and (found.spread > 0).any()


def test_one_program_for_any_number_of_units() -> None:
    compiled, traced = [], []

    def counted(*args: Any) -> jax.Array:
        traced.append(1)
        return loss(*args)

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def counts(found: tuple[Unit, ...]) -> tuple[int, int]:
        compiled.clear()
        traced.clear()
        sensitivity(counted, params(), batches(), units=found, **OPTIONS)
        return len(compiled), len(traced)

    few = tuple(u for u in all_units(ratios=(1,)) if u.kind == "weight")
    many = all_units(axes=("in", "out"))
    assert len(many) > 6 * len(few)
    counts(few)  # warms JAX's caches of small operations
    monitoring.register_event_duration_secs_listener(listen)
    try:
        one, other = counts(few), counts(many)
    finally:
        monitoring.unregister_event_duration_listener(listen)
    assert one == other and 0 < one[1] <= 6


CRITERIA = ("fisher", "taylor", "gradnorm", "snr", "magnitude", "random", "finetune")


def test_criteria_have_names() -> None:
    assert set(criteria.names()) == set(CRITERIA)
    with pytest.raises(ValueError, match="no criterion is named 'fischer'; there are: fisher"):
        measured("fischer")
    with pytest.raises(ValueError, match="registered already"):
        criteria.criterion("random")(lambda problem: np.zeros((1, 1)))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_same_seed_same_values(criterion: str) -> None:
    first, again = measured(criterion), measured(criterion)
    np.testing.assert_array_equal(first.values, again.values)
    assert np.isfinite(first.values).all()
    if criterion != "magnitude":
        assert (first.values[0] != first.values[1]).any()


def dense_gradients(seed: int, steps: int = 4, examples: bool = False) -> list[Any]:
    order = np.random.default_rng(seed).permutation(8)[:steps]
    drawn = [batches()[i] for i in order]
    if examples:
        drawn = [(x[i : i + 1], y[i : i + 1]) for x, y in drawn for i in range(len(x))]
    return [jax.jit(jax.grad(loss))(params(), *batch) for batch in drawn]


def value(found: Sensitivity, name: str) -> float:
    return float(found.values[0, [unit.name for unit in found.units].index(name)])


def test_criteria_that_read_gradients_by_hand() -> None:
    grads = dense_gradients(0)
    kernels = np.stack([g["b"]["kernel"] for g in grads])
    biases = np.stack([g["c"]["bias"] for g in grads])
    mean = kernels.mean(axis=0)
    options: dict[str, Any] = {"seeds": (0,)}
    taylor = measured("taylor", **options)
    np.testing.assert_allclose(value(taylor, "b/kernel"), 0.1 * (mean**2).sum(), rtol=1e-4)
    half = 0.1 * (mean[:4] ** 2).sum()
    np.testing.assert_allclose(value(taylor, "b/kernel in 0.5"), half, rtol=1e-4)
    last = 0.1 * (biases.mean(axis=0) ** 2).sum()
    np.testing.assert_allclose(value(taylor, "biases of the last 1"), last, rtol=1e-4)
    norm = measured("gradnorm", **options)
    np.testing.assert_allclose(value(norm, "b/kernel"), np.linalg.norm(mean), rtol=1e-4)
    snr = measured("snr", **options)
    ratio = (mean**2 / kernels.var(axis=0)).sum()
    np.testing.assert_allclose(value(snr, "b/kernel"), ratio, rtol=1e-2)
    magnitude = measured("magnitude", **options)
    norm = np.linalg.norm(params()["b"]["kernel"])
    np.testing.assert_allclose(value(magnitude, "b/kernel"), norm, rtol=1e-5)


def test_parameters_in_an_order_of_their_own() -> None:
    """Eleven layers of one shape: as text, the last comes before the third."""
    generator = np.random.default_rng(0)
    layers = [generator.normal(0, 0.4, (3, 3)).astype(np.float32) for _ in range(11)]

    def deep(params: Any, x: jax.Array) -> jax.Array:
        for w in params["layers"]:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    x = generator.normal(size=(4, 3)).astype(np.float32)
    grads = jax.jit(jax.grad(deep))({"layers": layers}, x)["layers"]
    options = OPTIONS | {"steps": 1, "seeds": (0,)}
    for criterion, worth in (
        ("taylor", lambda g: 0.1 * (g**2).sum()),
        ("gradnorm", np.linalg.norm),
    ):
        found = sensitivity(deep, {"layers": layers}, [(x,)], criterion, **options)
        for k, grad in enumerate(grads):
            wanted = worth(np.asarray(grad))
            np.testing.assert_allclose(value(found, f"layers/{k}"), wanted, rtol=1e-3)


def test_fisher_is_the_potential_of_the_activations() -> None:
    """Against gates on the channels that a layer reads: dL/dgate is the sum of a·g."""
    found = measured("fisher", seeds=(0,))

    def gated(gates: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        p = params()
        x = jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"])
        x = jnp.tanh((x * gates) @ p["b"]["kernel"] + p["b"]["bias"])
        return jnp.mean((x @ p["c"]["kernel"] + p["c"]["bias"] - y) ** 2)

    order = np.random.default_rng(0).permutation(8)[:4]
    grads = [
        jax.grad(gated)(jnp.ones(8), batches()[i][0][j : j + 1], batches()[i][1][j : j + 1])
        for i in order
        for j in range(4)
    ]
    potential = np.mean(np.square(grads), axis=0) / 2
    np.testing.assert_allclose(value(found, "b/kernel"), potential.sum(), rtol=1e-4)
    np.testing.assert_allclose(value(found, "b/kernel in 0.25"), potential[:2].sum(), rtol=1e-4)
    grads = np.stack([g["c"]["bias"] for g in dense_gradients(0, examples=True)])
    of_bias = np.square(grads * params()["c"]["bias"]).mean(axis=0).sum() / 2
    np.testing.assert_allclose(value(found, "biases of the last 1"), of_bias, rtol=1e-4)


def test_channels_by_a_criterion() -> None:
    found = measured("finetune", channels="magnitude", seeds=(0,))
    part = dict(next(u for u in found.units if u.name == "b/kernel in 0.5").entries)["b/kernel"]
    best = np.sort(np.argsort(-(params()["b"]["kernel"] ** 2).sum(axis=1))[:4])
    assert part == pj.Part.from_block(pj.part[best].resolve((8, 8)))
    assert found.settings["channels"] == "magnitude"
    with pytest.raises(ValueError, match="no criterion for channels is named 'random'"):
        measured(channels="random")


def test_channels_of_a_head_stay_together() -> None:
    unit = Unit("w", "w", "weight", (("w", pj.part[:, :4]),), 0, ratio=0.5, axis=1, grain=2)
    worth = np.tile([0.0, 9.0, 5.0, 5.0, 1.0, 1.0, 4.0, 4.0], (3, 1))
    [chosen] = choose_channels([unit], {"w": worth})
    assert chosen.entries == (("w", pj.Part.from_block(pj.part[:, [0, 1, 2, 3]].resolve((3, 8)))),)


def test_goes_on_where_it_was_to_the_bit(tmp_path: Path, monkeypatch: Any) -> None:
    whole = measured()
    calls: list[tuple[int, ...]] = []
    real = Program.scores

    def breaks(self: Program, seed: int, candidates: Any) -> list[float]:
        calls.append((seed, *candidates))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, seed, candidates)

    monkeypatch.setattr(Program, "scores", breaks)
    with pytest.raises(KeyboardInterrupt):
        measured(folder=tmp_path)
    first = calls[:2]
    resumed = measured(folder=tmp_path)
    np.testing.assert_array_equal(resumed.values, whole.values)
    assert not set(first) & set(calls[3:]), "a piece was done twice"
    done = len(calls)
    np.testing.assert_array_equal(measured(folder=tmp_path).values, whole.values)
    assert len(calls) == done
    # Anything that matters makes it another piece of work.
    changes: list[dict[str, Any]] = [{"steps": 3}, {"tx": optax.sgd(0.2)}, {"evaluate": closeness}]
    for change in changes:
        before = len(calls)
        measured(folder=tmp_path, seeds=(0,), **change)
        assert len(calls) > before
    # A damaged file counts as not there.
    for file in tmp_path.rglob("*.json"):
        file.write_text("[1.0")
    np.testing.assert_array_equal(measured(folder=tmp_path).values, whole.values)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="no batches"):
        sensitivity(loss, params(), [], **OPTIONS)
    with pytest.raises(ValueError, match="same shapes: batch 0"):
        sensitivity(loss, params(), [batches()[0], tuple(x[:2] for x in batches()[1])], **OPTIONS)
    with pytest.raises(ValueError, match="one batch cannot be divided"):
        sensitivity(loss, params(), batches(1), **OPTIONS)
    with pytest.raises(ValueError, match="seeds distinct"):
        measured(seeds=(0, 0))
    with pytest.raises(ValueError, match="two batches at least"):
        measured("snr", steps=1)
    with pytest.raises(ValueError, match="no units"):
        measured(units=())
    with pytest.raises(ValueError, match="not among the parameters"):
        measured(units=[Unit("d", "d", "weight", (("d/kernel", True),), 0)])
    with pytest.raises(MaskError):
        measured(beside=[("d/.*", "all")])


def test_table_is_kept_and_shown(tmp_path: Path) -> None:
    found = measured("taylor", channels="magnitude")
    for name in ("table.json", "table.parquet"):
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow")
        found.save(tmp_path / name)
        again = Sensitivity.load(tmp_path / name)
        assert again.units == found.units
        np.testing.assert_array_equal(again.values, found.values)
        assert (again.criterion, again.settings) == (found.criterion, found.settings)
    with pytest.raises(ValueError, match="kept as .json or .parquet"):
        found.save(tmp_path / "table.csv")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no table of sensitivities"):
        Sensitivity.load(tmp_path / "other.json")
    lines = str(found).splitlines()
    assert len(lines) == len(found.units) + 1 and "b/kernel in 0.5" in lines[6]
    assert found.markdown().count("\n") == len(found.units) + 1
    rich = pytest.importorskip("rich.console")
    console = rich.Console(record=True, width=100, file=open(tmp_path / "out.txt", "w"))
    console.print(found)
    assert "sensitivity by taylor" in console.export_text()
    console.file.close()


def test_plot_has_bars_for_weights_and_a_line_for_biases(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = measured("taylor")
    figure = found.plot(tmp_path / "plot.png")
    [axes] = figure.axes
    weights = [unit for unit in found.units if unit.kind == "weight"]
    assert len(axes.patches) == len(weights)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a/kernel", "b/kernel", "c/kernel"]
    heights = sorted(p.get_height() for p in axes.patches)
    np.testing.assert_allclose(heights, sorted(found.mean[: len(weights)]))
    [line, *_] = axes.lines
    np.testing.assert_allclose(line.get_ydata(), found.mean[len(weights) :][::-1])
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize("criterion", ["finetune", "gradnorm"])
def test_batches_may_hold_constants(criterion: str) -> None:
    def with_flag(p: Any, *batch: Any) -> jax.Array:
        *arrays, doubled = batch
        return (2 if doubled else 1) * loss(p, *arrays)

    data = [(*batch, False) for batch in batches()]
    found = sensitivity(with_flag, params(), data, criterion, **OPTIONS)
    np.testing.assert_array_equal(found.values, measured(criterion).values)
