"""What is done around matrix products: equal to rounding, and seen in the jaxpr."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import pockjax as pj
from pockjax._compat import Literal, shape_of, subjaxprs
from tests.rewrites.convolutions import normal


def rewrite(fun):
    return pj.rewrite(fun, "cpu", measure=False)


def equations(fun, *args):
    """All equations of a function, at any depth."""

    def inside(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn
            for inner in subjaxprs(eqn):
                yield from inside(inner)

    return list(inside(jax.make_jaxpr(fun)(*args)))


def named(fun, *args, name="dot_general"):
    return [eqn for eqn in equations(fun, *args) if eqn.primitive.name == name]


def array(*shape, seed=0, dtype=jnp.float32):
    return normal(jax.ShapeDtypeStruct(shape, dtype), seed)


def check(found, expected, digits=2e-5):
    def close(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=digits * max(1, np.abs(b).max(initial=0)))

    jax.tree.map(close, found, expected)


def attention(style, query, key, value, bias):
    """Three ways that people write it."""
    if style == "jax":
        return jax.nn.dot_product_attention(query, key, value, bias=bias)
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    root = query.shape[-1] ** 0.5
    if style == "early":
        scores = jnp.einsum("bqhd,bkhd->bhqk", query / root, key) + bias
    else:
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / root + bias
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


@st.composite
def heads(draw):
    """Shapes of attention, axes of size one among them."""
    few = st.integers(1, 3)
    batch, queries, keys, shared, group, head = (draw(few) for _ in range(6))
    dtype = draw(st.sampled_from([jnp.float32, jnp.float32, jnp.float64, jnp.bfloat16]))
    query = (batch, queries, shared * group, head)
    key = (batch, keys, shared, head)
    bias = draw(st.sampled_from([(batch, 1, 1, keys), (1, 1, queries, keys), (1, 1, 1, 1)]))
    return draw(st.sampled_from(["jax", "early", "late"])), query, key, bias, dtype


@settings(max_examples=30, deadline=None)
@given(heads())
def test_attention_and_its_gradients(drawn):
    style, query, key, bias, dtype = drawn
    with jax.enable_x64(dtype == jnp.float64):
        shapes = (query, key, key, bias)
        args = [array(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]

        def loss(*args):
            return jnp.sum(jnp.sin(attention(style, *args)))

        digits = 16 * float(jnp.finfo(dtype).eps)
        fun = jax.value_and_grad(loss, (0, 1, 2, 3))
        check(jax.jit(rewrite(fun))(*args), jax.jit(fun)(*args), digits)


@pytest.mark.parametrize("style", ["jax", "early", "late"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        jax.grad,
        lambda f: jax.vmap(f, (0, None, None, None)),
        lambda f: lambda *args: jax.jvp(f, args, args),
        lambda f: jax.grad(lambda q, k, v, b: jnp.sum(jax.grad(f, 1)(q, k, v, b) ** 2)),
        lambda f: jax.checkpoint(f),
        lambda f: lambda q, k, v, b: lax.scan(lambda c, x: (c, f(x, k, v, b)), 0, q)[1],
    ],
    ids=["value", "grad", "vmap", "jvp", "second order", "checkpoint", "scan"],
)
def test_transforms_of_attention(style, transform):
    args = [array(2, 6, 3, 4), array(2, 5, 3, 4), array(2, 5, 3, 4), array(2, 1, 1, 5)]

    def loss(query, key, value, bias):
        query = query if query.ndim == 4 else jnp.stack([query, query])
        return jnp.sum(attention(style, query, key, value, bias) ** 2)

    gradient = jax.grad(loss, 1)
    for fun in (loss, lambda *args: jnp.sum(gradient(*args) ** 2)):
        check(transform(rewrite(fun))(*args), transform(fun)(*args), 1e-4)


def test_products_of_attention_have_no_unit_axes():
    args = [array(2, 6, 3, 4), array(2, 5, 3, 4), array(2, 5, 3, 4), array(2, 1, 1, 5)]

    def loss(*args):
        return jnp.sum(attention("jax", *args))

    gradient = jax.grad(loss, (0, 1, 2))

    def unit_axes(fun):
        return sum(1 in shape_of(a) for eqn in named(fun, *args) for a in eqn.invars)

    assert unit_axes(gradient) > 0
    assert unit_axes(rewrite(gradient)) == 0


def test_scores_are_not_scaled():
    """Neither they nor their cotangents, which are larger than queries and keys."""
    query, key = array(2, 16, 3, 4), array(2, 16, 3, 4, seed=1)

    def loss(query, key):
        return jnp.sum(jnp.einsum("bqhd,bkhd->bhqk", query, key) * 0.25 % 1.0)

    gradient = jax.grad(loss, (0, 1))
    scores = 2 * 3 * 16 * 16

    def scaled(fun):
        sizes = []
        for eqn in named(fun, query, key, name="mul"):
            if any(isinstance(a, Literal) for a in eqn.invars):
                sizes.append(eqn.outvars[0].aval.size)
        return sizes

    assert scores in scaled(gradient)
    assert scores not in scaled(rewrite(gradient))
    check(rewrite(gradient)(query, key), gradient(query, key))


@pytest.mark.parametrize(
    ("fun", "left"),
    [
        (lambda a, b: (0.5 * (a @ b), None), False),
        (lambda a, b: ((a @ b) / 3.0, None), False),
        (lambda a, b: ((y := a @ b) * 0.5, y), True),  # the product is read elsewhere
        (lambda a, b: ((x := a.T * 0.5).T @ b, x), True),  # so is the scale
        (lambda a, b: ((b.T * 0.5) @ a.T, None), True),  # nothing is smaller
        (lambda a, b: (0.5 * ((a * 2.0) @ b) - 1.0, None), False),
        (lambda a, b: ((a @ b) * a[0, 0], None), True),  # no number that is known
    ],
)
def test_where_scales_stand(fun, left):
    a, b = array(9, 2), array(2, 8, seed=1)
    check(rewrite(fun)(a, b), fun(a, b))
    before, after = (
        [(e.primitive.name, e.outvars[0].aval.shape) for e in equations(f, a, b)]
        for f in (fun, rewrite(fun))
    )
    assert (before == after) == left


def test_scales_behind_products():
    """Two operands of one product, or twice the same, are scaled after it."""
    big, other = array(2, 50), array(50, 3, seed=1)

    def fun(x, y):
        z = x * 0.25
        return (x * 0.5) @ (y / 3.0), lax.dot_general(z, z, (((1,), (1,)), ((), ())))

    check(rewrite(fun)(big, other), fun(big, other))
    sizes = [e.outvars[0].aval.size for e in equations(rewrite(fun), big, other)]
    assert max(sizes) < big.size


@pytest.mark.parametrize("scale", [jnp.inf, 0.0, 1e-30, 1e30])
def test_scales_that_a_product_would_not_bear(scale):
    """Zero times infinity is no number, and a large product without its small scale overflows."""
    a, b = jnp.asarray([[1.0, 0.0]] * 9), jnp.full((2, 8), 1e20)

    def fun(a, b):
        return (a @ b) * scale, ((c := a.T * scale).T @ b, b.T @ c)

    found, expected = rewrite(fun)(a, b), fun(a, b)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_half_precision_is_scaled_where_it_was():
    a, b = array(9, 2, dtype=jnp.bfloat16), array(2, 8, dtype=jnp.bfloat16)

    def fun(a, b):
        return (a @ b) * 0.3

    assert str(jax.make_jaxpr(rewrite(fun))(a, b)) == str(jax.make_jaxpr(fun)(a, b))


def test_the_smaller_operand_is_transposed():
    """As in the gradient of keys: scores, transposed, times queries."""
    scores, query = array(2, 3, 16, 16), array(2, 3, 16, 4, seed=1)

    def fun(scores, query):
        return lax.dot_general(scores, query, (((2,), (2,)), ((0, 1), (0, 1))))

    [product] = named(rewrite(fun), scores, query)
    assert [shape_of(a) for a in product.invars] == [query.shape, scores.shape]
    check(rewrite(fun)(scores, query), fun(scores, query))
    # What lies as it is needed, or is the smaller one, is left alone.
    for dims in [(((3,), (2,)), ((0, 1), (0, 1))), (((1,), (1,)), ((0,), (0,)))]:
        given = [scores, query] if len(dims[1][0]) == 2 else [query[0], scores[0]]

        def other(a, b, dims=dims):
            return lax.dot_general(a, b, dims)

        assert str(jax.make_jaxpr(rewrite(other))(*given)) == str(jax.make_jaxpr(other)(*given))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_gradients_of_taken_numbers(data):
    """One index or more for each row; negative ones, and such that are out of bounds."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    axis = data.draw(st.integers(0, len(shape) - 1))
    count = data.draw(st.sampled_from([1, 1, 1, 2]))
    mode = data.draw(st.sampled_from(["fill", "clip", "promise_in_bounds"]))
    reach = (0, shape[axis]) if mode == "promise_in_bounds" else (-6, 7)
    generator = np.random.default_rng(0)
    where = [count if i == axis else n for i, n in enumerate(shape)]
    index = jnp.asarray(generator.integers(*reach, where))
    x = array(*shape)

    def loss(x):
        taken = jnp.take_along_axis(x, index, axis, mode=mode)
        return jnp.sum(jnp.where(jnp.isnan(taken), 0, taken) ** 2) + jnp.sum(x)

    gradient = jax.grad(loss)
    check(jax.jit(rewrite(gradient))(x), gradient(x))
    if count == 1 and mode != "clip":
        assert not named(rewrite(gradient), x, name="scatter-add")


