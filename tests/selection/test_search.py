"""Search: the compiled step keeps the budget, whatever the budget is of."""

import itertools
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pockjax as pj
from experiments import networks
from pockjax.selection import BudgetError, Search, Sensitivity, Unit, units

_TX = optax.adam(0.01)
_OPTIONS: dict[str, Any] = {"rewrites": "none"}


def _sensitivity(found: tuple[Unit, ...], seed: int = 0) -> Sensitivity:
    generator = np.random.default_rng(seed)
    worth = {unit.group: generator.gamma(1.0) for unit in found}
    values = [
        (1 + 0.2 * len(unit.entries) if unit.kind == "bias" else 1)
        * worth[unit.group] * unit.ratio**0.5
        for unit in found
    ]  # fmt: skip
    return Sensitivity(found, np.array([values]), "made up")


@cache
def _mlp():
    params = networks.mlp_params(jax.random.key(0), [32, 64, 64, 8])
    x = jax.random.normal(jax.random.key(1), (64, 32))
    y = jnp.zeros((64, 8))

    def loss(params, x, y):
        return jnp.mean((networks.mlp(params, x, jax.nn.relu) - y) ** 2)

    return loss, params, (x, y), _sensitivity(units(loss, params, x, y, ratios=[1, 0.25]))


@cache
def _transformer():
    params = networks.transformer_params(jax.random.key(0), 2, 32, 128)
    x = jax.random.normal(jax.random.key(1), (8, 32, 32))

    def loss(params, x):
        return jnp.mean((networks.transformer(params, x, 4) - 1) ** 2)

    return loss, params, (x,), _sensitivity(units(loss, params, x, ratios=[1], biases="none"))


@cache
def _search(network: str, remat: bool = False) -> Search:
    loss, params, batch, sens = {"mlp": _mlp, "transformer": _transformer}[network]()
    return Search(loss, params, batch, sens, tx=_TX, remat=remat, rounds=4, **_OPTIONS)


def _recompiled(network: str, scheme: pj.Scheme) -> pj.Step:
    """A step compiled from the scheme's text alone."""
    loss, params, batch, _ = {"mlp": _mlp, "transformer": _transformer}[network]()
    scheme = pj.Scheme.parse(str(scheme))
    remat = scheme.notes.get("remat", ())
    return pj.compile(loss, pj.mask(params, scheme), _TX, params, *batch, remat=remat, **_OPTIONS)


@pytest.mark.parametrize("percent", [20, 60])
@pytest.mark.parametrize("quantity", ["memory", "extra_memory", "flops", "optimizer"])
def test_the_compiled_step_keeps_the_budget(quantity, percent):
    search = _search("mlp")
    if quantity in ("memory", "flops"):
        percent = 50 + percent / 2  # the forward pass is most of it
    found = search.find(pj.Budget(**{quantity: f"{percent}%"}))
    limit = found.scheme.notes["limits"][quantity]
    report = _recompiled("mlp", found.scheme).report
    takes = {
        "memory": report.compiled.total_bytes, "flops": report.flops,
        "optimizer": report.optimizer_bytes,
    }  # fmt: skip
    compiled = found.scheme.notes["compiled"][quantity]
    assert takes.get(quantity, compiled) == compiled <= limit
    assert found.objective == pytest.approx(_worth(search, found.units))


def _worth(search, chosen):
    values = dict(zip(search._choices.units, search._choices.values, strict=True))
    return sum(values[unit] for unit in chosen)


def test_several_bounds_at_once():
    search = _search("mlp")
    found = search.find(pj.Budget(memory="85%", flops="80%", optimizer="40%"))
    notes = found.scheme.notes
    assert set(notes["limits"]) == {"memory", "flops", "optimizer"}
    assert all(notes["compiled"][k] <= notes["limits"][k] for k in notes["limits"])


def test_more_budget_is_never_worth_less():
    objectives = [_search("mlp").find(pj.Budget(memory=f"{p}%")).objective for p in (60, 75, 90)]
    assert objectives == sorted(objectives) and objectives[0] < objectives[-1]


