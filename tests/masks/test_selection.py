import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pockjax.masks import part
from pockjax.masks._selection import Block, canonical, embed, length, take
from tests.masks.strategies import arrays_with_parts, indices, shapes


@st.composite
def axis_selections(draw):
    shape = draw(shapes)
    axis = draw(st.integers(0, len(shape) - 1))
    index, positions = draw(indices(shape[axis]))
    written = (slice(None),) * axis + (index,)
    return shape, axis, part[written].resolve(shape).selections[axis], positions


@given(axis_selections())
def test_take_is_numpy_take_and_embed_its_transpose(drawn):
    shape, axis, sel, positions = drawn
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    taken = np.take(x, positions, axis)
    assert length(sel, shape[axis]) == len(positions)
    np.testing.assert_array_equal(take(x, sel, axis), taken)

    embedded = np.zeros_like(x)
    np.moveaxis(embedded, axis, 0)[positions] = np.moveaxis(taken, axis, 0)
    np.testing.assert_array_equal(embed(taken, sel, axis, shape[axis]), embedded)

    (transposed,) = jax.linear_transpose(lambda v: take(v, sel, axis), x)(jnp.asarray(taken))
    np.testing.assert_array_equal(transposed, embedded)
    (transposed,) = jax.linear_transpose(lambda v: embed(v, sel, axis, shape[axis]), taken)(x)
    np.testing.assert_array_equal(transposed, taken)


@given(arrays_with_parts())
def test_block_is_numpy_indexing(drawn):
    x, chosen, oracle = drawn
    block = chosen.resolve(x.shape)
    packed = x[oracle]
    assert block.packed_shape == packed.shape
    assert block.packed_size == packed.size
    np.testing.assert_array_equal(block.take(x), packed)

    expected = np.zeros_like(x)
    expected[oracle] = packed
    np.testing.assert_array_equal(block.embed(packed), expected)

    expected = x.copy()
    expected[oracle] = -packed
    np.testing.assert_array_equal(block.set(x, -packed), expected)

    expected = x.copy()
    expected[oracle] += 2 * packed
    np.testing.assert_array_equal(block.add(x, 2 * packed), expected)


@given(arrays_with_parts())
def test_block_take_and_embed_are_transposes(drawn):
    x, chosen, _ = drawn
    block = chosen.resolve(x.shape)
    packed = jnp.asarray(block.take(x))
    (transposed,) = jax.linear_transpose(block.take, x)(packed)
    np.testing.assert_array_equal(transposed, block.embed(packed))
    (transposed,) = jax.linear_transpose(block.embed, packed)(jnp.asarray(x))
    np.testing.assert_array_equal(transposed, packed)


@pytest.mark.parametrize(
    ("sel", "expected"),
    [
        (slice(0, 8, 1), None),
        (slice(0, 8, 3), slice(0, 7, 3)),
        (slice(2, 4, 5), slice(2, 3, 1)),
        (np.arange(8), None),
        (np.array([1, 4, 7]), slice(1, 8, 3)),
        (np.array([5]), slice(5, 6, 1)),
    ],
)
def test_canonical_form(sel, expected):
    assert canonical(sel, 8) == expected


@pytest.mark.parametrize("sel", [np.array([1, 0]), np.array([0, 1, 3])])
def test_irregular_indices_stay(sel):
    assert canonical(sel, 8) is sel


@pytest.mark.parametrize("update", ["set", "add"])
@pytest.mark.parametrize(
    "selections",
    [
        (slice(4, 8, 1), slice(0, 2, 1)),
        (slice(0, 31, 2), None),
        (np.array([9, 3]), slice(1, 3, 1)),
    ],
    ids=["window", "strided", "rows"],
)
def test_update_is_in_place_under_donation(update, selections):
    block = Block((32, 64), selections)
    x = jax.ShapeDtypeStruct(block.shape, jnp.float32)
    packed = jax.ShapeDtypeStruct(block.packed_shape, jnp.float32)
    write = jax.jit(getattr(block, update), donate_argnums=0)
    memory = write.lower(x, packed).compile().memory_analysis()
    whole = 32 * 64 * 4
    assert memory is not None
    assert memory.alias_size_in_bytes == whole
    assert memory.temp_size_in_bytes < whole


def test_blocks_compare_by_what_they_select():
    a = Block((4, 8), (None, np.array([3, 1])))
    assert a == Block((4, 8), (None, np.array([3, 1])))
    assert hash(a) == hash(Block((4, 8), (None, np.array([3, 1]))))
    assert a != Block((4, 8), (None, np.array([1, 3])))
    assert a != Block((4, 9), (None, np.array([3, 1])))
    assert a.is_static and not Block((4,), (jnp.array([0]),)).is_static
    with pytest.raises(ValueError, match="1 selections"):
        Block((4, 8), (None,))


def test_blocks_work_under_vmap_and_in_shard_map():
    block = Block((6, 4), (np.array([4, 1]), slice(1, 3, 1)))
    xs = jnp.arange(48.0).reshape(2, 6, 4)
    packed = jax.vmap(block.take)(xs)
    np.testing.assert_array_equal(packed[1], block.take(xs[1]))
    np.testing.assert_array_equal(jax.vmap(block.set)(xs, packed), xs)
    np.testing.assert_array_equal(jax.vmap(block.embed)(packed)[1], block.embed(packed[1]))

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(
        lambda x: jax.vmap(lambda v: block.add(block.embed(block.take(v)), block.take(v)))(x),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
    )
    np.testing.assert_array_equal(mapped(xs)[1], 2 * block.embed(packed[1]))
