import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pockjax.masks import MaskError, Part, part
from tests.masks.strategies import parts, shapes


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (part[:64], "part[:64]"),
        (part[:, -8:], "part[:, -8:]"),
        (part[..., ::2], "part[..., ::2]"),
        (part[3], "part[[3]]"),
        (part[[1, 5], :], "part[[1, 5], :]"),
        (part[()], "part[...]"),
        (part[np.array([True, False])], "part[[True, False]]"),
        (part[range(0, 90, 3)], "part[[0, 3, 6, 9, 12, 15, ... 30 in all]]"),
        (part[:, jnp.array([4, 2])], "part[:, int32[2]]"),
    ],
)
def test_repr_is_what_a_user_writes(written, text):
    assert repr(written) == text


def test_equality_and_hash():
    assert part[[1, 2]] == part[np.array([1, 2])] == part[(1, 2),]
    assert hash(part[[1, 2]]) == hash(part[np.array([1, 2])])
    assert part[[1, 2]] != part[[2, 1]]
    assert part[[1, 0]] != part[[True, False]]
    assert part[1:] != part[[1]]
    assert part[:] != 3
    assert part[jnp.array([1, 2])] == part[jnp.array([1, 2])]
    assert part[jnp.array([1, 2])] != part[[1, 2]]
    assert len({part[:3], part[:3], part[:4]}) == 2


def test_negative_indices_and_steps_are_normalised():
    assert part[-2].resolve((5,)) == part[3].resolve((5,))
    assert part[[-1, 0]].resolve((5,)) == part[[4, 0]].resolve((5,))
    assert part[-3:-1].resolve((5,)) == part[2:4].resolve((5,))
    np.testing.assert_array_equal(part[::-2].resolve((5,)).selections[0], [4, 2, 0])
    assert part[[0, 1, 2]].resolve((3,)).is_full
    assert part[...].resolve(()).is_full
    assert part[...].resolve((0, 3)).is_full


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (part[:9], "axis 0: bound 9 exceeds the axis, which has size 4"),
        (part[-5:], "axis 0: bound -5 exceeds"),
        (part[:, 6], "axis 1: index 6 exceeds the axis, which has size 6"),
        (part[:, [0, -7]], "axis 1: index -7 exceeds"),
        (part[:, [1, 1]], "axis 1: index 1 is repeated"),
        (part[:, [5, -1]], "axis 1: index 5 is repeated"),
        (part[2:2], "axis 0: selects nothing of an axis of size 4"),
        (part[[]], "axis 0: selects nothing"),
        (part[[False] * 4], "axis 0: selects nothing"),
        (part[[True] * 5], "axis 0: 5 booleans for an axis of size 4"),
        (part[:, :, 0], "3 indices, but the array has 2 axes"),
        (part[0, ..., 0, 0], "the array has 2 axes"),
        (part[jnp.array([0, 4])], "axis 0: index 4 exceeds"),
        (part[jnp.array([0, 0])], "axis 0: index 0 is repeated"),
        (part[jnp.array([-1])], "axis 0: traced index -1 is negative"),
    ],
)
def test_misfits_name_the_path_shape_and_rule(written, problem):
    expected = f"{written!r} of 'a/kernel', shape (4, 6) (rule 3: 'a/.*'): "
    with pytest.raises(MaskError, match=re.escape(expected) + ".*" + re.escape(problem)):
        written.resolve((4, 6), "a/kernel", "3: 'a/.*'")


def test_traced_length_is_checked_where_values_are_not_known():
    with pytest.raises(MaskError, match="5 indices, some repeated, for an axis of size 4"):
        jax.eval_shape(lambda i: part[i].resolve((4,)).take(jnp.ones(4)), jnp.arange(5))


@pytest.mark.parametrize(
    "index",
    [
        [1, [2]],
        1.5,
        None,
        "a",
        True,
        np.zeros((2, 2), int),
        np.array([0.5]),
        slice(0, 1.5),
        slice(0, 4, 0),
    ],
)
def test_what_is_no_index_is_refused(index):
    with pytest.raises(MaskError, match=r"^part\["):
        part[index]


def test_other_refusals():
    with pytest.raises(MaskError, match="more than one '...'"):
        part[..., 0, ...]
    with pytest.raises(MaskError, match="boolean mask has no fixed length"):
        part[jnp.array([True, False])]
    with pytest.raises(TypeError, match="truth value"):
        bool(part[0])
    with pytest.raises(MaskError, match="not known here"):
        jax.eval_shape(lambda i: Part.from_block(part[i].resolve((4,))) and None, jnp.arange(2))


def test_traced_indices_are_the_children():
    rows, written = jnp.array([3, 1]), part[:2, jnp.array([3, 1])]
    leaves, treedef = jax.tree.flatten(written)
    assert len(leaves) == 1 and leaves[0].tolist() == rows.tolist()
    assert treedef == jax.tree.structure(part[:2, jnp.array([0, 2])])
    assert treedef != jax.tree.structure(part[:3, jnp.array([3, 1])])
    assert jax.tree.leaves(part[:2, [3, 1]]) == []
    assert jax.tree.structure(part[[1, 0]]) != jax.tree.structure(part[[True, False]])
    ((path, _),) = jax.tree_util.tree_leaves_with_path(written)
    assert path == (jax.tree_util.SequenceKey(1),)
    assert jax.tree.map(lambda i: i + 1, written) == part[:2, jnp.array([4, 2])]


def test_other_indices_are_selected_without_retracing():
    traces = 0

    @jax.jit
    def take(p: Part, x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return p.resolve(x.shape).take(x)

    x = jnp.arange(6.0)
    for chosen in ([0, 5], [3, 1], [5, 4]):
        np.testing.assert_array_equal(take(part[jnp.array(chosen)], x), x[np.array(chosen)])
    assert traces == 1


@given(st.data())
def test_from_block_selects_the_same(data):
    shape = data.draw(shapes)
    written, oracle = data.draw(parts(shape))
    again = Part.from_block(written.resolve(shape))
    assert again.is_static
    x = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(again.resolve(shape).take(x), x[oracle])