@pytest.mark.slow
def test_the_best_of_all_choices_is_found_where_all_can_be_compiled():
    params = networks.mlp_params(jax.random.key(0), [16, 32, 4])
    x = jax.random.normal(jax.random.key(1), (32, 16))

    def loss(params, x):
        return jnp.mean(networks.mlp(params, x, jax.nn.relu) ** 2)

    found = units(loss, params, x, ratios=[1, 0.5])
    sens = _sensitivity(found, seed=2)
    search = Search(loss, params, (x,), sens, tx=_TX, remat=False, **_OPTIONS)
    groups = [[u for u in found if u.group == g] for g in dict.fromkeys(u.group for u in found)]
    takes = {}
    for pick in itertools.product(*([None, *group] for group in groups)):
        chosen = tuple(unit for unit in pick if unit is not None)
        if chosen:
            mask = pj.union(params, chosen)
            step = pj.compile(loss, mask, _TX, params, x, **_OPTIONS)
            takes[chosen] = step.report.compiled.total_bytes
    sizes = sorted(takes.values())
    for limit in (sizes[len(sizes) // 4], sizes[len(sizes) // 2], sizes[-1]):
        best = max(_worth(search, c) for c, size in takes.items() if size <= limit)
        assert search.find(pj.Budget(memory=limit)).objective == pytest.approx(best, rel=0.1)


def test_the_smallest_budget_is_named_and_can_be_kept():
    search = _search("mlp")
    with pytest.raises(BudgetError, match="the smallest that can be kept is optimizer") as caught:
        search.find(pj.Budget(optimizer="10B"))
    message = str(caught.value)
    assert "asked for 10 B" in message and "alone" in message
    smallest = min(
        search._choices.predict([u], ()).optimizer_bytes for u in range(len(search._choices.units))
    )
    found = search.find(pj.Budget(optimizer=smallest))
    assert found.scheme.notes["compiled"]["optimizer"] == smallest
    with pytest.raises(BudgetError, match="the smallest that can be kept is memory"):
        search.find(pj.Budget(memory="2KiB"))


@pytest.mark.parametrize("solver", ["milp", "evolution"])
def test_the_same_seed_gives_the_same_scheme(solver):
    loss, params, batch, sens = _mlp()
    options: dict[str, Any] = (
        {"solver_options": {"evaluations": 8}} if solver in ("evolution", "random") else {}
    )

    def found():
        return pj.search(
            loss, params, batch, sens, budget=pj.Budget(optimizer="50%"), solver=solver, tx=_TX,
            seed=5, remat=False, **options, **_OPTIONS,
        )  # fmt: skip

    assert str(found()) == str(found())


def test_blocks_are_computed_again_where_that_makes_room():
    budget = pj.Budget(extra_memory="35%")
    plain = _search("transformer").find(budget)
    again = _search("transformer", remat=True).find(budget)
    assert not plain.remat and again.remat
    assert again.objective > plain.objective
    limit = again.scheme.notes["limits"]["extra_memory"]
    assert again.scheme.notes["compiled"]["extra_memory"] <= limit
    step = _recompiled("transformer", again.scheme)
    assert step.report.compiled == again.step.report.compiled
    roomy = _search("transformer", remat=True).find(pj.Budget(memory="200%"))
    assert not roomy.remat  # nothing is computed twice for nothing


def test_latency_is_measured():
    search = _search("mlp")
    found = search.find(pj.Budget(latency="10s", optimizer="50%"))
    compiled = found.scheme.notes["compiled"]
    assert 0 < compiled["latency"] < 10
    with pytest.raises(BudgetError, match="latency .* ms"):
        search.find(pj.Budget(latency="1us"))


def test_the_step_that_was_found_trains():
    loss, params, batch, _ = _mlp()
    found = _search("mlp").find(pj.Budget(memory="80%"))
    state = found.step.init(params)
    losses = []
    for _ in range(20):
        state, metrics = found.step(state, *batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0]


def test_the_curve_rises():
    points = _search("transformer", remat=True).pareto("memory", points=5)
    assert len(points) > 2
    costs, objectives = [p.cost for p in points], [p.objective for p in points]
    assert costs == sorted(costs) and objectives == sorted(objectives)
    assert any(p.remat for p in points)


def test_data_may_be_batches():
    loss, params, batch, sens = _mlp()
    budget = pj.Budget(optimizer="50%")
    options: dict[str, Any] = dict(budget=budget, tx=_TX, remat=False, **_OPTIONS)
    first = pj.search(loss, params, batch, sens, **options)
    assert str(first) == str(pj.search(loss, params, iter([batch, batch]), sens, **options))


def test_what_is_trained_beside_is_in_every_choice():
    loss, params, batch, sens = _mlp()
    scheme = pj.search(
        loss, params, batch, sens, budget=pj.Budget(optimizer="40%"), tx=_TX, remat=False,
        beside=[("2/.*", "all")], **_OPTIONS,
    )  # fmt: skip
    mask = pj.mask(params, scheme)
    assert mask[2] == {"kernel": True, "bias": True}
    assert not any(name.startswith("2/kernel") for name in scheme.notes["units"])
    step = pj.compile(loss, mask, _TX, params, *batch, **_OPTIONS)
    assert step.report.optimizer_bytes == scheme.notes["compiled"]["optimizer"]
    assert step.report.optimizer_bytes <= scheme.notes["limits"]["optimizer"]


def test_layers_of_a_stack_with_parts_of_their_channels():
    params = {"w": jax.random.normal(jax.random.key(0), (3, 16, 16)) / 4}
    x = jnp.ones((4, 16))

    def loss(params, x):
        return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0] ** 2)

    for ratios, layers in (((1, 0.5), 1), ((1,), 3)):
        sens = _sensitivity(units(loss, params, x, ratios=ratios))
        scheme = pj.search(loss, params, (x,), sens, budget=pj.Budget(memory="1GiB"), tx=_TX)
        assert len(scheme.notes["units"]) == layers


