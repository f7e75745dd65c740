"""Means over gradients of many batches or examples, by one compiled program."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pockjax._paths import flatten_with_paths
from pockjax.autodiff import differentiate, is_array, trace
from pockjax.rewrites import BACKENDS, rewrite
from pockjax.selection._problem import Batch, Problem

Moments = dict[str, dict[str, np.ndarray]]


def moments(
    problem: Problem,
    seed: int,
    kinds: Sequence[str],
    channels: Mapping[str, tuple[int, ...]] | None = None,
) -> Moments:
    """Means over the gradients of the batches of a seed.

    Args:
        problem: the function, its parameters and data.
        seed: which batches.
        kinds: ``"mean"``: of the gradient; ``"square"``: of its square, by element;
            ``"potential"``: half that of the square of Σ w·g over a channel, for which gradients
            are those of single examples, along the first axis of every array of a batch.
        channels: of ``"potential"``, the axes that are kept for a weight. Of an array that is not
            in it, every element is a channel.

    Returns:
        By kind and path, float32 arrays.
    """
    return _Means(problem, kinds, channels or {}).of(problem.drawn(seed))


class _Means:
    def __init__(
        self, problem: Problem, kinds: Sequence[str], channels: Mapping[str, tuple[int, ...]]
    ):
        self._problem, self._kinds, self._channels = problem, kinds, channels
        self._by_example = "potential" in kinds

    def of(self, batches: Sequence[Batch]) -> Moments:
        named, treedef = flatten_with_paths(self._problem.params)
        wanted = {path for unit in self._problem.units for path, _ in unit.entries}
        first = jax.tree.map(lambda x: x[0] if is_array(x) else x, self._examples(batches[0]))
        primal = trace(self._problem.fun, self._problem.params, first)
        joint = differentiate(primal, treedef.unflatten([path in wanted for path, _ in named]))
        paths = [path for path, x in named if is_array(x)]

        def by_path(arrays: Sequence[Any]) -> dict[str, Any]:
            pairs = zip(paths, arrays, strict=True)
            return {path: x for path, x in pairs if path in wanted}

        def added(total: Any, arrays: Sequence[Any], examples: Sequence[Any]) -> Any:
            weights = by_path(arrays)

            def add(total: Any, example: Sequence[Any]) -> Any:
                _, _, grads = joint.run([*arrays, *example])
                own = dict(zip(weights, jax.tree.leaves(grads), strict=True))
                return jax.tree.map(jnp.add, total, self._of_one(own, weights)), None

            return lax.scan(add, total, examples)[0]

        fast = rewrite(added, measure=False) if jax.default_backend() in BACKENDS else added
        run = jax.jit(fast, donate_argnums=0)
        arrays = list(map(jnp.asarray, primal.params.arrays))
        total, count = self._zeros(by_path(arrays)), 0
        for batch in batches:
            examples = primal.args.arrays_of((self._examples(batch), {}))
            count += len(examples[0])
            total = run(total, arrays, examples)
        return {
            kind: {path: np.asarray(x) / np.float32(count) for path, x in sums.items()}
            for kind, sums in total.items()
        }

    def _examples(self, batch: Batch) -> Batch:
        """A batch as examples along a new first axis, each a batch of its own."""
        if not self._by_example:
            return jax.tree.map(lambda x: np.asarray(x)[None] if is_array(x) else x, batch)
        return jax.tree.map(lambda x: np.asarray(x)[:, None] if is_array(x) else x, batch)

    def _zeros(self, weights: Mapping[str, Any]) -> Any:
        shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in weights.items()}
        like = jax.eval_shape(lambda w: self._of_one(w, w), shapes)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)

    def _of_one(self, grads: Mapping[str, Any], weights: Mapping[str, Any]) -> Any:
        """What is summed of one gradient."""
        grads = {path: g.astype(jnp.float32) for path, g in grads.items()}
        weights = {path: w.astype(jnp.float32) for path, w in weights.items()}
        found: dict[str, Any] = {}
        if "mean" in self._kinds:
            found["mean"] = grads
        if "square" in self._kinds:
            found["square"] = {path: jnp.square(g) for path, g in grads.items()}
        if "potential" in self._kinds:
            found["potential"] = {
                path: self._potential(path, g, weights[path]) for path, g in grads.items()
            }
        return found

    def _potential(self, path: str, g: Any, w: Any) -> Any:
        kept = self._channels.get(path, range(g.ndim))
        others = tuple(d for d in range(g.ndim) if d not in kept)
        return jnp.square((w * g).sum(axis=others, keepdims=True)) / 2
