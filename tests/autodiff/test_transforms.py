"""The sparse gradient is ordinary JAX: jitted, batched, looped over and differentiated again."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

import pockjax as pj
from tests.autodiff.oracle import compare, dense
from tests.autodiff.programs import (
    Program,
    plain_layers,
    programs,
    reverse_only,
    scans,
    wrapped_layers,
)
from tests.autodiff.test_exact import check_all

EXAMPLES = 12


def some_programs(*, forward: bool = False) -> st.SearchStrategy[Program]:
    """Small programs of any kind; ``forward``: differentiable in forward mode too."""
    plain = plain_layers()
    layer = st.one_of(plain, plain, wrapped_layers(plain), scans(plain))
    if forward:
        layer = layer.filter(lambda layer: not reverse_only(layer))
    return programs(layer, dtypes=("float32", "float64"))


def gradients(p: Program) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The packed gradient: ours, and the dense one cut."""

    def loss(*args: Any) -> Any:
        return p.fun(*args)[0] if p.has_aux else p.fun(*args)

    def expected(*args: Any) -> Any:
        return dense(loss, p.mask)(*args)[1]

    return pj.grad(loss, p.mask), expected


def same(
    p: Program, transform: Callable[[Callable[..., Any]], Callable[..., Any]], *args: Any
) -> None:
    actual, expected = gradients(p)
    compare(transform(actual), transform(expected), *args)


def directions(tree: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def check_vmap(data: st.DataObject) -> None:
    p = data.draw(some_programs())
    over_params = data.draw(st.booleans())
    with p.precision():
        params, x, ids = p.inputs()
        xs, idss = jnp.stack([x, -x, x / 2]), jnp.stack([ids, ids + 1, -ids])
        if over_params:
            params = jax.tree.map(lambda w: jnp.stack([w, w / 2, -w]), params)
        axes = (0 if over_params else None, 0, 0)
        same(p, lambda g: jax.vmap(g, axes), params, xs, idss)


def check_jvp_of_grad(data: st.DataObject) -> None:
    p = data.draw(some_programs(forward=True))
    with p.precision():
        params, x, ids = p.inputs()

        def transform(g: Callable[..., Any]) -> Callable[..., Any]:
            def derivative(params: Any, x: Any, ids: Any) -> Any:
                tangents = directions((params, x), 0)
                return jax.jvp(lambda p, x: g(p, x, ids), (params, x), tangents)

            return derivative

        same(p, transform, params, x, ids)


def inner_product(grads: Any) -> Any:
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(directions(grads, 1)), strict=True)
    return sum((jnp.sum(a * b).astype(jnp.float32) for a, b in pairs), jnp.float32(0))


def check_grad_of_grad(data: st.DataObject) -> None:
    p = data.draw(some_programs())
    with p.precision():

        def transform(g: Callable[..., Any]) -> Callable[..., Any]:
            return jax.grad(lambda *args: inner_product(g(*args)), argnums=(0, 1))

        same(p, transform, *within(*p.inputs()))


