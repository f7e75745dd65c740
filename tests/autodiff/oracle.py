"""What a sparse gradient is compared with: JAX's own dense gradient, cut to the mask."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pockjax.masks import pack

PyTree = Any

# Tests run their programs once or twice: compiling them fast is what counts.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def dense(fun: Callable[..., Any], mask: PyTree, has_aux: bool = False) -> Callable[..., Any]:
    """``jax.value_and_grad`` of all parameters, then the slice: exact, and what nobody wants."""

    def value_and_grad(params: PyTree, *args: Any) -> Any:
        value, grads = jax.value_and_grad(fun, has_aux=has_aux)(params, *args)
        return value, pack(grads, mask)

    return value_and_grad


def compare(
    actual: Callable[..., PyTree], expected: Callable[..., PyTree], *args: Any, ulps: float = 8
) -> float:
    """Asserts that two functions are equal to rounding, in one compiled program.

    How much rounding can matter is measured: by how much does the expected result change when
    every input changes by one rounding? Returns the largest error in these units.
    """

    def both(*args: Any) -> Any:
        return actual(*args), expected(*args)

    compiled = jax.jit(both, compiler_options=QUICK).lower(*args).compile()
    found, wanted = compiled(*args)
    _, nudged = compiled(*_nudged(args))
    return assert_close(found, wanted, nudged, epsilon(args), ulps=ulps)


def epsilon(*trees: PyTree) -> float:
    """Rounding error of the coarsest dtype in some trees."""
    dtypes = [x.dtype for x in jax.tree.leaves(trees) if _is_inexact(x)]
    return max((float(jnp.finfo(d).eps) for d in dtypes), default=0.0)


def assert_close(
    actual: PyTree, expected: PyTree, nudged: PyTree, eps: float, *, ulps: float = 8
) -> float:
    """Asserts equality up to a few roundings, and returns how many they were.

    The scale of a leaf is its largest element (elements are sums of terms as large as those of
    their neighbours, however small the sum came out) times ``eps``, plus what a nudge of the inputs
    changes.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = zip(*map(jax.tree.leaves, (actual, expected, nudged)), strict=True)
    roundings = [0.0]
    for i, (a, b, c) in enumerate(leaves):
        assert a.shape == b.shape and a.dtype == b.dtype, (i, a, b)
        if not _is_inexact(a):
            np.testing.assert_array_equal(a, b)
            continue
        wide = np.complex128 if jnp.iscomplexobj(a) else np.float64
        a, b, c = (np.asarray(x).astype(wide) for x in (a, b, c))
        assert np.array_equal(np.isfinite(a), np.isfinite(b)), (i, a, b)
        a, b, c = (np.where(np.isfinite(x), x, 0) for x in (a, b, c))
        scale = eps * np.abs(b).max(initial=0) + np.abs(b - c).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=ulps * scale, err_msg=f"leaf {i}")
        if scale:
            roundings.append(float(np.abs(a - b).max(initial=0) / scale))
    return max(roundings)


def assert_identical(actual: PyTree, expected: PyTree) -> None:
    """Asserts equality bit by bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.tobytes() == b.tobytes(), (a, b)


def _nudged(tree: PyTree) -> PyTree:
    rng = np.random.default_rng(0)

    def nudge(x: Any) -> Any:
        if not _is_inexact(x):
            return x
        signs = rng.choice([-1.0, 1.0], x.shape)
        return (x * (1 + float(jnp.finfo(x.dtype).eps) * signs)).astype(x.dtype)

    return jax.tree.map(nudge, tree)


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
