"""The gain of fine-tuning each unit alone."""

import numpy as np

from pockjax.selection._candidates import Program, Trial
from pockjax.selection._problem import Problem, as_numpy
from pockjax.selection._run import Piece, Values
from pockjax.selection.criteria._registry import criterion

_PIECE = 8  # candidates of one piece of work: what is done again if it is interrupted


@criterion("finetune")
def finetune(problem: Problem) -> np.ndarray:
    """What the model gains on held-out data by a short fine-tuning of each unit alone.

    The contribution analysis of "On-Device Training Under 256KB Memory" (Lin et al., NeurIPS 2022,
    arXiv:2206.15472): the units with the biases of the last k layers are its bias contributions,
    those with a weight at a ratio its weight contributions. All candidates go through one compiled
    program; the gain is over the same program that trains nothing.
    """
    seeds = problem.seeds
    trial = Trial(
        fun=problem.fun,
        evaluate=problem.evaluate,
        params=as_numpy(problem.params),
        tx=problem.tx,
        beside=problem.beside,
        candidates=tuple(unit.entries for unit in problem.units),
        training=tuple(as_numpy(problem.drawn(seed)) for seed in seeds),
        held_out=as_numpy(problem.held_out),
        vectorized=problem.vectorized,
    )
    everyone = [-1, *range(len(problem.units))]
    pieces = [
        Piece(f"seed{seed}-{start:05d}", (k, tuple(some)), len(some))
        for k, seed in enumerate(seeds)
        for start in range(0, len(everyone), _PIECE)
        for some in [everyone[start : start + _PIECE]]
    ]
    key = lambda: problem.fingerprint("finetune")  # noqa: E731
    found = problem.runner.run(_scores, trial, pieces, key)
    scores = np.array([x for piece in pieces for x in found[piece.name]]).reshape(len(seeds), -1)
    return scores[:, 1:] - scores[:, :1]


class _Scores:
    """The work of a process: its program is compiled when the first candidate comes."""

    def __init__(self, trial: Trial):
        self._program = Program(trial)

    def __call__(self, seed: int, candidates: tuple[int, ...]) -> Values:
        return self._program.scores(seed, candidates)


def _scores(trial: Trial) -> _Scores:
    return _Scores(trial)
