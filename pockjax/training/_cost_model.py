"""What masks cost, predicted from one trace of the loss."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import optax

from pockjax._compat import Jaxpr
from pockjax.autodiff import IndexedMask, Plan, inlined
from pockjax.costs import Prediction, count_flops, predict_temp_bytes, tree_bytes
from pockjax.masks import pack, resolve
from pockjax.rewrites import BACKENDS, Rewriter
from pockjax.training._trees import check_batch, shapes_of
from pockjax.training._update import Update

PyTree = Any


class CostModel:
    """Predicts what training a mask costs, without compiling anything for it.

    The loss is traced once; each mask is differentiated, its convolutions take the forms that
    `compile` would choose, and the resulting jaxpr is measured.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        tx: optax.GradientTransformation,
        params: PyTree,
        *batch: Any,
        has_aux: bool = False,
        accumulate: int = 1,
        key: jax.Array | None = None,
        merge_aux: Callable[[PyTree, PyTree], PyTree] | None = None,
        residuals: str = "kept",
        rewrites: str = "measured",
    ):
        """Takes what `compile` takes, without the mask.

        >>> import jax.numpy as jnp
        >>> import pockjax as pj
        >>> params = {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}
        >>> loss = lambda params, x: jnp.mean((x @ params["w"] + params["b"]) ** 2)
        >>> costs = CostModel(loss, optax.adam(0.1), params, jnp.ones((8, 4)))
        >>> costs.predict({"w": False, "b": True}).gradient_bytes
        8
        """
        batch = shapes_of(batch, numbers=True)
        check_batch(batch, accumulate)
        nothing = IndexedMask.of(False)
        self._update = Update(
            fun, nothing, tx, shapes_of(params), batch, has_aux, accumulate, key, merge_aux
        )
        self._kept = residuals != "xla"
        self._rewrites = rewrites

    @cached_property
    def _rewriter(self) -> Rewriter | None:
        if self._rewrites == "none" or jax.default_backend() not in BACKENDS:
            return None
        return Rewriter(measure=self._rewrites == "measured")

    def _update_of(self, mask: PyTree, remat: Plan | bool) -> Update:
        """The update of a mask; shares the trace of the loss."""
        resolve(self._update.params, mask)
        update = replace(self._update, mask=IndexedMask.of(mask), remat=remat)
        update.__dict__["primal"] = self._update.primal
        return update

    def predict(self, mask: PyTree, remat: Plan | bool = ()) -> Prediction:
        """What training a mask is expected to cost.

        Args:
            mask: what to train, see `compile`.
            remat: what the backward pass computes again, see `compile`.

        Raises:
            MaskError: if the mask does not fit the parameters.
        """
        update = self._update_of(mask, remat)
        jaxpr = self._jaxpr(update)
        joint, params = update.joint, update.primal.params
        passes, n_params = joint.passes, len(params.arrays)
        kept = passes.forward.out_avals[joint.n_forward_out :]
        held = [joint.inputs[i] for i in passes.kept_inputs if i >= n_params]
        packed = jax.eval_shape(lambda arrays: pack(params.tree(arrays), mask), params.arrays)
        arguments = tree_bytes(jaxpr.in_avals)
        results = tree_bytes(jaxpr.out_avals) - tree_bytes(update.example_state)
        temp = predict_temp_bytes(jaxpr)
        return Prediction(
            memory_bytes=arguments + results + temp,
            argument_bytes=arguments,
            temp_bytes=temp,
            residual_bytes=tree_bytes([*kept, *held]),
            optimizer_bytes=tree_bytes(update.example_state.opt_state),
            gradient_bytes=tree_bytes(packed),
            flops=count_flops(jaxpr),
        )

    def best_plan(self, mask: PyTree) -> Plan:
        """The blocks to compute again so that a mask's backward pass keeps the fewest bytes."""
        return self._update.primal.best_plan(mask)

    def _jaxpr(self, update: Update) -> Jaxpr:
        """The whole step, as it would be handed to XLA."""
        step = update.step(self._kept)
        jaxpr = jax.make_jaxpr(step)(update.example_state, *update.arrays_of(update.batch))
        if self._rewriter is not None:
            jaxpr = self._rewriter.rewritten(jaxpr)
        return inlined(jaxpr)