def test_the_gradient_of_a_cross_entropy_scatters_nothing():
    logits, labels = array(2, 5, 7), jnp.arange(10).reshape(2, 5) % 7

    def loss(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = jax.grad(loss)
    assert named(gradient, logits, name="scatter-add")
    assert not named(rewrite(gradient), logits, name="scatter-add")
    check(rewrite(gradient)(logits), gradient(logits))
    # Rows that several indices may share are added up as they were.
    table = array(7, 3)
    lookup = jax.grad(lambda table: jnp.sum(table[labels] ** 2))
    assert named(rewrite(lookup), table, name="scatter-add")
    check(rewrite(lookup)(table), lookup(table))


def test_indices_of_eight_bits_along_a_longer_axis():
    index = jnp.asarray([[5], [100]], jnp.int8)
    numbers = lax.ScatterDimensionNumbers((), (1,), (1,), (0,), (0,))

    def fun(updates):
        return lax.scatter_add(jnp.zeros((2, 300)), index, updates, numbers, mode="drop")

    updates = jnp.ones(2)
    assert not named(rewrite(fun), updates, name="scatter-add")
    check(rewrite(fun)(updates), fun(updates))


@pytest.mark.parametrize("loop", ["scan", "while", "fori", "cond"])
def test_mutable_arrays(loop):
    def fun(x):
        ref = jax.new_ref(x)

        def double(*_):
            ref[0] = ref[0] * 2

        if loop == "scan":
            lax.scan(lambda c, i: (double() or c, None), 0, jnp.arange(3))
        elif loop == "while":
            lax.while_loop(lambda c: c < 3, lambda c: double() or c + 1, 0)
        elif loop == "fori":
            lax.fori_loop(0, 3, lambda i, c: double() or c, 0)
        else:
            lax.cond(x[0] > 0, double, lambda: None)
        return ref[...] + jnp.einsum("bik,bkj->bij", x[None, None], x[None, :, None]).sum()

    x = jnp.arange(1.0, 4.0)
    for transform in (lambda f: f, jax.jit):
        check(transform(rewrite(fun))(x), fun(x))


def test_tokens():
    def fun(x):
        lax.create_token(x)
        return jnp.einsum("bik,bkj->bij", x, x)

    check(rewrite(fun)(array(1, 3, 3)), fun(array(1, 3, 3)))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_gradients_of_pooling(data):
    """Equal numbers, windows with gaps and overlaps, padding, and nothing but minus infinity."""
    rank = data.draw(st.integers(1, 3))
    size = st.integers(1, 3)
    window, strides = (data.draw(st.lists(size, min_size=rank, max_size=rank)) for _ in range(2))
    shape = [w + data.draw(st.integers(0, 4)) for w in window]
    pad = data.draw(st.sampled_from(["SAME", "VALID", [(1, 1)] * rank]))
    start, pick = data.draw(st.sampled_from([(-jnp.inf, lax.max), (jnp.inf, lax.min)]))
    x = jnp.asarray(np.random.default_rng(0).integers(-2, 3, shape), jnp.float32)
    x = jnp.where(x == data.draw(st.integers(-2, 2)), start, x)

    def pool(x):
        return lax.reduce_window(x, start, pick, window, strides, pad)

    ct = array(*jax.eval_shape(pool, x).shape)

    def gradient(x, ct):
        return jax.vjp(pool, x)[1](ct)[0]

    check(jax.jit(rewrite(gradient))(x, ct), jax.jit(gradient)(x, ct))
    assert not named(rewrite(gradient), x, ct, name="select_and_scatter_add")
