"""The frozen front computed for a few examples of a batch at a time.

Where little is trained, a step needs the most memory in its frozen front, whose activations are the
largest and which nobody reads again. Computed for half of the batch and then for the other half, it
takes half of that memory (MCUNetV2, arXiv:2110.15352, does it with parts of an image). Only what
treats examples one by one can be taken apart; that is shown from the jaxpr, operation by operation.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pockjax._compat import Jaxpr, JaxprEqn, Literal, Var, bind, eqn_context, shape_of, subjaxprs
from pockjax.autodiff import CALLS, Primal, consts_as_inputs, inlined, spliced
from pockjax.prefix._examples import Axes, MixedExamples, UnequalPieces, axes_of, for_a_piece
from pockjax.prefix._split import cut, read_by


def in_pieces(primal: Primal, trained: Sequence[bool], pieces: int) -> tuple[Primal, Jaxpr]:
    """The same function, its frozen front computed for a part of the batch at a time.

    Args:
        primal: the function of parameters and a batch.
        trained: of each array of the parameters, whether it is trained at all.
        pieces: number of parts.

    Returns:
        The function, and its front by itself, computed for all at once.

    Raises:
        UnequalPieces: if the batch cannot be cut into so many pieces.
        MixedExamples: if the front does not treat examples one by one, or there is none.
    """
    whole = inlined(primal.jaxpr)
    n = len(trained)
    front, rest = cut(whole, trained)
    if not front.outvars:
        raise MixedExamples("nothing is frozen before the first trained layer")
    avals = [v.aval for v in whole.invars]
    front = jax.make_jaxpr(lambda *inputs: _opened(front, inputs))(*avals)
    read = read_by(front)
    batch = [v for v in front.invars[n:] if v in read and shape_of(v)]
    sizes = {shape_of(v)[0] for v in batch}
    if len(sizes) != 1 or not max(sizes) or max(sizes) % pieces:
        raise UnequalPieces(
            f"the frozen front reads arrays of {sorted(sizes)} examples, which cannot be cut into "
            f"{pieces} equal pieces"
        )
    axes = axes_of(front, batch, *sizes)
    if any(axes.get(v) != 0 for v in front.outvars if isinstance(v, Var)):
        raise MixedExamples("what the frozen front computes has no first axis of examples")
    mapped = jax.make_jaxpr(lambda *inputs: _mapped(front, axes, pieces, inputs))(*avals)
    eqns: list[JaxprEqn] = []
    features = spliced(consts_as_inputs(mapped), [*mapped.constvars, *whole.invars], eqns)
    inputs = [*rest.constvars, *whole.invars[:n], *features, *whole.invars[n:]]
    outs = spliced(consts_as_inputs(rest), inputs, eqns)
    jaxpr = whole.replace(
        constvars=[*mapped.constvars, *rest.constvars],
        consts=[*mapped.consts, *rest.consts],
        eqns=eqns,
        outvars=outs,
        debug_info=whole.debug_info.with_unknown_names(),
    )
    return replace(primal, jaxpr=jaxpr), front


def _opened(jaxpr: Jaxpr, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr and what it calls; the rules for derivatives of what is frozen are lost."""
    env = _environment(jaxpr, inputs)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in CALLS:
            outs = _opened(subjaxprs(eqn)[0], _values(eqn.invars, env))
            env.update(zip(eqn.outvars, outs, strict=True))
        else:
            _evaluate([eqn], env)
    return _values(jaxpr.outvars, env)


def _mapped(jaxpr: Jaxpr, axes: Axes, pieces: int, inputs: Sequence[Any]) -> list[jax.Array]:
    """Evaluates a jaxpr for each piece of its examples, and joins the results."""
    env = _environment(jaxpr, inputs)
    of_examples = [any(v in axes for v in eqn.outvars) for eqn in jaxpr.eqns]
    pairs = list(zip(jaxpr.eqns, of_examples, strict=True))
    _evaluate([eqn for eqn, yes in pairs if not yes], env)
    batch = [v for v in jaxpr.invars if v in axes]
    rows = [_cut_into(env[v], pieces) for v in batch]

    def body(_: None, rows: list[jax.Array]) -> tuple[None, list[jax.Array]]:
        inner = {**env, **dict(zip(batch, rows, strict=True))}
        _evaluate(
            [eqn for eqn, yes in pairs if yes], inner, lambda eqn: for_a_piece(eqn, axes, pieces)
        )
        return None, _values(jaxpr.outvars, inner)

    _, outs = lax.scan(body, None, rows)
    return [jnp.reshape(x, shape_of(v)) for x, v in zip(outs, jaxpr.outvars, strict=True)]


def _cut_into(x: jax.Array, pieces: int) -> jax.Array:
    return jnp.reshape(x, (pieces, x.shape[0] // pieces, *x.shape[1:]))


def _environment(jaxpr: Jaxpr, inputs: Sequence[Any]) -> dict[Var, Any]:
    names = zip([*jaxpr.constvars, *jaxpr.invars], [*jaxpr.consts, *inputs], strict=True)
    return dict(names)


def _values(atoms: Iterable[Any], env: dict[Var, Any]) -> list[Any]:
    return [a.val if isinstance(a, Literal) else env[a] for a in atoms]


def _evaluate(
    eqns: Sequence[JaxprEqn],
    env: dict[Var, Any],
    params_of: Callable[[JaxprEqn], dict[str, Any]] = lambda eqn: eqn.params,
) -> None:
    for eqn in eqns:
        with eqn_context(eqn):
            outs = bind(eqn, _values(eqn.invars, env), params_of(eqn), differentiated=False)
        env.update(zip(eqn.outvars, outs, strict=True))
