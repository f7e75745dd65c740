"""Batches in a fixed order that can be left and taken up again.

Plain numpy, and not grain: everything here has random access and is small enough to index, so that
the order of a pass is one seeded permutation and a position is two integers. What grain adds are
worker processes and sharded readers. A data set here has `len` and, per example, `take([i])`; wrap
that in a `grain.MapDataset` source where decoding has to run in other processes.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

import numpy as np
from jaxtyping import Int

type Indices = Int[np.ndarray, " taken"]
type Draw = tuple[int, ...]


class Dataset[Batch](Protocol):
    """Examples that can be picked by number."""

    @property
    def widths(self) -> Int[np.ndarray, " examples"]:
        """The size that each example is padded to; those of one batch share it.

        An example can be padded further, to any greater width that occurs.
        """
        ...

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, indices: Indices, draw: Draw | None = None) -> Batch:
        """The examples at these places as arrays.

        Args:
            indices: Which examples.
            draw: Seeds what is random in an example; None for nothing random.
        """
        ...


class Loader[Batch]:
    """Batches of one size from a data set, shuffled anew in each pass, for training.

    The order depends on the seed, the pass and the data set's length alone, so that two loaders of
    one seed agree on any machine, and one that is put at another's `state_dict` goes on as the
    other would have. Each batch has one of a few static shapes, which is the data set's affair
    (`widths`). What a pass leaves over, being too few for a batch, is skipped in that pass.

    Iterating gives the rest of the pass that the loader is in; `endless` goes from pass to pass.

    Example:
        >>> from pockjax.data import Encoded
        >>> tokens = np.arange(6).reshape(6, 1)
        >>> data = Encoded(tokens, tokens >= 0, tokens[:, 0])
        >>> loader = Loader(data, size=2, seed=0)
        >>> first, *_ = loader
        >>> loader.load_state_dict({**loader.state_dict(), "epoch": 0, "index": 0})
        >>> again = next(iter(loader))
        >>> np.array_equal(first.tokens, again.tokens), loader.state_dict()["index"]
        (True, 1)
    """

    def __init__(
        self, dataset: Dataset[Batch], *, size: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        """Begin at the first batch of the first pass.

        Args:
            dataset: Where the examples come from.
            size: Examples in a batch.
            seed: Decides the order, and what is random in the examples.
            shuffle: Whether the order changes at all.

        Raises:
            ValueError: There are fewer examples than a batch holds.
        """
        if not 1 <= size <= len(dataset):
            raise ValueError(f"a batch of {size} cannot be drawn from {len(dataset)} examples")
        self._dataset, self._size, self._seed, self._shuffle = dataset, size, seed, shuffle
        self._epoch = self._index = 0

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self._dataset) // self._size

    def __iter__(self) -> Iterator[Batch]:
        """The rest of this pass; the loader then stands before the next one."""
        epoch = self._epoch
        plan = self._plan(epoch)
        for index in range(self._index, len(plan)):
            batch = self._dataset.batch(plan[index], (self._seed, epoch))
            # The position moves first: who saves it has this batch, and wants the next.
            last = index + 1 == len(plan)
            self._epoch, self._index = (epoch + 1, 0) if last else (epoch, index + 1)
            yield batch

    def endless(self) -> Iterator[Batch]:
        """One pass after the other."""
        while True:
            yield from self

    def state_dict(self) -> dict[str, int]:
        """The position (`epoch`, `index`), and what it is a position in."""
        return {"epoch": self._epoch, "index": self._index, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another loader over the same data was.

        Raises:
            ValueError: The position is of other data, another seed or another batch size.
        """
        expected = self._identity()
        found = {key: state.get(key) for key in expected}
        if found != expected:
            raise ValueError(f"the position is one in {found}, this loader goes over {expected}")
        epoch, index = int(state["epoch"]), int(state["index"])
        if epoch < 0 or not 0 <= index < len(self):
            raise ValueError(f"there is no batch {index} of {len(self)} in pass {epoch}")
        self._epoch, self._index = epoch, index

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self._seed,
            "examples": len(self._dataset),
            "size": self._size,
            "shuffle": int(self._shuffle),
        }

    def _plan(self, epoch: int) -> list[Indices]:
        """Which examples each batch of a pass holds."""
        order = np.arange(len(self._dataset))
        generator = np.random.default_rng([self._seed, epoch])
        if self._shuffle:
            order = generator.permutation(order)
        batches: list[Indices] = []
        left = np.empty(0, order.dtype)
        widths = self._dataset.widths[order]
        for width in np.unique(widths):
            # What is too little for a batch of its width joins the next greater one.
            members = np.concatenate([left, order[widths == width]])
            whole = len(members) // self._size * self._size
            batches += list(members[:whole].reshape(-1, self._size))
            left = members[whole:]
        if self._shuffle:
            # Otherwise every pass would go from short to long.
            batches = [batches[k] for k in generator.permutation(len(batches))]
        return batches


