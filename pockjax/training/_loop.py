"""The training loop: batches in, a trained state out; can be interrupted and taken up again."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pockjax._digest import Digest
from pockjax._progress import Progress
from pockjax.autodiff import Arrays
from pockjax.prefix import FeatureCache
from pockjax.training._checkpoint import load, save
from pockjax.training._state import Metrics, State
from pockjax.training._step import Step

_FILE = "state.npz"


class Fit(NamedTuple):
    """What a training run ends with.

    Attributes:
        state: after the last step.
        losses: of every step, those before an interruption included; float64.
    """

    state: State
    losses: np.ndarray


def fit(
    step: Step,
    state: State,
    batches: Iterable[Any],
    *,
    steps: int,
    arguments: Callable[[Any], tuple[Any, ...]] = tuple,
    cache: Callable[..., Any] | str | Path | None = None,
    on_step: Callable[[int, Metrics], None] | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress: bool = True,
) -> Fit:
    """Takes steps until there have been as many as asked for.

    With a folder for checkpoints a run may be interrupted (Ctrl-C, a lost machine) and called again
    with the same arguments: it goes on after the last checkpoint, and ends in the same bits as
    a run that was never interrupted.

    Args:
        step: what `pockjax.compile` returned.
        state: the state to begin with; it is donated.
        batches: a `pockjax.data.Loader`, or anything that can be iterated again for each pass over
            the data. After an interruption the batches that were used before are drawn again and
            left out, unless there are ``state_dict`` and ``load_state_dict``, as a loader has.
        steps: number of steps in all, those before an interruption included.
        arguments: from a batch to the step's arguments; by default a batch is a tuple of them.
        cache: for a step that was compiled without its frozen front (``prefix=True``), a folder to
            keep features of examples in; otherwise they are kept in memory, up to 1 GiB. Or
            a `pockjax.FeatureCache` for a step of a suffix. Features are found by the content of
            the examples, whatever their order.
        on_step: called after each step with the number of steps done and the metrics.
        checkpoint: folder for the state, the losses and the position in the data; a file in it is
            replaced every so many steps, at the end, and at Ctrl-C.
        every: steps between two checkpoints.
        progress: whether to show on the standard error how far it is, and the time left.

    Raises:
        ValueError: there are no batches, an iterator ends too early, the checkpoint is of
            another step or of other data, or a folder for features is given for a step with its
            front.
        KeyboardInterrupt: after Ctrl-C, when the step is finished and the checkpoint written.

    >>> import jax.numpy as jnp, optax
    >>> import pockjax as pj
    >>> params = {"w": jnp.zeros(2)}
    >>> loss = lambda params, x, y: jnp.mean((x @ params["w"] - y) ** 2)
    >>> x, y = jnp.eye(2), jnp.ones(2)
    >>> step = pj.compile(loss, True, optax.sgd(0.5), params, x, y)
    >>> state, losses = pj.fit(step, step.init(params), [(x, y)], steps=20, progress=False)
    >>> bool(losses[-1] < 1e-3)
    True
    """
    if every < 1 or steps < 0:
        raise ValueError(f"steps and every are positive numbers, got {steps} and {every}")
    file = None if checkpoint is None else Path(checkpoint) / _FILE
    done, losses, position = 0, [], None
    identity = {} if file is None else {"mask": step.mask_text, **_first_of(batches)}
    if file is not None and file.exists():
        state, position, earlier = load(file, state, identity)
        losses = list(earlier)
        done = len(losses)
    source = _stream(batches, done, position)

    def write() -> None:
        if file is not None:
            save(file, state, _position(batches), np.asarray(losses, np.float64), identity)

    features = _features(step, state, cache)
    shown = Progress("training", steps, done=done, shown=progress)
    with shown, _finishing() as interrupted:
        while done < steps:
            given = arguments(next(source))
            given = given if features is None else (features(*given),)
            state, metrics = step(state, *given)
            losses.append(float(metrics.loss))
            done += 1
            shown.advance(f"loss {losses[-1]:.4g}")
            if on_step is not None:
                on_step(done, metrics)
            if done % every == 0 or done == steps or interrupted():
                write()
            if interrupted():
                raise KeyboardInterrupt
    return Fit(state, np.asarray(losses, np.float64))


def _features(step: Step, state: State, cache: Any) -> Callable[..., Any] | None:
    """What makes features of a batch; None if the step takes batches."""
    if callable(cache):
        return cache
    if step.prefix is not None:
        # The state's own arrays are gone after the first step.
        [features] = step._update.batch
        read, arrays = features.plan.frozen, Arrays.of(state.params)
        held = [jnp.copy(x) if i in read else x for i, x in enumerate(arrays.arrays)]
        return FeatureCache(step.prefix, arrays.tree(held), folder=cache)
    if cache is not None:
        raise ValueError(
            f"features are to be kept in {cache}, but the step computes its frozen front itself: "
            "compile it with prefix=True"
        )
    return None


def _stream(batches: Any, done: int, position: Mapping[str, Any] | None) -> Iterator[Any]:
    """One pass after the other, from where a run was."""
    known = hasattr(batches, "load_state_dict")
    if position is not None and bool(position) != known:
        raise ValueError("the checkpoint was written over other batches: of a loader, or of none")
    if position and known:
        batches.load_state_dict(position)
    skip = 0 if known else done
    while True:
        empty = True
        for batch in batches:
            empty = False
            if skip:
                skip -= 1
            else:
                yield batch
        if empty:
            raise ValueError(
                "there are no more batches; give a list or a loader, which can be gone over again, "
                "or an iterator that is long enough"
            )


def _first_of(batches: Any) -> dict[str, str]:
    """What tells data that can be gone over again from others; a loader tells it by itself."""
    if hasattr(batches, "state_dict") or isinstance(batches, Iterator):
        return {}
    digest = Digest()
    for x in jax.tree.leaves(next(iter(batches), ())):
        digest.array(x)
    return {"first batch": digest.hex}


def _position(batches: Any) -> Mapping[str, Any]:
    return batches.state_dict() if hasattr(batches, "state_dict") else {}


@contextmanager
def _finishing() -> Iterator[Callable[[], bool]]:
    """Lets a step end before Ctrl-C is heard; a second Ctrl-C is heard at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    # Only the main thread may ask for signals; elsewhere there is no Ctrl-C to be heard.
    own = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if own else None
    if before is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
