"""Units: found from the jaxpr, for any library, and each an exact sparse gradient."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import pockjax as pj
from pockjax import models
from pockjax._paths import flatten_with_paths
from pockjax.autodiff import differentiate, trace
from pockjax.masks import describe
from pockjax.selection import Unit, left_out, union, units
from tests.models.made import made

PyTree = Any
X = jnp.linspace(-1, 1, 24).reshape(4, 6)


@dataclass(frozen=True)
class Case:
    fun: Callable[..., Any]
    params: PyTree
    batch: tuple[Any, ...]


def plain() -> Case:
    params = {
        "table": jnp.ones((5, 6)),
        "first": jnp.ones((6, 8)),
        "scale": jnp.ones(8),
        "shift": jnp.ones(8),
        "square": jnp.ones((8, 8)),
        "heads": jnp.ones((8, 2, 4)),
        "last": jnp.ones((2, 4, 3)),
        "unused": jnp.ones(3),
        "count": jnp.arange(3),
    }

    def fun(p: PyTree, x: jax.Array) -> jax.Array:
        x = x + p["table"][jnp.arange(4) % 5 + (x[:, 0] > 9)]
        x = x @ (p["first"] * p["scale"]) + p["shift"]
        x = jnp.tanh(x) @ jnp.exp(p["square"])
        return jnp.einsum("nhk,hkc->nc", jnp.einsum("nd,dhk->nhk", x, p["heads"]), p["last"])

    return Case(fun, params, (X,))


def stacked() -> Case:
    params = {
        "up": jnp.ones((3, 6, 8)),
        "down": jnp.ones((3, 8, 6)),
        "scale": jnp.ones((3, 6)),
        "bias": jnp.ones((3, 8)),
        "pair": jnp.ones((2, 6, 6)),
    }

    def fun(p: PyTree, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: PyTree) -> tuple[jax.Array, None]:
            return x + jnp.tanh((x * w["scale"]) @ w["up"] + w["bias"]) @ w["down"], None

        layers = {k: p[k] for k in ("up", "down", "scale", "bias")}
        x, _ = lax.scan(jax.checkpoint(layer), x, layers)
        return x @ p["pair"][0] @ p["pair"][1]

    return Case(fun, params, (X,))


def recurrent() -> Case:
    params = {"input": jnp.ones((6, 5)), "state": jnp.ones((5, 5)), "bias": jnp.ones(5)}

    def fun(p: PyTree, x: jax.Array) -> jax.Array:
        def cell(h: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ p["input"] + h @ p["state"] + p["bias"]), None

        return lax.scan(cell, jnp.zeros(5), x)[0]

    return Case(fun, params, (X,))


def branches() -> Case:
    params = {"a": jnp.ones((6, 6)), "b": jnp.ones((6, 6)), "c": jnp.ones(6)}

    def fun(p: PyTree, x: jax.Array) -> jax.Array:
        x = lax.cond(x.sum() > 0, lambda x: x @ p["a"], lambda x: x @ p["b"], x)
        return jax.jit(jax.nn.relu)(x + p["c"])

    return Case(fun, params, (X,))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x))
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x[None], x[None])[0]
        return nn.Dense(2)(nn.LayerNorm()(x))


def linen() -> Case:
    model = Linen()
    return Case(model.apply, model.init(jax.random.key(0), X), (X,))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, 6, rngs=rngs)
        self.conv = nnx.Conv(6, 4, (3,), rngs=rngs)
        self.depthwise = nnx.Conv(4, 4, (3,), feature_group_count=4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        x = self.conv((x + self.embed(ids))[None])
        return self.last(self.norm(self.depthwise(x))[0])


def flax_nnx() -> Case:
    graph, params = nnx.split(Nnx(nnx.Rngs(0)))
    return Case(lambda p, *b: nnx.merge(graph, p)(*b), params, (X, jnp.arange(4)))


def equinox() -> Case:
    model = eqx.nn.MLP(6, 3, 8, 2, key=jax.random.key(0))
    return Case(lambda p, x: jax.vmap(p)(x), model, (X,))


MADE = (plain, stacked, recurrent, branches, linen, flax_nnx, equinox)


def of_model(name: str) -> Case:
    entry = models.entry(name)
    graph, params = nnx.split(nnx.eval_shape(lambda: models.load(name, weights=None)))
    batch = tuple(jax.ShapeDtypeStruct((1, *s.shape), s.dtype) for s in entry.inputs)
    return Case(lambda p, *b: nnx.merge(graph, p)(*b), params, batch)


def scalar(fun: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, *batch: jnp.sum(fun(params, *batch).astype(jnp.float32) ** 2)


def trainable(params: PyTree) -> set[str]:
    return {
        path
        for path, x in flatten_with_paths(params)[0]
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    }


def assert_covers(case: Case, found: Any) -> None:
    covered = {path for unit in found for path, _ in unit.entries}
    without = left_out(case.fun, case.params, *case.batch)
    assert covered | set(without) == trainable(case.params)
    assert not covered & set(without)
    assert len({unit.name for unit in found}) == len(found)


def choices(found: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Choices of one unit for each array, in which every unit occurs (every ratio, of a stack)."""
    arrays: dict[str, list[Unit]] = {}
    for unit in found:
        arrays.setdefault(unit.group.partition("[")[0], []).append(unit)
    for k in range(max(map(len, arrays.values()))):
        yield [members[k % len(members)] for members in arrays.values()]


