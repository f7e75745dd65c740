"""The only module that touches JAX internals; everything else imports what moves from here.

Checked against jax 0.11.2 and 0.12. What is not public and why it is needed:

* ``dce_jaxpr``: JAX knows how to remove dead code from every higher-order primitive it has.
* ``name_stack_of`` / ``eqn_context``: an interpreter that re-binds equations must keep their
  names and their context (mesh, compute-on, matmul precision), or profiles and sharding change.
* ``backends_are_initialized``: some settings of a process only work before JAX runs anything.
* ``zeros_like_aval``, ``cast_to_aval``, ``type_context``: values of a given type, explicit sharding
  and varying manual axes included.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import jax.core as _public_core
import jax.extend.core as _jex_core
import jax.numpy as jnp
from jax import lax
from jax._src import config as _config
from jax._src import core as _core
from jax._src import source_info_util as _source_info_util
from jax._src import xla_bridge as _xla_bridge
from jax._src.interpreters import ad as _ad
from jax._src.interpreters import partial_eval as _pe

Jaxpr = _jex_core.Jaxpr
JaxprEqn = _jex_core.JaxprEqn
Literal = _jex_core.Literal
Var = _jex_core.Var
Primitive = _jex_core.Primitive

__all__ = [
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Primitive",
    "Var",
    "array_type",
    "backends_are_initialized",
    "bind",
    "cast_to_aval",
    "dce_jaxpr",
    "dtype_of",
    "eqn_context",
    "eval_jaxpr",
    "is_reference",
    "is_sharded",
    "new_var",
    "primal_of",
    "scan_arity",
    "shape_of",
    "spreads",
    "subjaxprs",
    "type_context",
    "with_subjaxprs",
    "zeros_like_aval",
]

eval_jaxpr = _public_core.eval_jaxpr
backends_are_initialized: Callable[[], bool] = _xla_bridge.backends_are_initialized
zeros_like_aval: Callable[[Any], jax.Array] = getattr(_ad, "zeros_like_aval")  # noqa: B009


def shape_of(atom: Any) -> tuple[int, ...]:
    """Shape of a jaxpr's variable or literal."""
    return tuple(atom.aval.shape)


def dtype_of(atom: Any) -> Any:
    """Dtype of a jaxpr's variable or literal."""
    return atom.aval.dtype


def is_sharded(eqn: JaxprEqn) -> bool:
    """Whether types say how an equation's arrays are spread over a mesh."""
    types = (getattr(v.aval, "sharding", None) for v in (*eqn.invars, *eqn.outvars))
    return any(sharding is not None and spreads(sharding.mesh) for sharding in types)


def spreads(mesh: Any) -> bool:
    """Whether there is anything to spread over, or types would have to say so all the same."""
    return not mesh.empty and (mesh.size > 1 or not mesh.are_all_axes_auto)


def array_type(shape: tuple[int, ...], like: Any) -> Any:
    """The type of an array of another shape, spread over no mesh."""
    return _public_core.ShapedArray(shape, like.dtype, weak_type=like.weak_type)


def is_reference(var: Any) -> bool:
    """Whether a jaxpr's variable is a mutable array, which may come to depend on anything."""
    return not isinstance(var.aval, _public_core.ShapedArray)


@contextmanager
def type_context(aval: Any) -> Iterator[None]:
    """The mesh and the checks under which values of type ``aval`` are traced."""
    mesh, varies = aval.sharding.mesh, bool(aval.mat.varying)
    manual = [(name, mesh.shape[name]) for name in mesh.manual_axes]
    with (
        jax.sharding.use_abstract_mesh(mesh),
        _core.extend_axis_env_nd(manual),
        _config._check_vma(varies),
    ):
        yield


def cast_to_aval(x: jax.Array, aval: Any) -> jax.Array:
    """``x`` with the dtype, shape (by broadcasting), sharding and varying axes of ``aval``."""
    x = jnp.broadcast_to(lax.convert_element_type(x, aval.dtype), aval.shape)
    x = _core.pvary(x, tuple(aval.mat.varying - jax.typeof(x).mat.varying))
    if jax.typeof(x).sharding.spec == aval.sharding.spec:
        return x
    return jax.sharding.reshard(x, aval.sharding)


def new_var(aval: Any) -> Var:
    """A fresh jaxpr variable of type ``aval``."""
    return Var(aval)


def dce_jaxpr(jaxpr: Jaxpr, used_outputs: Sequence[bool]) -> Jaxpr:
    """``jaxpr`` with only the used outputs and no dead code; all inputs are kept."""
    pruned, _ = _pe.dce_jaxpr(jaxpr, list(used_outputs), instantiate=True)
    return pruned


@contextmanager
def eqn_context(eqn: JaxprEqn) -> Iterator[None]:
    """The name stack, source line and configuration that ``eqn`` was traced under."""
    info = eqn.source_info
    stack = _source_info_util.current_name_stack() + info.name_stack
    with _source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def bind(
    eqn: JaxprEqn,
    args: Sequence[Any],
    params: dict[str, Any] | None = None,
    *,
    differentiated: bool = True,
) -> list[Any]:
    """Evaluates ``eqn`` on ``args``; always returns a list.

    Args:
        eqn: the equation.
        args: its operands.
        params: its parameters; default its own.
        differentiated: whether an operand is being differentiated.
    """
    params = eqn.params if params is None else params
    if differentiated and not subjaxprs(eqn):
        try:
            return list(_jitted(eqn.primitive, tuple(params.items()))(*args))
        except TypeError as error:
            if "unhashable" not in str(error):
                raise
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(params))
    return list(out) if eqn.primitive.multiple_results else [out]


@lru_cache(maxsize=4096)
def _jitted(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., list[Any]]:
    """A primitive as jnp calls one: through an inlined jit, whose linearization JAX caches.

    Linearizing 30 equal layers primitive by primitive takes three times as long.
    """

    def call(*args: Any) -> list[Any]:
        out = primitive.bind(*args, **primitive.get_bind_params(dict(params)))
        return list(out) if primitive.multiple_results else [out]

    call.__name__ = call.__qualname__ = primitive.name
    return jax.jit(call, inline=True)


def subjaxprs(eqn: JaxprEqn) -> list[Jaxpr]:
    """The jaxprs in the parameters of ``eqn``, in a fixed order (see `with_subjaxprs`)."""
    found: list[Jaxpr] = []
    for value in eqn.params.values():
        if isinstance(value, Jaxpr):
            found.append(value)
        elif isinstance(value, tuple) and value and all(isinstance(v, Jaxpr) for v in value):
            found.extend(value)
    return found


def with_subjaxprs(eqn: JaxprEqn, jaxprs: Sequence[Jaxpr]) -> dict[str, Any]:
    """The parameters of ``eqn`` with its jaxprs replaced, in the order of `subjaxprs`."""
    remaining = iter(jaxprs)
    params = dict(eqn.params)
    for name, value in params.items():
        if isinstance(value, Jaxpr):
            params[name] = next(remaining)
        elif isinstance(value, tuple) and value and all(isinstance(v, Jaxpr) for v in value):
            params[name] = tuple(next(remaining) for _ in value)
    return params


def primal_of(x: Any) -> Any:
    """The value of ``x`` without its tangent in the derivative being taken, if that is at hand."""
    tag = getattr(_core.trace_ctx.trace, "tag", None)
    if isinstance(x, _ad.LinearizeTracer) and getattr(x._trace, "tag", None) is tag:
        return x.primal
    return x


def scan_arity(eqn: JaxprEqn) -> tuple[int, int]:
    """Number of constants and of carried values of a ``scan`` equation."""
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))