def training_batches[Batch](dataset: Dataset[Batch], *, size: int, seed: int) -> Iterator[Batch]:
    """Draw batches without end, all of one size, shuffled anew in each pass over the data.

    A `Loader`, for those who need no position to come back to.

    Raises:
        ValueError: There are fewer examples than a batch holds.
    """
    return Loader(dataset, size=size, seed=seed).endless()


def evaluation_batches[Batch](dataset: Dataset[Batch], *, size: int) -> Iterator[tuple[Batch, int]]:
    """Go once over the data in order, from narrow to wide, in batches all of one size.

    Yields:
        A batch, and how many of its examples count; the last batch of each width is filled up with
        repeats.

    Raises:
        ValueError: The size is below 1.
    """
    if size < 1:
        raise ValueError(f"a batch holds at least one example, not {size}")
    widths = dataset.widths
    for width in np.unique(widths):
        members = np.flatnonzero(widths == width)
        for start in range(0, len(members), size):
            indices = np.arange(start, start + size) % len(members)
            yield dataset.batch(members[indices]), min(size, len(members) - start)


class Divisible(Protocol):
    """Examples of which some can be taken; if they have `labels`, a split keeps proportions."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def take(self, indices: Any) -> Self:
        """The examples at these places, in this order."""
        ...


def split[Data: Divisible](data: Data, *, held_out: float, seed: int) -> tuple[Data, Data]:
    """Split into a part for training and a held-out part.

    Args:
        data: What to split; if it has labels, each class keeps its share.
        held_out: The fraction to hold out, between 0 and 1.
        seed: The same seed gives the same split, on any machine.

    Returns:
        The training part and the held-out part, each in the order of the whole.

    Example:
        >>> from pockjax.data import Corpus
        >>> corpus = Corpus(tuple("abcdefgh"), (0, 0, 0, 0, 1, 1, 1, 1), ("x", "y"))
        >>> train, test = split(corpus, held_out=0.25, seed=0)
        >>> len(train), test.labels
        (6, (0, 1))
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is a fraction between 0 and 1, not {held_out}")
    generator = np.random.default_rng(seed)
    labels = np.asarray(getattr(data, "labels", np.zeros(len(data), int)))
    train, test = [], []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = round(held_out * len(members))
        test.extend(members[:count].tolist())
        train.extend(members[count:].tolist())
    return data.take(sorted(train)), data.take(sorted(test))


def fitting(
    sizes: Int[np.ndarray, " examples"], buckets: tuple[int, ...], longest: int
) -> Int[np.ndarray, " examples"]:
    """The least bucket that holds each size; `longest` where none does.

    Example:
        >>> fitting(np.array([3, 8, 9]), (8,), 32)
        array([ 8,  8, 32])
    """
    edges = np.array(sorted({*buckets, longest}))
    if edges[0] < 1 or edges[-1] > longest:
        raise ValueError(f"buckets are lengths from 1 to {longest}, not {buckets}")
    return edges[np.searchsorted(edges, sizes)]
