"""What the worth of units is asked about: a function, its parameters and data."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax

from pockjax._digest import Digest
from pockjax._paths import flatten_with_paths
from pockjax.autodiff import Arrays, inlined, is_array, trace
from pockjax.masks import Part, pack
from pockjax.selection._entries import Positions, positions
from pockjax.selection._run import Runner
from pockjax.selection._units import Unit

PyTree = Any
Batch = tuple[Any, ...]
_VERSION = 1  # of how units are tried: results of another are never taken for this one's


@dataclass(frozen=True, eq=False)
class Problem:
    """What a criterion is given.

    Attributes:
        fun: the loss, ``fun(params, *batch)``.
        params: the parameters.
        units: the units in question.
        batches: the batches to learn from.
        held_out: the batches to judge by.
        evaluate: ``evaluate(params, *batch)``, larger is better; None for minus the loss.
        tx: the optimizer.
        steps: how many batches are drawn for each seed.
        seeds: what decides which batches are drawn, and in which order.
        beside: paths, and what of them is trained along with every unit.
        vectorized: how many candidates a program runs side by side; None to choose.
        runner: runs pieces of the work, here or elsewhere, and keeps their results.
    """

    fun: Callable[..., Any]
    params: PyTree
    units: tuple[Unit, ...]
    batches: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    evaluate: Callable[..., Any] | None
    tx: optax.GradientTransformation
    steps: int
    seeds: tuple[int, ...]
    beside: tuple[tuple[str, bool | Part], ...]
    vectorized: int | None
    runner: Runner

    def drawn(self, seed: int) -> tuple[Batch, ...]:
        """The batches of a seed, in order: passes over all of them, each shuffled anew."""
        generator, order = np.random.default_rng(seed), list[int]()
        while len(order) < self.steps:
            order += generator.permutation(len(self.batches)).tolist()
        return tuple(self.batches[i] for i in order[: self.steps])

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by path."""
        named = flatten_with_paths(self.params)[0]
        return {path: tuple(x.shape) for path, x in named if is_array(x)}

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The parameters that are in some unit, by path, in float32 at least."""
        wanted = {path for unit in self.units for path, _ in unit.entries}
        named = flatten_with_paths(self.params)[0]
        return {path: _wide(x) for path, x in named if path in wanted}

    def refuse_adapters(self, criterion: str) -> None:
        """For criteria that read the values of what is trained: new adapters are zero.

        Raises:
            ValueError: a unit is an adapter.
        """
        for unit in self.units:
            if unit.kind == "adapter":
                raise ValueError(
                    f"{criterion} says nothing of '{unit.name}', whose product is zero before it "
                    "is trained: measure adapters by finetune, taylor, gradnorm or snr"
                )

    def positions(self, path: str, entry: bool | Part) -> Positions:
        """Which positions along each axis an entry trains."""
        return positions(entry, self.shapes[path], path)

    def fingerprint(self, *more: Any) -> str:
        """Of the function, the parameters, the data and the settings, and whatever else is given.

        The same for the same program on any machine: what it is compiled to may still differ.
        """
        digest = Digest()
        settings = (self.units, self.steps, self.seeds, self.beside, self.vectorized, *more)
        digest.text(f"{_VERSION} {jax.__version__} {jax.default_backend()}").text(repr(settings))
        arrays: list[Any] = []
        for fun, batches in ((self.fun, self.batches), (self.evaluate, self.held_out)):
            if fun is not None:
                jaxpr = inlined(trace(fun, self.params, batches[0], scalar=False).jaxpr)
                digest.text(str(jaxpr))
                arrays += jaxpr.consts
        packed = pack(self.params, True)
        state = jax.eval_shape(self.tx.init, packed)
        update = jax.make_jaxpr(self.tx.update)(packed, state, packed)
        digest.text(f"{update} {state}")
        arrays += [*update.consts, *Arrays.of((self.params, self.batches, self.held_out)).arrays]
        for x in arrays:
            digest.array(x)
        return digest.hex


def as_batches(data: Iterable[Any]) -> tuple[Batch, ...]:
    """The batches as tuples of arguments.

    Raises:
        ValueError: there are none, or their shapes differ.
    """
    batches = tuple(tuple(batch) if isinstance(batch, tuple | list) else (batch,) for batch in data)
    if not batches:
        raise ValueError("there are no batches in the data")
    first = _shapes(batches[0])
    for k, batch in enumerate(batches):
        if _shapes(batch) != first:
            raise ValueError(
                f"all batches must be of the same shapes: batch 0 has {first}, batch {k} has "
                f"{_shapes(batch)}; drop the last one if it is smaller, or pad it"
            )
    return batches


@dataclass(frozen=True)
class Bound:
    """A function that is given the arrays of a batch, and knows what else is in one.

    Attributes:
        fun: ``fun(params, *batch)``.
        batch: an example, whose constants are those of every batch.
    """

    fun: Callable[..., Any]
    batch: Batch

    def __call__(self, params: PyTree, *arrays: Any) -> Any:
        """The function of a whole batch."""
        return self.fun(params, *Arrays.of(self.batch).tree(arrays))


def arrays_of(batch: Batch) -> Batch:
    """The arrays of a batch, without its constants."""
    return tuple(Arrays.of(batch).arrays)


def as_numpy(tree: PyTree) -> PyTree:
    """The tree with NumPy arrays in place of JAX's, so that it can be sent elsewhere."""
    return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, tree)


def _shapes(batch: Batch) -> Any:
    return [(x.shape, str(x.dtype)) if is_array(x) else x for x in jax.tree.leaves(batch)]


def _wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x if x.dtype == np.float64 else x.astype(np.float32)
