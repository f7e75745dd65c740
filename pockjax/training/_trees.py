"""Trees of arrays and of other leaves: their shapes, where they differ, who shares memory."""

from typing import Any

import jax
import jax.numpy as jnp

from pockjax._paths import flatten_with_paths
from pockjax.autodiff import is_array

PyTree = Any


def shapes_of(tree: PyTree, *, numbers: bool = False) -> PyTree:
    """The shapes of a tree's arrays as JAX will hold them; other leaves as they are.

    Args:
        tree: arrays, shapes and anything else.
        numbers: whether Python numbers (not truth values) count as arrays, as for `jax.jit`.
    """

    def shape(x: Any) -> Any:
        if numbers and _is_number(x):
            return jax.ShapeDtypeStruct((), jnp.result_type(x), weak_type=True)
        if not is_array(x):
            return x
        return jax.ShapeDtypeStruct(x.shape, _dtype(x), sharding=_chosen_sharding(x))

    return jax.tree.map(shape, tree)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | complex) and not isinstance(x, bool)


def _dtype(x: Any) -> Any:
    """The dtype that JAX gives an array or number: 64 bits only if they are enabled."""
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return dtype
    return jax.dtypes.canonicalize_dtype(dtype)


def _chosen_sharding(x: Any) -> Any:
    """The sharding of an array if somebody chose it; None if it is just where JAX put it."""
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return sharding if getattr(x, "committed", True) else None
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def check_batch(batch: PyTree, accumulate: int) -> None:
    """Raises ValueError if the arrays of a batch cannot be cut into microbatches."""
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    for path, leaf in flatten_with_paths(batch)[0]:
        if is_array(leaf) and leaf.shape and leaf.shape[0] % accumulate:
            raise ValueError(
                f"batch argument {path} of shape {tuple(leaf.shape)} cannot be cut into "
                f"{accumulate} microbatches along its first axis"
            )


def difference(
    expected: PyTree,
    found: PyTree,
    what: str,
    *,
    was: str = "was compiled for",
    origin: str = "what was compiled",
    advice: str = "",
) -> str | None:
    """Where two trees differ in structure, shape, dtype or value, in words; None if nowhere.

    Args:
        expected: shapes, and the values of leaves that are no arrays.
        found: arrays or shapes, and such values.
        what: what is compared.
        was: how a leaf of ``found`` is related to one of ``expected``.
        origin: what ``expected`` is.
        advice: what to do if an array differs.
    """
    wanted, treedef = flatten_with_paths(expected)
    given, found_treedef = flatten_with_paths(found)
    if treedef != found_treedef:
        missing = sorted({p for p, _ in wanted} - {p for p, _ in given})
        extra = sorted({p for p, _ in given} - {p for p, _ in wanted})
        detail = f"{treedef} expected, got {found_treedef}"
        if missing or extra:
            detail = f"missing {missing[:5]}, unexpected {extra[:5]}"
        return f"{what} differs in structure from {origin}: {detail}"
    for (path, a), (_, b) in zip(wanted, given, strict=True):
        name = f"{what} {path}".strip()
        if not is_array(a) and not same(a, b):
            return (
                f"{name} {was} {a!r:.80}, got {_described(b)}; it is a constant of the step, "
                "as is all that is no array or number of the batch"
            )
        if is_array(a) and _described(a) != _described(b):
            return f"{name} {was} {_described(a)}, got {_described(b)}{advice}"
    return None


def same(a: Any, b: Any) -> bool:
    """Whether two leaves that are no arrays are the same constant."""
    return a is b or (type(a) is type(b) and bool(a == b))


def _described(x: Any) -> str:
    if not is_array(x) and not isinstance(x, bool | int | float | complex):
        return f"{x!r:.80}"
    return f"{_dtype(x)}{list(jnp.shape(x))}"


def made_up(tree: PyTree) -> PyTree:
    """Arrays in place of shapes, to time a step on: small numbers, which slow no operation down."""
    return jax.tree.map(
        lambda a: jnp.full(a.shape, 0.01).astype(a.dtype) if is_array(a) else a, tree
    )


def unaliased(tree: PyTree) -> PyTree:
    """The tree with a copy of every array whose memory an earlier one has, so it can be donated."""
    taken: set[tuple[int, int]] = set()

    def own(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        if taken & _addresses(x):
            x = jnp.copy(x)
        taken.update(_addresses(x))
        return x

    return jax.tree.map(own, tree)


def _addresses(x: jax.Array) -> set[tuple[int, int]]:
    data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return {(s.device.id, s.data.unsafe_buffer_pointer()) for s in data.addressable_shards}
