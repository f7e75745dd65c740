"""The sparse transforms: `jax.grad`, `jax.value_and_grad` and `jax.vjp` with a mask in front."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.tree_util import Partial

from pockjax._compat import Jaxpr
from pockjax.autodiff._jaxprs import consts_as_inputs, evaluated
from pockjax.autodiff._trace import Packing, PyTree, differentiate, tangent_dtype, trace


def value_and_grad(
    fun: Callable[..., Any], mask: PyTree, has_aux: bool = False
) -> Callable[..., Any]:
    """The value of a function and its gradient with respect to what a mask trains, nothing else.

    As `jax.value_and_grad`, with a mask in front: ``packed gradient == pack(dense gradient)``, to
    every order of differentiation, but only the packed one is ever computed. The result is ordinary
    JAX and can be jitted, vmapped, sharded and differentiated again.

    Args:
        fun: ``fun(params, *args, **kwargs)``: one real scalar, or with ``has_aux`` a pair of that
            and aux. It is always traced, as by `jax.jit`: values cannot be looked at in Python.
        mask: pytree of True, False and `Part` with the structure of the params, or a prefix of it.
        has_aux: whether ``fun`` returns auxiliary outputs.

    Returns:
        ``(params, *args, **kwargs) -> value, grads``, or ``(value, aux), grads``. ``grads`` has the
        structure of the params, None where frozen and a block's shape where a Part is trained.

    Raises:
        MaskError: if the mask does not fit the params.
        TypeError: if the output is not one real scalar.

    >>> import jax.numpy as jnp
    >>> import pockjax as pj
    >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    >>> fun = lambda params, x: jnp.sum(x @ params["w"] + params["b"])
    >>> mask = {"w": pj.part[:1], "b": False}
    >>> value, grads = pj.value_and_grad(fun, mask)(params, jnp.ones((4, 3)))
    >>> float(value), grads
    (24.0, {'b': None, 'w': Array([[4., 4.]], dtype=float32)})
    """

    def value_and_grad_fun(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        joint = differentiate(trace(fun, params, args, kwargs, has_aux=has_aux), mask)
        value, aux, grads = joint.run(joint.inputs)
        return ((value, aux), grads) if has_aux else (value, grads)

    return value_and_grad_fun


def grad(fun: Callable[..., Any], mask: PyTree, has_aux: bool = False) -> Callable[..., Any]:
    """The gradient of a function with respect to what a mask trains, nothing else.

    See `value_and_grad`; returns ``grads``, or ``(grads, aux)`` with ``has_aux``, as `jax.grad`.

    >>> import jax.numpy as jnp
    >>> import pockjax as pj
    >>> pj.grad(lambda w: jnp.sum(w**2), pj.part[1:])(jnp.arange(3.0))
    Array([2., 4.], dtype=float32)
    """

    def grad_fun(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        joint = differentiate(trace(fun, params, args, kwargs, has_aux=has_aux), mask)
        _, aux, grads = joint.run(joint.inputs)
        return (grads, aux) if has_aux else grads

    return grad_fun


def vjp(
    fun: Callable[..., Any], mask: PyTree, params: PyTree, *args: Any, has_aux: bool = False
) -> Any:
    """The output of a function and the map from its cotangent to the packed gradient.

    As `jax.vjp`. What ``vjp_fn`` holds is all that the backward pass needs and as few bytes as
    possible: of a matrix product, the input channels that are trained; of an activation function,
    no more than its derivative takes; nothing below the first trained layer.

    Args:
        fun: ``fun(params, *args)``: any pytree of arrays; a pair of that and aux with ``has_aux``.
        mask: what to train, see `value_and_grad`.
        params: the parameters.
        *args: the other arguments; not differentiated.
        has_aux: whether ``fun`` returns auxiliary outputs.

    Returns:
        ``out, vjp_fn`` or ``out, vjp_fn, aux``. ``vjp_fn`` is a pytree whose leaves are the arrays
        it holds, params among them.

    Raises:
        MaskError: if the mask does not fit the params.
        TypeError: (from ``vjp_fn``) if the cotangent does not fit the output.

    >>> import jax.numpy as jnp
    >>> import pockjax as pj
    >>> x, w = jnp.ones((8, 4)), jnp.ones((4, 2))
    >>> out, vjp_fn = pj.vjp(lambda w, x: x @ w, pj.part[:1], w, x)
    >>> [leaf.shape for leaf in jax.tree.leaves(vjp_fn)]
    [(8, 1)]
    >>> vjp_fn(jnp.ones_like(out))
    Array([[8., 8.]], dtype=float32)
    """
    joint = differentiate(trace(fun, params, args, has_aux=has_aux, scalar=False), mask)
    passes = joint.passes
    outs = evaluated(passes.forward, passes.forward.consts, *joint.inputs)
    kept = [*(joint.inputs[i] for i in passes.kept_inputs), *outs[joint.n_forward_out :]]
    # Constants are held as leaves too, so that the leaves of vjp_fn are all that it holds.
    backward, primal = passes.backward, joint.primal
    pull = _Backward(
        consts_as_inputs(backward), joint.packing, primal.out_tree, tuple(primal.out_avals)
    )
    vjp_fn = Partial(pull, backward.consts, kept)
    out, aux = primal.outputs(outs[: joint.n_forward_out])
    return (out, vjp_fn, aux) if has_aux else (out, vjp_fn)


@dataclass(frozen=True, eq=False)
class _Backward:
    """The backward pass as a function of what it keeps and of the cotangent.

    It is static data of a pytree that may outlive the trace it was made in, so it holds no arrays.
    """

    jaxpr: Jaxpr
    packing: Packing
    out_tree: Any
    out_avals: tuple[Any, ...]

    def __call__(self, consts: Sequence[Any], kept: Sequence[Any], cotangent: PyTree) -> PyTree:
        seeds, tree = jax.tree.flatten(cotangent)
        if tree != self.out_tree:
            raise TypeError(
                "the cotangent must have the structure of the function's output, "
                f"{self.out_tree}, got {tree}"
            )
        for seed, aval in zip(seeds, self.out_avals, strict=True):
            found = jax.typeof(seed)
            if (found.shape, found.dtype) != (aval.shape, tangent_dtype(aval)):
                raise TypeError(
                    "the cotangent must have the shape and dtype of the function's output, "
                    f"{aval.str_short()}, got {found.str_short()}"
                )
        return self.packing.tree(evaluated(self.jaxpr, [], *consts, *kept, *seeds))