@pytest.mark.parametrize("make", MADE)
def test_every_unit_is_an_exact_sparse_gradient(make: Callable[[], Case]) -> None:
    case = make()
    found = units(case.fun, case.params, *case.batch, axes=("in", "out", "heads"))
    assert_covers(case, found)
    loss = scalar(case.fun)
    primal = trace(loss, case.params, case.batch)
    arrays, rest = eqx.partition(case.params, eqx.is_inexact_array)
    dense = jax.jit(jax.grad(lambda p: loss(eqx.combine(p, rest), *case.batch)))(arrays)
    for chosen in choices(found):
        mask = union(case.params, chosen)
        joint = differentiate(primal, mask)
        assert not joint.fallbacks
        _, _, grads = jax.jit(joint.run)(joint.inputs)
        wanted = pj.pack(eqx.combine(dense, rest), mask)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, wanted
        )
        elements = sum(row.trained for row in describe(case.params, mask))
        assert elements == sum(x.size for x in jax.tree.leaves(grads))


SMALL = ("resnet20", "stories260k", "mbv2-w0.35")
LARGE = tuple(n for n in models.names() if n not in SMALL and not n.endswith("int8"))


def check_model(case: Case) -> None:
    found = units(case.fun, case.params, *case.batch, axes=("in", "heads"))
    assert_covers(case, found)
    primal = trace(scalar(case.fun), case.params, case.batch)
    # All units of one ratio at once: a fallback names its parameter all the same.
    for kind in ("in", "heads"):
        chosen = {u.group: u for u in found if u.kind == "weight" and f" {kind} " in u.name}
        biases = [u for u in found if u.kind == "bias"][-1:]
        joint = differentiate(primal, union(case.params, [*chosen.values(), *biases]))
        assert not joint.fallbacks


@pytest.mark.parametrize("name", SMALL)
def test_our_models(name: str) -> None:
    check_model(of_model(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_our_other_models(name: str) -> None:
    check_model(of_model(name))


def by_name(case: Case, **options: Any) -> dict[str, Any]:
    return {u.name: u for u in units(case.fun, case.params, *case.batch, **options)}


def test_what_the_parameters_are() -> None:
    found = by_name(plain(), axes=("in", "out", "heads"))
    assert dict(found["first in 0.5"].entries) == {"first": pj.part[:3]}
    assert dict(found["first out 0.25"].entries) == {"first": pj.part[:, :2]}
    assert dict(found["table in 0.5"].entries) == {"table": pj.part[:2]}
    assert dict(found["heads heads 0.5"].entries) == {"heads": pj.part[:, :1]}
    assert "square in 0.5" not in found  # it goes through exp first
    assert found["first"].kind == "weight" and found["first"].macs == 4 * 6 * 8
    biases = found["biases of the last 1"]
    assert [path for path, _ in biases.entries] == ["scale", "shift"]
    assert found["table"].depth < found["first"].depth < found["square"].depth


def test_layers_of_a_stack_are_units_of_their_own() -> None:
    case = stacked()
    found = by_name(case)
    assert dict(found["up[1] in 0.5"].entries) == {"up": pj.part[1:2, :3]}
    assert dict(found["pair[1]"].entries) == {"pair": pj.part[1:2]}
    assert found["up[0]"].depth < found["down[0]"].depth < found["up[1]"].depth
    assert found["up[1]"].group == found["up[1] in 0.5"].group != found["up[2]"].group
    last = dict(found["biases of the last 2"].entries)
    assert last == {"bias": pj.part[2:3], "scale": pj.part[2:3]}
    both = union(case.params, [found["up[1] in 0.5"], found["up[2] in 0.5"]])
    assert both["up"] == pj.part[1:3, :3]
    with pytest.raises(ValueError, match="is no block of it"):
        union(case.params, [found["up[1] in 0.5"], found["up[2]"]])
    with pytest.raises(ValueError, match="two of the chosen units"):
        union(case.params, [found["up[1] in 0.5"], found["up[1]"]])


def test_depthwise_kernels_are_marked_and_statistics_left_out() -> None:
    case = flax_nnx()
    found = by_name(case)
    assert found["depthwise/kernel"].depthwise and not found["conv/kernel"].depthwise
    assert dict(found["depthwise/kernel in 0.5"].entries) == {"depthwise/kernel": pj.part[:, :, :2]}
    without = left_out(case.fun, case.params, *case.batch)
    assert set(without) == {"norm/mean", "norm/var"}
    assert set(left_out(*(lambda c: (c.fun, c.params, *c.batch))(linen()))) == {
        "batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var",
    }  # fmt: skip


def test_heads_before_and_after_the_product() -> None:
    graph, params = nnx.split(made(lambda: models.load("stories260k", weights=None)))
    ids = jnp.zeros((1, 4), jnp.int32)
    found = {
        u.name: u for u in units(lambda p, x: nnx.merge(graph, p)(x), params, ids, axes=("heads",))
    }
    query = found["layers/0/attention/query/kernel heads 0.5"]
    assert (query.axis, query.grain, query.ratio) == (1, 8, 0.5)
    output = found["layers/0/attention/output/kernel heads 0.5"]
    assert (output.axis, output.grain) == (0, 8)


def test_what_may_be_asked_for() -> None:
    case = plain()
    assert set(by_name(case, among=[("first", "all")], ratios=[1])) == {"first"}
    assert (
        "not among"
        in left_out(case.fun, case.params, *case.batch, among=[("first", "all")])["last"]
    )
    each = by_name(case, biases="each", norms=False)
    assert dict(each["biases shift"].entries) == {"shift": True}
    assert not [u for u in by_name(case, biases="none").values() if u.kind == "bias"]
    with pytest.raises(ValueError, match="a ratio must be"):
        by_name(case, ratios=[0])
    with pytest.raises(ValueError, match="axes must be among"):
        by_name(case, axes=("inn",))
    with pytest.raises(ValueError, match="biases must be"):
        by_name(case, biases="some")
