"""The order of batches: complete, repeatable, and taken up where it was left."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pockjax.data import Encoded, Loader, Sequences, evaluation_batches, split


@dataclass(frozen=True)
class Numbers:
    """Numbers whose batches show who was picked, how wide, and with which draw."""

    widths: np.ndarray

    def __len__(self):
        return len(self.widths)

    def batch(self, indices, draw=None):
        return indices.tolist(), int(self.widths[indices].max()), draw


def numbers(count: int, *widths: int) -> Numbers:
    return Numbers(np.resize(np.array(widths or (1,)), count))


PLANS = {
    "count": st.integers(1, 40),
    "size": st.integers(1, 8),
    "seed": st.integers(0, 2**32),
    "widths": st.lists(st.integers(1, 4), min_size=1, max_size=5),
}


@given(**PLANS)
def test_a_pass_has_every_example_at_most_once(count, size, seed, widths):
    size = min(size, count)
    data = numbers(count, *widths)
    loader = Loader(data, size=size, seed=seed)
    batches = list(loader)
    assert len(batches) == len(loader) == count // size
    seen = [index for indices, _, _ in batches for index in indices]
    assert len(seen) == len(set(seen)) == count // size * size
    assert all(len(indices) == size for indices, _, _ in batches)
    assert {width for _, width, _ in batches} <= set(data.widths.tolist())
    assert loader.state_dict()["epoch"] == 1 and loader.state_dict()["index"] == 0


@given(**PLANS, left_after=st.integers(0, 30), shuffle=st.booleans())
def test_another_loader_goes_on_where_one_was_left(count, size, seed, widths, left_after, shuffle):
    size = min(size, count)
    data = numbers(count, *widths)
    one = Loader(data, size=size, seed=seed, shuffle=shuffle)
    batches = one.endless()
    for _ in range(left_after):
        next(batches)
    other = Loader(data, size=size, seed=seed, shuffle=shuffle)
    other.load_state_dict(one.state_dict())
    following = list(itertools.islice(batches, 7))
    assert list(itertools.islice(other.endless(), 7)) == following


def test_iterating_gives_the_rest_of_a_pass_and_then_the_next():
    loader = Loader(numbers(9), size=2)
    first = next(iter(loader))
    rest, following = list(loader), list(loader)
    assert len(rest) == 3 and len(following) == 4
    assert {draw for _, _, draw in [first, *rest]} == {(0, 0)}
    assert {draw for _, _, draw in following} == {(0, 1)}


def test_passes_differ_and_seeds_differ():
    passes = [list(Loader(numbers(20), size=5, seed=seed)) for seed in (0, 0, 1)]
    loader = Loader(numbers(20), size=5, seed=0)
    assert passes[0] == passes[1] == list(loader)
    assert [indices for indices, *_ in loader] != [indices for indices, *_ in passes[0]]
    assert [indices for indices, *_ in passes[2]] != [indices for indices, *_ in passes[0]]


def test_order_of_the_data_is_kept_without_shuffling():
    loader = Loader(numbers(6), size=2, shuffle=False)
    for _ in range(2):
        assert [indices for indices, *_ in loader] == [[0, 1], [2, 3], [4, 5]]


def test_what_is_too_little_for_its_width_joins_a_greater_one():
    data = Numbers(np.array([8, 4, 4, 8, 4]))
    batches = [(indices, width) for indices, width, _ in Loader(data, size=2, shuffle=False)]
    assert batches == [([1, 2], 4), ([4, 0], 8)]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (Loader(numbers(8), size=2, seed=1), "seed"),
        (Loader(numbers(8), size=4), "size"),
        (Loader(numbers(9), size=2), "examples"),
        (Loader(numbers(8), size=2, shuffle=False), "shuffle"),
    ],
)
def test_position_in_something_else_is_refused(other, name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        Loader(numbers(8), size=2).load_state_dict(other.state_dict())


def test_position_that_does_not_exist_is_refused():
    loader = Loader(numbers(8), size=2)
    with pytest.raises(ValueError, match="no batch 4 of 4"):
        loader.load_state_dict(loader.state_dict() | {"index": 4})
    with pytest.raises(ValueError, match="'examples'"):
        loader.load_state_dict({"epoch": 0, "index": 0})


@given(count=st.integers(1, 30), size=st.integers(1, 12), widths=PLANS["widths"])
def test_evaluation_counts_each_example_once(count, size, widths):
    data = numbers(count, *widths)
    seen = []
    for (indices, width, draw), counted in evaluation_batches(data, size=size):
        assert len(indices) == size and draw is None
        assert set(data.widths[indices].tolist()) == {width}
        seen += indices[:counted]
    assert sorted(seen) == list(range(count))


def test_split_without_labels():
    tokens = np.arange(40).reshape(20, 2)
    data = Sequences(tokens, tokens >= 0, np.full(20, 2))
    train, test = split(data, held_out=0.25, seed=0)
    assert (len(train), len(test)) == (15, 5)
    assert sorted([*train.tokens[:, 0], *test.tokens[:, 0]]) == list(range(0, 40, 2))


@pytest.mark.parametrize("size", [0, -2])
def test_batches_of_nothing(size):
    tokens = np.arange(4).reshape(4, 1)
    data = Encoded(tokens, tokens >= 0, tokens[:, 0])
    with pytest.raises(ValueError, match="at least one example"):
        next(evaluation_batches(data, size=size))
