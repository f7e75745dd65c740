"""What a step will need, before it is compiled; and the form of it that needs the least memory."""

import logging
from dataclasses import dataclass

import jax

from pockjax._compat import Jaxpr
from pockjax.autodiff import inlined
from pockjax.costs import best_order
from pockjax.prefix import MixedExamples, UnequalPieces
from pockjax.rewrites import Rewriter
from pockjax.training._program import Options, Program, variants
from pockjax.training._update import Update

_log = logging.getLogger("pockjax")
_WORTH_MORE_PIECES = 0.9  # of the temporary bytes with fewer


@dataclass(frozen=True)
class Forecast:
    """A step before it is compiled.

    Attributes:
        update: the update, its frozen front in as many pieces as are worth it.
        jaxpr: the whole step, as it would be handed to XLA.
        temp_bytes: predicted bytes of its intermediate arrays.
    """

    update: Update
    jaxpr: Jaxpr
    temp_bytes: int


def forecast(update: Update, options: Options, rewriter: Rewriter | None) -> Forecast:
    """What `compile` would make of an update."""
    whole = _forecast(update, options, rewriter)
    return (
        _divided(whole, options, rewriter) if _may_be_divided(update, options, rewriter) else whole
    )


def least_memory(update: Update, options: Options, rewriter: Rewriter | None) -> Update:
    """The update with its frozen front in as many pieces as are worth it."""
    own = None if rewriter is None else Rewriter(measure=rewriter.measure)  # notes its own choices
    try:
        if _may_be_divided(update, options, own):
            return _divided(_forecast(update, options, own), options, own).update
    except Exception as error:  # a step that cannot be predicted can be compiled all the same
        _log.warning("the memory of the frozen front could not be predicted: %r", error)
    return update


def _divided(best: Forecast, options: Options, rewriter: Rewriter | None) -> Forecast:
    """The same in as many pieces as are worth it."""
    for pieces in range(2, options.front_pieces + 1):
        try:
            found = _forecast(best.update.in_pieces(pieces), options, rewriter)
        except UnequalPieces:
            continue
        if found.temp_bytes > _WORTH_MORE_PIECES * best.temp_bytes:
            break
        best = found
    return best


def _may_be_divided(update: Update, options: Options, rewriter: Rewriter | None) -> bool:
    """Whether a step may need the most memory in a frozen front that can be computed in pieces.

    Quick to tell for most: what the backward pass reads is more than the front ever needs.
    """
    if jax.default_backend() != "cpu" or update.remat or update.is_spread:
        return False
    for pieces in range(2, options.front_pieces + 1):
        try:
            front = update.in_pieces(pieces).front
        except UnequalPieces:
            continue
        except MixedExamples:
            break
        backward = update.joint.residual_bytes + update.joint.gradient_bytes
        return best_order(_rewritten(front, rewriter))[1] > backward
    return False


def _forecast(update: Update, options: Options, rewriter: Rewriter | None) -> Forecast:
    found = []
    for name in variants(options.residuals):
        step = Program(name == "kept", options.updates == "early", None).function(update)
        jaxpr = jax.make_jaxpr(step)(update.example_state, *update.arrays_of(update.batch))
        jaxpr = _rewritten(jaxpr, rewriter)
        found.append(Forecast(update, jaxpr, best_order(jaxpr)[1]))
    return min(found, key=lambda one: one.temp_bytes)


def _rewritten(jaxpr: Jaxpr, rewriter: Rewriter | None) -> Jaxpr:
    return inlined(jaxpr if rewriter is None else rewriter.rewritten(jaxpr))
