"""Runs the pieces of a long piece of work: here or elsewhere, each once, those done before never.

Elsewhere is any `concurrent.futures.Executor`: threads or processes of this machine, Dask's
``Client.get_executor()``, Ray's pool. A piece whose worker died is given to another.
"""

import concurrent.futures
import hashlib
import importlib
import json
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pockjax._files import replacing
from pockjax._progress import Progress

Values = list[float]
_RETRIES = 3


@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Attributes:
        name: of the file that keeps its result.
        arguments: what to call the work with.
        count: how many values come out.
    """

    name: str
    arguments: tuple[Any, ...]
    count: int


@dataclass(frozen=True)
class Runner:
    """Where pieces are run and their results are kept.

    Attributes:
        executor: where they run; None for here.
        folder: where results are kept; None for nowhere.
        progress: whether to show how far it is, and the time left.
    """

    executor: Executor | None = None
    folder: Path | None = None
    progress: bool = False

    def run(
        self,
        make: Callable[[Any], Callable[..., Values]],
        context: Any,
        pieces: Sequence[Piece],
        key: Callable[[], str],
    ) -> dict[str, Values]:
        """The values of each piece, by its name.

        Args:
            make: a top-level function that makes the work out of ``context``, once in a process.
            context: whatever the work needs; sent to the workers with each piece.
            pieces: the pieces; each is called as ``make(context)(*piece.arguments)``.
            key: says what the results depend on; they are kept, and found again, under it.

        Raises:
            Exception: what a piece raised, if it did so again and again.
        """
        folder = None if self.folder is None else self.folder / key()
        found = {} if folder is None else _read(folder, pieces)
        left = [piece for piece in pieces if piece.name not in found]
        with Progress("sensitivity", len(pieces), done=len(found), shown=self.progress) as progress:
            if self.executor is None:
                results = _here(make, context, left)
            else:
                results = _elsewhere(self.executor, make, context, left)
            for piece, values in results:
                if folder is not None:
                    _write(folder, piece, values)
                found[piece.name] = values
                progress.advance()
        return found


def _here(make: Any, context: Any, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Values]]:
    work = make(context) if pieces else None
    for piece in pieces:
        assert work is not None
        yield piece, work(*piece.arguments)


def _elsewhere(
    executor: Executor, make: Any, context: Any, pieces: Sequence[Piece]
) -> Iterator[tuple[Piece, Values]]:
    if not pieces:
        return
    payload = _pickled((make, context))
    token = hashlib.blake2b(payload, digest_size=16).hexdigest()
    failures: dict[str, int] = {}
    pending: dict[Future[Values], Piece] = {}
    lost: list[Piece] = []

    def submit(piece: Piece) -> None:
        try:
            future = executor.submit(_work, token, payload, piece.arguments)
        except (BrokenExecutor, RuntimeError):  # a pool that lost a process takes no more work
            lost.append(piece)
        else:
            pending[future] = piece

    try:
        for piece in pieces:
            submit(piece)
        while pending:
            done, _ = concurrent.futures.wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                piece = pending.pop(future)
                try:
                    values = future.result()
                except Exception:
                    failures[piece.name] = failures.get(piece.name, 0) + 1
                    if failures[piece.name] > _RETRIES:
                        raise
                    submit(piece)
                else:
                    yield piece, values
    finally:
        for future in pending:
            future.cancel()
    yield from _here(make, context, lost)


def _pickled(work: Any) -> bytes:
    try:
        return pickle.dumps(work)
    except Exception as error:
        # Dask and Ray bring it; it takes lambdas and functions inside functions along.
        try:
            return importlib.import_module("cloudpickle").dumps(work)
        except ModuleNotFoundError:
            raise TypeError(
                f"this cannot be sent to another process: {error}. Give functions that are "
                "defined at the top of a module (the optimizer's are not), or install "
                "'cloudpickle', which can send any"
            ) from error


_MADE: dict[str, Callable[..., Values]] = {}  # in a worker: what it made last, by its token
_TURN = threading.Lock()  # threads of one process share it, and XLA's threads do the work anyway


def _work(token: str, payload: bytes, arguments: tuple[Any, ...]) -> Values:
    with _TURN:
        if token not in _MADE:
            make, context = pickle.loads(payload)
            _MADE.clear()
            _MADE[token] = make(context)
        return _MADE[token](*arguments)


def _write(folder: Path, piece: Piece, values: Values) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{piece.name}.json") as path:
        path.write_text(json.dumps(values))


def _read(folder: Path, pieces: Sequence[Piece]) -> dict[str, Values]:
    """What was done before; a file that is damaged counts as not there."""
    found: dict[str, Values] = {}
    for piece in pieces:
        try:
            values = json.loads((folder / f"{piece.name}.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(values, list) and len(values) == piece.count:
            found[piece.name] = [float(x) for x in values]
    return found
