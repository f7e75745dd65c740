"""One compiled program that trains any unit alone and says what the model is then worth.

Which unit is an input of the program: for each axis of each parameter a vector that is true where
it is trained. The frozen front, below everything that any unit trains, is computed beforehand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from pockjax._compat import eval_jaxpr
from pockjax._paths import flatten_with_paths
from pockjax.autodiff import Arrays, differentiate, trace
from pockjax.masks import Part
from pockjax.prefix import split
from pockjax.rewrites import BACKENDS, rewrite
from pockjax.selection._demand import on_demand
from pockjax.selection._entries import positions

PyTree = Any
Batch = tuple[Any, ...]
Entries = tuple[tuple[str, bool | Part], ...]
_WIDEST = 8  # candidates side by side, if nobody says how many


@dataclass(frozen=True, eq=False)
class Trial:
    """What is done with each candidate; everything but the candidate itself.

    Attributes:
        fun: the loss, ``fun(params, *batch)``.
        evaluate: ``evaluate(params, *batch)``, larger is better; None for minus the loss.
        params: the parameters to begin with.
        tx: the optimizer.
        beside: what is trained along with every candidate.
        candidates: what each trains; its entries for arrays that are in ``beside`` do not count.
        training: for each seed, the batches to train on, in order.
        held_out: the batches to be judged by.
        vectorized: how many candidates run side by side, as one array; None to choose.
    """

    fun: Callable[..., Any]
    evaluate: Callable[..., Any] | None
    params: PyTree
    tx: optax.GradientTransformation
    beside: Entries
    candidates: tuple[Entries, ...]
    training: tuple[tuple[Batch, ...], ...]
    held_out: tuple[Batch, ...]
    vectorized: int | None = None


class Program:
    """The compiled program of a `Trial`."""

    def __init__(self, trial: Trial):
        """Nothing is compiled before the first candidate."""
        self.trial = trial
        self._features: dict[int, Any] = {}

    def scores(self, seed: int, candidates: Sequence[int]) -> list[float]:
        """What the model is worth after each candidate was trained.

        Args:
            seed: position of the seed among those of the trial.
            candidates: positions of the candidates; -1 trains nothing but what is beside.
        """
        found: list[float] = []
        width = self._width
        for start in range(0, len(candidates), width):
            some = list(candidates[start : start + width])
            full = some + [-1] * (width - len(some))  # always of one shape
            scores = self._compiled(
                self._arrays, self._selectors(full), self._training(seed), self._held_out
            )
            found += [float(x) for x in np.asarray(scores, np.float64)[: len(some)]]
        return found

    def trained(self, seed: int, candidate: int) -> PyTree:
        """The parameters after a candidate was trained."""
        selectors = jax.tree.map(lambda x: x[0], self._selectors([candidate]))
        train = _fast(lambda *args: self._trained(*args))
        arrays = jax.jit(train)(self._arrays, selectors, self._training(seed))
        return self._tree.tree(arrays)

    @cached_property
    def _tree(self) -> Arrays:
        return Arrays.of(self.trial.params)

    @cached_property
    def _arrays(self) -> list[jax.Array]:
        return list(map(jnp.asarray, self._tree.arrays))

    @cached_property
    def _paths(self) -> list[str]:
        """Paths of the arrays of the params."""
        named, _ = flatten_with_paths(self.trial.params)
        pairs = zip(named, self._tree.is_array, strict=True)
        return [path for (path, _), yes in pairs if yes]

    @cached_property
    def _leaves(self) -> list[int]:
        """Positions of the arrays of which anything is ever trained."""
        entries = (self.trial.beside, *self.trial.candidates)
        touched = {path for some in entries for path, _ in some}
        return [i for i, path in enumerate(self._paths) if path in touched]

    @cached_property
    def _mask(self) -> PyTree:
        touched = {self._paths[i] for i in self._leaves}
        named, treedef = flatten_with_paths(self.trial.params)
        return treedef.unflatten([path in touched for path, _ in named])

    def _selectors(self, candidates: Sequence[int]) -> Any:
        """For each array whether and where it is trained, stacked over candidates."""
        beside = dict(self.trial.beside)
        rows: list[Any] = []
        for c in candidates:
            entries = dict(self.trial.candidates[c] if c >= 0 else ()) | beside
            on, axes = [], []
            for i in self._leaves:
                entry, shape = entries.get(self._paths[i], False), self._arrays[i].shape
                on.append(entry is not False)
                vectors = [np.zeros(n, bool) for n in shape]
                if entry is not False:
                    for vector, chosen in zip(vectors, positions(entry, shape), strict=True):
                        vector[chosen] = True
                axes.append(vectors)
            rows.append((np.array(on), axes))
        return jax.tree.map(lambda *xs: np.stack(xs), *rows)

    @cached_property
    def _split_loss(self) -> Any:
        return split(self.trial.fun, self._mask)

    @cached_property
    def _split_evaluation(self) -> Any:
        if self.trial.evaluate is None:
            return self._split_loss
        return split(self.trial.evaluate, self._mask)

    def _features_of(self, prefix: Callable[..., Any], batches: Sequence[Batch]) -> Any:
        """What the rest of the function reads of each batch, along a new first axis."""
        run = jax.jit(_fast(prefix))
        features = [run(self.trial.params, *batch) for batch in batches]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *features)

    def _training(self, seed: int) -> Any:
        if seed not in self._features:
            self._features.clear()  # one seed after the other: its features are the largest arrays
            batches = self.trial.training[seed]
            self._features[seed] = self._features_of(self._split_loss[0], batches)
        return self._features[seed]

    @cached_property
    def _held_out(self) -> Any:
        return self._features_of(self._split_evaluation[0], self.trial.held_out)

    @cached_property
    def _width(self) -> int:
        """How many candidates run side by side."""
        if self.trial.vectorized is not None:
            return self.trial.vectorized
        if jax.default_backend() == "cpu":
            return 1
        memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        one = self._compile(1).memory_analysis().temp_size_in_bytes
        return min(max(memory // 2 // max(one, 1), 1), _WIDEST)

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return self._compile(self._width)

    def _compile(self, width: int) -> Any:
        def score(arrays: Any, selectors: Any, training: Any, held_out: Any) -> Any:
            arrays = self._trained(arrays, selectors, training)
            return self._score(arrays, held_out)

        def scores(arrays: Any, selectors: Any, training: Any, held_out: Any) -> Any:
            if width == 1:
                # Without an axis for candidates, what a branch does not need is not computed.
                first = jax.tree.map(lambda x: x[0], selectors)
                return score(arrays, first, training, held_out)[None]
            return jax.vmap(score, (None, 0, None, None))(arrays, selectors, training, held_out)

        args = (self._arrays, self._selectors([-1] * width))
        args = (*args, self._training(0), self._held_out)
        return jax.jit(_fast(scores)).lower(*args).compile()

    def _score(self, arrays: Any, held_out: Any) -> Any:
        suffix, sign = self._split_evaluation[1], -1 if self.trial.evaluate is None else 1
        params = self._tree.tree(arrays)
        values = lax.map(lambda batch: suffix(params, batch).astype(jnp.float32), held_out)
        return sign * values.mean()

    def _trained(self, arrays: Any, selectors: Any, training: Any) -> list[Any]:
        on, axes = selectors
        masks = [_outer(yes, vectors) for yes, vectors in zip(on, axes, strict=True)]
        gradient = self._gradient(jax.tree.map(lambda x: x[0], training))
        own = [arrays[i] for i in self._leaves]
        opt_state = self.trial.tx.init(self._packed(list(map(_masked, masks, own))))

        def body(carry: Any, batch: Any) -> Any:
            own, opt_state = carry
            current = list(arrays)
            for i, x in zip(self._leaves, own, strict=True):
                current[i] = x
            grads = list(map(_masked, masks, gradient(on, current, batch)))
            # What is not trained is zero to the optimizer too: norms and decay are the unit's own.
            seen = list(map(_masked, masks, own))
            updates, opt_state = self.trial.tx.update(
                self._packed(grads), opt_state, self._packed(seen)
            )
            own = list(map(_added, masks, own, jax.tree.leaves(updates)))
            return (own, opt_state), None

        (own, _), _ = lax.scan(body, (own, opt_state), training)
        arrays = list(arrays)
        for i, x in zip(self._leaves, own, strict=True):
            arrays[i] = x
        return arrays

    def _packed(self, own: Sequence[Any]) -> PyTree:
        """The tree that the optimizer of a compiled step would see: None where all is frozen."""
        place = {i: x for i, x in zip(self._leaves, own, strict=True)}
        arrays = iter([place.get(i) for i in range(len(self._paths))])
        leaves = [next(arrays) if yes else None for yes in self._tree.is_array]
        return self._tree.treedef.unflatten(leaves)

    def _gradient(self, batch: Any) -> Callable[..., list[Any]]:
        """``(on, arrays, batch) -> gradients`` of the arrays that are ever trained."""
        primal = trace(self._split_loss[1], self.trial.params, [batch])
        passes = differentiate(primal, self._mask).passes
        backward = on_demand(passes.backward)
        n_out = len(passes.forward.outvars) - (
            len(passes.backward.invars) - len(passes.kept_inputs) - 1
        )

        def gradient(on: Any, arrays: Sequence[Any], batch: Any) -> list[Any]:
            inputs = [*arrays, *jax.tree.leaves(batch)]
            outs = eval_jaxpr(passes.forward, passes.forward.consts, *inputs)
            [seed] = [jnp.ones((), aval.dtype) for aval in primal.out_avals]
            held = [*(inputs[i] for i in passes.kept_inputs), *outs[n_out:], seed]
            return backward(on, held)

        return gradient


def _fast(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The function with fast convolutions; guessed, not timed, so that two runs choose alike."""
    if jax.default_backend() not in BACKENDS:
        return fun
    return rewrite(fun, measure=False)


def _outer(on: Any, vectors: Sequence[Any]) -> Any:
    """Where an array is trained: everywhere that all its axes say so."""
    mask = on
    for axis, vector in enumerate(vectors):
        shape = [1] * len(vectors)
        shape[axis] = vector.shape[0]
        mask = mask & vector.reshape(shape)
    return mask


def _masked(mask: Any, x: Any) -> Any:
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def _added(mask: Any, x: Any, update: Any) -> Any:
    # Mixing dtypes is meant here, as in `pockjax.apply_updates`.
    with jax.numpy_dtype_promotion("standard"):
        total = x + update
    return jnp.where(mask, total.astype(x.dtype), x)
