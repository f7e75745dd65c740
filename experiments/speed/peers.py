"""Who is timed, where each runs, and the processes that they run in."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

PACKAGE = "experiments.speed"
REFERENCE = "jax-full"
"""Whose loss and gradient the others' are compared with."""
OURS = "pockjax"

Memory = Literal["kept", "hugepages", "plain"]
"""What the C library does with what is freed: keeps it, takes it anew in huge pages, or small."""

_ON_TRANSFORMERS = "LoRA is timed on transformers alone"
_NO_LLAMA = "rotary attention is not among Keras's layers, and was not written for it here"


@dataclass(frozen=True)
class Peer:
    """One way to take the step.

    Attributes:
        environment: which of ``requirements/*.txt`` it runs in; "" for this one's.
        trains: everything, the leaves that the scheme touches, exactly what the scheme says,
            adapters beside frozen weights, or nothing.
        lacks: kinds of networks that it cannot do, and why.
    """

    environment: str
    trains: Literal["everything", "leaves", "scheme", "adapters", "nothing"]
    lacks: Mapping[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        """The interpreter."""
        if not self.environment:
            return Path(sys.executable)
        return Path(f".venv-{self.environment}/bin/python")

    def command(self, name: str, folder: Path, asked: str) -> list[str]:
        """What starts it."""
        return self.run(f"{self.environment or 'jax'}_worker", name, str(folder), asked)

    def run(self, module: str, *arguments: str) -> list[str]:
        """What starts a module of this folder in its environment."""
        start, module = f"{PACKAGE}.start", f"{PACKAGE}.{module}"
        return [str(self.python), "-W", "ignore", "-m", start, module, *arguments]

    def missing(self, kind: str) -> str | None:
        """Why it cannot be timed on a kind of network; None if it can."""
        if kind in self.lacks:
            return self.lacks[kind]
        if not self.python.exists():
            return (
                f"no {self.python}; `make .venv-{self.environment}/.{self.environment}` sets it up"
            )
        return None


_LORA = {"mobile": _ON_TRANSFORMERS, "resnet": _ON_TRANSFORMERS}
PEERS = {
    "jax-full": Peer("", "everything"),
    "jax-leaves": Peer("", "leaves"),
    "jax-forward": Peer("", "nothing"),
    "pockjax-full": Peer("", "everything"),
    "pockjax-unrewritten": Peer("", "scheme"),
    "pockjax": Peer("", "scheme"),
    "pockjax-cached": Peer("", "scheme"),
    "pockjax-parts": Peer("", "scheme"),
    "pockjax-forward": Peer("", "nothing"),
    "torch-full": Peer("torch", "everything"),
    "torch-leaves": Peer("torch", "leaves"),
    "torch-forward": Peer("torch", "nothing"),
    "compile-full": Peer("torch", "everything"),
    "compile-leaves": Peer("torch", "leaves"),
    "peft-lora": Peer("torch", "adapters", _LORA),
    "keras-full": Peer("keras", "everything", {"llama": _NO_LLAMA}),
    "keras-leaves": Peer("keras", "leaves", {"llama": _NO_LLAMA}),
    "keras-xla-full": Peer("keras", "everything", {"llama": _NO_LLAMA}),
    "ort-full": Peer("ort", "everything"),
    "ort-leaves": Peer("ort", "leaves"),
    "executorch-full": Peer("executorch", "everything"),
    "executorch-leaves": Peer("executorch", "leaves"),
}


class PeerError(RuntimeError):
    """A peer could not do what it was asked; the message is its own last word."""


def surroundings(threads: int, memory: Memory) -> dict[str, str]:
    """Environment variables that all peers get."""
    given = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    given["POCKJAX_KEEP_MEMORY"] = "1" if memory == "kept" else "0"
    if memory == "hugepages":
        given["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    return given


class Process:
    """A worker that answers in lines of JSON; it leaves with the block that it was started for."""

    def __init__(
        self, command: list[str], environment: Mapping[str, str], threads: int, first: int = 0
    ):
        """Start it on `threads` processors from the first on, or from another."""
        processors = sorted(os.sched_getaffinity(0))[first : first + threads]
        if not processors:
            raise ValueError(f"there is no processor number {first}")
        # A file, not a pipe: a talkative worker must not wait for somebody to read.
        self._complaints: IO[str] = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
        )
        # Before it has started any thread; in a function for the child, JAX warns of the fork.
        os.sched_setaffinity(self._process.pid, processors)

    def __enter__(self) -> "Process":
        """Itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """End it."""
        self.stop()

    def ask(self, line: str) -> dict[str, Any]:
        """Say a line, and wait for the answer.

        Raises:
            PeerError: it ended without one.
        """
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what follows says why it is gone
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for what it says next.

        Raises:
            PeerError: it ended without a word.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise PeerError(self._why())

    def stop(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.communicate()
        self._complaints.close()

    def _why(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        self._complaints.seek(0)
        lines = [line.strip() for line in self._complaints if line.strip()]
        errors = [line for line in lines if "Error" in line.split(":")[0]]
        return (errors or lines or [f"ended with status {code}"])[-1][:300]
