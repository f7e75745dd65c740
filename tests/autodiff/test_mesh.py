"""Four devices: sharding left to the compiler, sharding in types, and shard_map."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pockjax as pj
from tests.autodiff.oracle import QUICK

PyTree = Any

MASKS = {
    "whole shards": {"w": pj.part[:, :4], "b": pj.part[4:], "v": pj.part[:4], "e": pj.part[:4]},
    "across shards": {"w": pj.part[1:, 1:4], "b": pj.part[::3], "v": pj.part[:3, 1:2], "e": True},
    "indices": {"w": pj.part[:, [5, 1]], "b": False, "v": pj.part[[5, 1, 0]], "e": pj.part[[6, 2]]},
    "other axis": {"w": pj.part[[2, 0]], "b": True, "v": pj.part[:, 1:], "e": pj.part[:, 2:]},
    "traced": {
        "w": pj.part[:, jnp.array([7, 2])],
        "b": pj.part[jnp.array([3])],
        "v": pj.part[jnp.array([6, 0, 1])],
        "e": pj.part[jnp.array([1, 7])],
    },
    "leaves": {"w": False, "b": True, "v": True, "e": False},
}
SPECS = {"w": P(None, "model"), "b": P("model"), "v": P("model", None), "e": P("model", None)}


def params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 8), "b": (8,), "v": (8, 4), "e": (8, 4)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def batch() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)


def local(params: PyTree, x: jax.Array) -> jax.Array:
    """The function, of arrays on one device."""
    h = jnp.tanh(x @ params["w"] + params["b"])
    h = jnp.sin(h @ params["v"])
    return jnp.sum(jnp.sin(h @ params["e"].T))


def left_to_the_compiler(params: PyTree, x: jax.Array) -> jax.Array:
    w = lax.with_sharding_constraint(params["w"], P("data", "model"))
    h = jnp.tanh(x @ w + params["b"])
    h = lax.with_sharding_constraint(h, P("data", "model"))
    h = jnp.sin(h @ params["v"])
    return jnp.sum(jnp.sin(h @ params["e"].T))


def in_types(params: PyTree, x: jax.Array) -> jax.Array:
    w = jax.sharding.reshard(params["w"], P(None, "model"))
    h = jnp.tanh(jnp.matmul(x, w, out_sharding=P("data", "model")) + params["b"])
    h = jnp.sin(jnp.matmul(h, params["v"], out_sharding=P("data", None)))
    return jnp.sum(jnp.sin(jnp.matmul(h, params["e"].T, out_sharding=P("data", "model"))))


def per_device(params: PyTree, x: jax.Array) -> jax.Array:
    """Tensor parallel layers written by hand."""

    def one(params: PyTree, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ params["w"] + params["b"])
        h = jnp.sin(lax.psum(h @ params["v"], "model"))
        return lax.psum(jnp.sum(jnp.sin(h @ params["e"].T)), ("data", "model"))

    return jax.shard_map(one, in_specs=(SPECS, P("data")), out_specs=P())(params, x)


def data_parallel(params: PyTree, x: jax.Array) -> jax.Array:
    """Every device holds all weights: parts go inside on any axis."""

    def one(params: PyTree, x: jax.Array) -> jax.Array:
        return lax.psum(local(params, x), "data")

    return jax.shard_map(one, in_specs=(P(), P("data")), out_specs=P())(params, x)


def over_one_axis(params: PyTree, x: jax.Array) -> jax.Array:
    """A map over one of the mesh's axes only, without checks of what varies."""

    def one(params: PyTree, x: jax.Array) -> jax.Array:
        return lax.psum(local(params, x), "data")

    mapped = jax.shard_map(
        one, in_specs=(P(), P("data")), out_specs=P(), axis_names={"data"}, check_vma=False
    )
    return jax.jit(mapped)(params, x)


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Iterator[AxisType]:
    with jax.set_mesh(mesh_of(request.param)):
        yield request.param


def placed(tree: PyTree, specs: PyTree) -> PyTree:
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def assert_close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


FUNCTIONS = [
    (AxisType.Auto, left_to_the_compiler, SPECS),
    (AxisType.Auto, per_device, SPECS),
    (AxisType.Auto, data_parallel, dict.fromkeys(SPECS, P())),
    (AxisType.Auto, over_one_axis, dict.fromkeys(SPECS, P())),
    (AxisType.Explicit, in_types, SPECS),
    (AxisType.Explicit, per_device, SPECS),
    (AxisType.Explicit, data_parallel, dict.fromkeys(SPECS, P())),
]


def by_vjp(fun: Callable[..., Any], mask: PyTree) -> Callable[..., Any]:
    def value_and_grad(params: PyTree, x: jax.Array) -> Any:
        value, vjp_fn = pj.vjp(fun, mask, params, x)
        return value, vjp_fn(jnp.ones_like(value))

    return value_and_grad


@pytest.mark.parametrize(
    ("name", "transform"),
    [*((name, pj.value_and_grad) for name in MASKS), ("other axis", by_vjp)],
    ids=[*MASKS, "vjp"],
)
@pytest.mark.parametrize(
    ("kind", "fun", "specs"), FUNCTIONS, ids=[f"{k.name}-{f.__name__}" for k, f, _ in FUNCTIONS]
)
def test_sharded_gradients(
    kind: AxisType, fun: Callable[..., Any], specs: PyTree, name: str, transform: Any
) -> None:
    mask = MASKS[name]
    with jax.set_mesh(mesh_of(kind)):
        sharded, x = placed(params(), specs), placed(batch(), P("data", None))
        value, grads = jax.jit(transform(fun, mask), compiler_options=QUICK)(sharded, x)
    wanted, full = jax.value_and_grad(local)(jax.tree.map(jnp.asarray, params()), batch())
    assert_close(value, wanted)
    wanted = pj.pack(jax.tree.map(np.asarray, full), mask)
    jax.tree.map(assert_close, grads, wanted)


def squared_norm(tree: PyTree) -> jax.Array:
    return jnp.sum(jnp.stack([jnp.sum(x * x) for x in jax.tree.leaves(tree)]))


def test_second_derivative_on_a_mesh(kind: AxisType) -> None:
    fun = left_to_the_compiler if kind == AxisType.Auto else in_types
    mask = MASKS["across shards"]

    def curvature(fun: Callable[..., Any]) -> Callable[..., Any]:
        def of(params: PyTree, x: jax.Array) -> jax.Array:
            grads = pj.grad(fun, mask)(params, x)
            return squared_norm(grads)

        return pj.grad(of, mask)

    sharded, x = placed(params(), SPECS), placed(batch(), P("data", None))
    found = jax.jit(curvature(fun), compiler_options=QUICK)(sharded, x)

    def expected(params: PyTree, x: jax.Array) -> jax.Array:
        grads = pj.pack(jax.grad(local)(params, x), mask)
        return squared_norm(grads)

    plain = jax.tree.map(jnp.asarray, params())
    wanted = pj.pack(jax.tree.map(np.asarray, jax.grad(expected)(plain, batch())), mask)
    jax.tree.map(assert_close, found, wanted)


def test_packed_trees_on_a_mesh(kind: AxisType) -> None:
    sharded = placed(params(), SPECS)
    for mask in MASKS.values():
        packed = pj.pack(sharded, mask)
        back = pj.unpack(jax.tree.map(jnp.zeros_like, sharded), packed, mask)
        wanted = pj.unpack(jax.tree.map(np.zeros_like, params()), pj.pack(params(), mask), mask)
        jax.tree.map(np.testing.assert_array_equal, back, wanted)
        assert all(back[name].sharding == sharded[name].sharding for name in back)
