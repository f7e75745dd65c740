"""What training each unit of a model is worth: `pockjax.sensitivity`."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import optax

from pockjax.autodiff import Arrays
from pockjax.masks import MaskError, named_entries
from pockjax.masks import mask as make_mask
from pockjax.selection._channels import choose_channels
from pockjax.selection._problem import Batch, Bound, Problem, arrays_of, as_batches
from pockjax.selection._run import Runner
from pockjax.selection._sensitivity import Sensitivity
from pockjax.selection._units import Unit, union
from pockjax.selection._units import units as find_units
from pockjax.selection.criteria import criterion_named, elements_named

PyTree = Any
_HELD_OUT = 4  # one batch in so many, where none are given


def sensitivity(
    fun: Callable[..., Any],
    params: PyTree,
    data: Iterable[Any],
    criterion: str = "finetune",
    *,
    units: Sequence[Unit] | None = None,
    held_out: Iterable[Any] | None = None,
    evaluate: Callable[..., Any] | None = None,
    tx: optax.GradientTransformation | None = None,
    steps: int = 16,
    seeds: Sequence[int] = (0, 1, 2),
    beside: Any = None,
    channels: str = "first",
    vectorized: int | None = None,
    executor: Executor | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measures what training each unit of a model alone is worth.

    Args:
        fun: ``fun(params, *batch)``, the loss: a mean over the examples of the batch.
        params: the parameters to begin with.
        data: batches, all of one shape; each a tuple of arguments. They are kept in memory.
        criterion: ``"finetune"``, the gain of a short fine-tuning of the unit; ``"fisher"``,
            ``"taylor"``, ``"gradnorm"``, ``"snr"``, which take a few backward passes for all units
            together; ``"magnitude"``; ``"random"``; or one that was registered.
        units: what to choose from; by default `pockjax.units`.
        held_out: batches to judge by; by default every fourth of ``data``, which then is not
            learnt from. Only ``"finetune"`` needs any.
        evaluate: ``evaluate(params, *batch)``, a number of which more is better, such as accuracy;
            by default minus the loss. It is traced.
        tx: the optimizer; plain gradient descent at a rate of 0.01 unless given.
        steps: batches that are drawn for each seed, and steps of each fine-tuning.
        seeds: each draws other batches, in another order.
        beside: what is trained along with every unit, such as a new classifier, in any form that
            `pockjax.mask` takes. The gain is over training that alone.
        channels: which channels a unit with a part of them has: ``"first"``, or a criterion of
            which the best ones are taken (``"fisher"``, ``"magnitude"``, …), by the first seed. The
            units of the result have them, so what was measured is what their masks train.
        vectorized: how many units are fine-tuned side by side, as one array. One on a CPU, where
            a unit near the output is then also cheaper than one near the input; elsewhere as many,
            up to 8, as take half of the memory, unless given.
        executor: where to run; any `concurrent.futures.Executor`: a process pool (started by
            "spawn": JAX does not survive a fork), Dask's ``client.get_executor()``, Ray's. Work of
            a worker that dies is given to another. Only for ``"finetune"``.
        folder: where to keep results, so that an interrupted call goes on where it was.
        progress: whether to show how far it is, on standard error.

    Returns:
        The units and what each is worth by each seed. The same arguments give the same numbers to
        the bit, whatever the executor, whether or not it was interrupted, on machines of one kind
        with one version of JAX; between kinds of machines XLA rounds differently.

    Raises:
        ValueError: an unknown criterion, or batches of different shapes or too few of them.
        MaskError: ``beside`` does not fit the params.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.zeros((4, 2)), "b": jnp.zeros(2)}
    >>> def loss(params, x, y):
    ...     return ((x @ params["w"] + params["b"] - y) ** 2).mean()
    >>> x = jax.random.normal(jax.random.key(0), (8, 16, 4))
    >>> data = [(x, x[:, :2] + 1) for x in x]
    >>> print(sensitivity(loss, params, data, seeds=[0], progress=False))
    unit                 ratio   worth
    w                    100%    ...
    """
    run, elements = criterion_named(criterion), None
    if channels != "first":
        elements = elements_named(channels)
    batches = as_batches(data)
    if held_out is not None:
        judged = as_batches(held_out)
    elif criterion == "finetune":
        batches, judged = _divided(batches)
    else:
        judged = batches
    if not all(Arrays.of(batches[0]).is_array):
        # Constants are the same in all batches: the functions hold them, programs take arrays.
        fun = Bound(fun, batches[0])
        evaluate = None if evaluate is None else Bound(evaluate, batches[0])
        batches, judged = (tuple(map(arrays_of, some)) for some in (batches, judged))
    if steps < 1 or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"steps must be at least 1 and seeds distinct, got {steps} and {seeds}")
    chosen = find_units(fun, params, *batches[0]) if units is None else tuple(units)
    if not chosen:
        raise ValueError("there are no units to measure")
    for unit in chosen:
        union(params, [unit])  # says what is wrong with a unit that is of another model
    problem = Problem(
        fun=fun,
        params=params,
        units=chosen,
        batches=batches,
        held_out=judged,
        evaluate=evaluate,
        tx=optax.sgd(0.01) if tx is None else tx,
        steps=steps,
        seeds=tuple(int(seed) for seed in seeds),
        beside=_entries(params, beside),
        vectorized=vectorized,
        runner=Runner(executor, None if folder is None else Path(folder), progress),
    )
    if elements is not None:
        chosen = choose_channels(chosen, elements(problem, problem.seeds[0]))
        problem = replace(problem, units=chosen)
    settings = {"steps": steps, "seeds": list(problem.seeds), "channels": channels}
    return Sensitivity(chosen, run(problem), criterion, settings)


def _divided(batches: tuple[Batch, ...]) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    if len(batches) < 2:
        raise ValueError("one batch cannot be divided; give batches to judge by as held_out")
    judged = batches[_HELD_OUT - 1 :: _HELD_OUT] or batches[-1:]
    kept = [b for k, b in enumerate(batches) if k % _HELD_OUT != _HELD_OUT - 1]
    return tuple(kept[: len(batches) - len(judged)]), judged


def _entries(params: PyTree, beside: Any) -> Any:
    if beside is None:
        return ()
    named = named_entries(make_mask(params, beside))
    entries = tuple((path, entry) for path, entry in named if entry is not False)
    if not entries:
        raise MaskError("beside names nothing to train")
    return entries