def test_the_smallest_budget_that_is_named_can_be_kept():
    """Amounts in the message are rounded up."""
    # Training the last bias takes no more memory than inference, which no budget is too small for.
    for quantity in ("memory", "flops", "optimizer"):
        with pytest.raises(BudgetError) as caught:
            _search("mlp").find(pj.Budget(**{quantity: "2B" if quantity != "flops" else "2FLOP"}))
        named = str(caught.value).split("can be kept is ")[1].split(" (asked")[0]
        number, unit = named.removeprefix(quantity).split()
        found = _search("mlp").find(pj.Budget(**{quantity: number + unit}))
        assert len(found.units) == 1


def test_batches_with_constants_have_extra_memory_too():
    params, x = {"w": jnp.ones((8, 4)), "b": jnp.zeros(4)}, jnp.ones((16, 8))

    def loss(params, x, squared):
        y = x @ params["w"] + params["b"]
        return jnp.mean(y**2 if squared else y)

    sens = _sensitivity(units(loss, params, x, True))
    search = Search(loss, params, (x, True), sens, tx=_TX, **_OPTIONS)
    assert search.find(pj.Budget(extra_memory="90%")).units


@pytest.mark.parametrize("worth", [np.nan, np.inf])
@pytest.mark.parametrize("solver", ["milp", "greedy"])
def test_no_search_over_what_is_not_finite(worth, solver):
    loss, params, batch, sens = _mlp()
    values = sens.values.copy()
    values[0, 1] = worth
    broken = Sensitivity(sens.units, values, "broken")
    with pytest.raises(ValueError, match=f"what '{sens.units[1].name}' is worth is"):
        pj.search(loss, params, batch, broken, budget=pj.Budget(memory="90%"), solver=solver)


def test_what_depends_on_the_mask_is_not_searched_with_plans():
    loss, params, batch, sens = _mlp()
    with pytest.raises(ValueError, match="remat and frozen_dtype"):
        Search(loss, params, batch, sens, remat=True, frozen_dtype="bfloat16")


def test_other_sensitivities_of_the_same_units_share_the_costs():
    loss, params, batch, sens = _mlp()
    search = _search("mlp")
    other = _sensitivity(sens.units, seed=1)
    budget = pj.Budget(memory="60%", optimizer="50%")
    alone = Search(loss, params, batch, other, tx=_TX, rounds=4, **_OPTIONS)
    first = str(search.find(budget).scheme)
    assert str(search.by(other).find(budget).scheme) == str(alone.find(budget).scheme) != first
    assert str(search.find(budget).scheme) == first
    with pytest.raises(ValueError, match="other units"):
        search.by(_sensitivity(sens.units[1:]))


@pytest.mark.parametrize("axes", [("in",), ("out",)])
def test_parts_between_the_smallest_and_the_whole_are_as_if_each_was_differentiated(axes):
    loss, params, batch, _ = _mlp()
    found = units(loss, params, *batch, ratios=[1, 0.5, 0.25, 0.125], axes=axes)
    choices = Search(loss, params, batch, _sensitivity(found), tx=_TX, **_OPTIONS)._choices
    between = choices._between()
    assert len(between) == 6
    masks = [choices.mask((u,)) for u in range(len(found))]
    wanted = pj.CostModel(loss, _TX, params, *batch, **_OPTIONS).predict_each(
        masks, [0] * len(masks)
    )
    for unit, one, other in zip(found, choices.predict_each(lambda n: None), wanted, strict=True):
        assert one == other, unit.name
