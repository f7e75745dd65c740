"""The same table whatever runs the pieces, and whichever of the workers die."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
import optax
import pytest

from pockjax.selection import Sensitivity, sensitivity
from pockjax.selection._run import Piece, Runner
from tests.selection.problems import all_units, batches, loss, params

OPTIONS: dict[str, Any] = {
    "steps": 3,
    "seeds": (0, 1, 2, 3),
    "progress": False,
    "tx": optax.sgd(0.1),
}


def measured(**options: Any) -> Sensitivity:
    found = all_units(ratios=(1, 0.5))
    return sensitivity(loss, params(), batches(), units=found, **(OPTIONS | options))


@pytest.fixture(scope="module")
def here() -> Sensitivity:
    return measured()


def test_threads(here: Sensitivity) -> None:
    with ThreadPoolExecutor(2) as executor:
        np.testing.assert_array_equal(measured(executor=executor).values, here.values)


@pytest.mark.slow
def test_processes(here: Sensitivity) -> None:
    pytest.importorskip("cloudpickle", reason="needs the package cloudpickle")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as executor:
        np.testing.assert_array_equal(measured(executor=executor).values, here.values)


class Killing(Executor):
    """Hands on what it is given, and kills a process as soon as three pieces are done."""

    def __init__(self, executor: Executor, pid: int):
        self._executor, self._pid = executor, pid
        self._done = 0
        self.given: list[Future[Any]] = []
        self.left_when_killed: list[int] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = self._executor.submit(fn, *args, **kwargs)
        self.given.append(future)
        future.add_done_callback(self._count)
        return future

    def _count(self, future: Future[Any]) -> None:
        self._done += 1
        if self._done == 3:
            self.left_when_killed.append(sum(not f.done() for f in self.given))
            os.kill(self._pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other libraries' sockets and threads
def test_two_dask_workers_of_which_one_dies(here: Sensitivity) -> None:
    distributed = pytest.importorskip("distributed", reason="needs the package distributed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
    )
    with cluster, distributed.Client(cluster) as client:
        pids = list(client.run(os.getpid).values())
        assert len(set(pids)) == 2 and os.getpid() not in pids
        executor = Killing(client.get_executor(), pids[0])
        found = measured(executor=executor)
    assert executor.left_when_killed and executor.left_when_killed[0] >= 2
    np.testing.assert_array_equal(found.values, here.values)


class Flaky(Executor):
    """Runs here, but loses what it is given now and then."""

    def __init__(self, fails: Callable[[int], bool], breaks_at: int = 10**9):
        self._fails, self._breaks_at, self.count = fails, breaks_at, 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.count += 1
        if self.count > self._breaks_at:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[Any] = Future()
        if self._fails(self.count):
            future.set_exception(OSError("the worker is gone"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def doubled(factor: float) -> Callable[..., list[float]]:
    return lambda x: [factor * x]


PIECES = [Piece(f"p{x}", (float(x),), 1) for x in range(6)]
WANTED = {f"p{x}": [2.0 * x] for x in range(6)}


def run(executor: Executor) -> dict[str, list[float]]:
    return Runner(executor).run(doubled, 2.0, PIECES, str)


def test_lost_pieces_are_given_out_again() -> None:
    executor = Flaky(lambda count: count % 3 == 0)
    assert run(executor) == WANTED
    assert executor.count > len(PIECES)


def test_a_broken_executor_leaves_the_rest_to_this_process() -> None:
    executor = Flaky(lambda count: False, breaks_at=2)
    assert run(executor) == WANTED


def test_what_always_fails_fails() -> None:
    executor = Flaky(lambda count: True)
    with pytest.raises(OSError, match="the worker is gone"):
        run(executor)
    assert executor.count <= 4 * len(PIECES)


def test_says_what_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    real = importlib.import_module

    def absent(name: str, *args: Any) -> Any:
        if name == "cloudpickle":
            raise ModuleNotFoundError(name=name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(TypeError, match="cannot be sent to another process"):
        Runner(Flaky(lambda count: False)).run(doubled, lambda: 2.0, PIECES, str)