def within(params: Any, x: jax.Array, ids: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
    """The inputs with ids in range.

    Out of it, a gather that promises to be in range reads the nearest entry, and its gradient drops
    what it read; JAX differentiates that as if it had not been dropped, which no difference
    quotient confirms.
    """
    return params, x, ids % 3


def check_sparse_grad_of_sparse_grad(data: st.DataObject) -> None:
    p = data.draw(some_programs())
    with p.precision():
        actual, expected = gradients(p)
        compare(
            pj.grad(lambda *args: inner_product(actual(*args)), p.mask),
            lambda *args: dense(lambda *args: inner_product(expected(*args)), p.mask)(*args)[1],
            *within(*p.inputs()),
        )


def check_training_loop(data: st.DataObject) -> None:
    p = data.draw(some_programs())
    with p.precision():

        def transform(g: Callable[..., Any]) -> Callable[..., Any]:
            def train(params: Any, x: Any, ids: Any) -> Any:
                def step(params: Any, x: Any) -> Any:
                    grads = g(params, x, ids)
                    updates = jax.tree.map(lambda g: -g / 8, grads)
                    return pj.apply_updates(params, updates, p.mask), grads

                return lax.scan(step, params, jnp.stack([x, -x]))

            return train

        same(p, transform, *p.inputs())


def check_remat_of_grad(data: st.DataObject) -> None:
    p = data.draw(some_programs())
    with p.precision():
        same(p, lambda g: jax.checkpoint(g), *p.inputs())


@pytest.mark.parametrize(
    "check",
    [
        check_vmap,
        check_jvp_of_grad,
        check_grad_of_grad,
        check_sparse_grad_of_sparse_grad,
        check_training_loop,
        check_remat_of_grad,
    ],
)
def test_random(check: Callable[[st.DataObject], None]) -> None:
    check_all(check, EXAMPLES)


# --- the cases that a wrong mechanism gets wrong -------------------------------------------------


def mlp(params: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ params["w0"] + params["b0"])
    return jnp.sum(jnp.sin(h @ params["w1"]))


def mlp_params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"w0": (3, 4), "b0": (4,), "w1": (4, 2)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


MLP_MASKS = [
    {"w0": pj.part[:, 1:3], "b0": False, "w1": pj.part[[3, 0]]},
    {"w0": pj.part[::2, [3, 1]], "b0": pj.part[:2], "w1": True},
    {"w0": True, "b0": True, "w1": pj.part[1:, :1]},
]


@pytest.mark.parametrize("mask", MLP_MASKS, ids=str)
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_hessian_of_two_masked_layers(mask: Any, outer: Callable[..., Any]) -> None:
    # A rule that forgets delta when it is transposed gets the mixed blocks wrong, in one order.
    params, x = mlp_params(), jnp.linspace(-1, 1, 6).reshape(2, 3)

    def packed_hessian(params: Any) -> Any:
        packed = pj.pack(params, mask)

        def of_packed(packed: Any) -> Any:
            return pj.grad(mlp, mask)(pj.unpack(params, packed, mask), x)

        return outer(of_packed)(packed)

    def expected(params: Any) -> Any:
        packed = pj.pack(params, mask)

        def of_packed(packed: Any) -> Any:
            return mlp(pj.unpack(params, packed, mask), x)

        return jax.hessian(of_packed)(packed)

    compare(packed_hessian, expected, params, ulps=16)


def test_third_derivative() -> None:
    params, x, mask = mlp_params(), jnp.ones((2, 3)), MLP_MASKS[0]

    def derivative(g: Callable[..., Any], h: Callable[..., Any]) -> Callable[..., Any]:
        def once(params: Any) -> Any:
            return inner_product(g(mlp, params))

        def twice(params: Any) -> Any:
            return inner_product(h(once, params))

        return lambda params: g(twice, params)

    def ours(fun: Callable[..., Any], params: Any) -> Any:
        return pj.grad(lambda p: fun(p, x) if fun is mlp else fun(p), mask)(params)

    def theirs(fun: Callable[..., Any], params: Any) -> Any:
        return pj.pack(jax.grad(lambda p: fun(p, x) if fun is mlp else fun(p))(params), mask)

    compare(derivative(ours, ours), derivative(theirs, theirs), params, ulps=16)


# --- traced indices ------------------------------------------------------------------------------


def test_traced_indices_select_again_without_tracing_again() -> None:
    params, x = mlp_params(), jnp.ones((2, 3))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def grads(params: Any, rows: jax.Array, columns: jax.Array) -> Any:
        mask = {"w0": pj.part[rows, columns], "b0": pj.part[columns], "w1": False}
        return pj.grad(mlp, mask)(params, x)

    for rows, columns in [([0, 2], [1]), ([2, 1], [3]), ([1, 0], [0])]:
        found = grads(params, jnp.array(rows), jnp.array(columns))
        full = jax.grad(mlp)(params, x)
        np.testing.assert_allclose(found["w0"], full["w0"][np.ix_(rows, columns)], rtol=1e-6)
        np.testing.assert_allclose(found["b0"], full["b0"][np.array(columns)], rtol=1e-6)


def test_a_mask_is_an_argument_like_any_other() -> None:
    params, x = mlp_params(), jnp.ones((2, 3))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def grads(mask: Any, params: Any) -> Any:
        return pj.grad(mlp, {"w0": mask, "b0": False, "w1": False})(params, x)

    for columns in ([1, 3], [2, 0]):
        found = grads(pj.part[:, jnp.array(columns)], params)["w0"]
        expected = jax.grad(mlp)(params, x)["w0"][:, np.array(columns)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_traced_indices_can_be_batched() -> None:
    params, x = mlp_params(), jnp.ones((2, 3))
    choices = jnp.array([[0, 3], [2, 1], [1, 0]])

    def found(params: Any, choices: jax.Array) -> Any:
        def one(columns: jax.Array) -> Any:
            mask = {"w0": pj.part[:, columns], "b0": pj.part[columns], "w1": pj.part[columns]}
            return pj.grad(mlp, mask)(params, x)

        return jax.vmap(one)(choices)

    def expected(params: Any, choices: jax.Array) -> Any:
        full = jax.grad(mlp)(params, x)
        return {
            "w0": jax.vmap(lambda c: full["w0"][:, c])(choices),
            "b0": full["b0"][choices],
            "w1": full["w1"][choices],
        }

    compare(found, expected, params, choices)


# --- remat ---------------------------------------------------------------------------------------


def count(jaxpr: Any, primitive: str) -> int:
    """How often a primitive stands in a jaxpr and the jaxprs inside it."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name == primitive
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(inner, "eqns"):
                total += count(inner, primitive)
    return total


@pytest.mark.parametrize("name", ["nothing_saveable", "dots_saveable", "everything_saveable"])
def test_remat_policies_are_kept(name: str) -> None:
    policy = getattr(jax.checkpoint_policies, name)
    params, x = mlp_params(), jnp.ones((2, 3))
    fun = jax.checkpoint(mlp, policy=policy)
    mask = {"w0": pj.part[:, :2], "b0": False, "w1": pj.part[:1]}
    sparse = jax.make_jaxpr(pj.grad(fun, mask))(params, x)
    full = jax.make_jaxpr(jax.grad(lambda p, x: fun({**p, "b0": params["b0"]}, x)))(params, x)
    assert count(sparse, "dot_general") == count(full, "dot_general")
    compare(pj.value_and_grad(fun, mask), dense(fun, mask), params, x)


# --- what a function closes over -----------------------------------------------------------------


def test_closed_over_values_can_be_differentiated_and_batched() -> None:
    params, x = mlp_params(), jnp.ones((2, 3))
    mask = MLP_MASKS[1]

    def penalty(grad: Callable[..., Any]) -> Callable[..., Any]:
        def of(scale: jax.Array) -> jax.Array:
            return inner_product(grad(lambda p: mlp(p, x * scale) * scale, params))

        return jax.vmap(jax.grad(of))

    def by_vjp(fun: Callable[..., Any], params: Any) -> Any:
        out, vjp_fn = pj.vjp(fun, mask, params)
        return vjp_fn(jnp.ones_like(out))

    def densely(fun: Callable[..., Any], params: Any) -> Any:
        return pj.pack(jax.grad(fun)(params), mask)

    scales = jnp.array([0.5, 1.0, -2.0])
    compare(penalty(lambda fun, p: pj.grad(fun, mask)(p)), penalty(densely), scales)
    compare(penalty(by_vjp), penalty(densely), scales)


def test_mutable_arrays_before_anything_trained() -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        ref = jax.new_ref(x)
        ref[0] = jnp.sin(x[1])
        return jnp.mean((ref[...] @ params["frozen"] @ params["trained"]) ** 2)

    x, w = jnp.arange(64.0).reshape(4, 16) / 64, jnp.ones((16, 16)) / 16
    params = {"frozen": w, "trained": w}
    grads = pj.grad(loss, {"frozen": False, "trained": True})(params, x)
    chex.assert_trees_all_close(grads["trained"], jax.grad(loss)(params, x)["trained"])
