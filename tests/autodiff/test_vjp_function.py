"""`vjp_fn` as an object: a pytree that shows all it keeps, and a function that JAX transforms."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pockjax as pj
from experiments.networks import dense, mlp, mlp_params
from tests.autodiff.oracle import assert_close

BATCH = 16
WIDTHS = [24, 64, 48, 32, 8]


class TestVjpFunction:
    params = mlp_params(jax.random.key(0), WIDTHS)
    x = jax.random.normal(jax.random.key(1), (BATCH, WIDTHS[0]))
    mask = [False, {"kernel": pj.part[:16], "bias": True}, False, False]

    def expected(self, seed: jax.Array) -> Any:
        _, vjp_fn = jax.vjp(lambda params: mlp(params, self.x), self.params)
        return pj.pack(vjp_fn(seed)[0], self.mask)

    def assert_right(self, grads: Any, seed: jax.Array) -> None:
        wanted = self.expected(seed)
        assert_close(grads, wanted, wanted, 2**-23, ulps=64)

    def test_holds_nothing_it_does_not_show(self) -> None:
        """Its leaves are all it keeps alive: not the batch, not a layer that has no backward."""
        params = mlp_params(jax.random.key(0), WIDTHS)
        x = self.x + 0
        out, vjp_fn = pj.vjp(mlp, self.mask, params, x)
        references = [weakref.ref(x), weakref.ref(params[0]["kernel"])]
        del x, params
        gc.collect()
        assert [r() for r in references] == [None, None]
        self.assert_right(vjp_fn(jnp.ones_like(out)), jnp.ones_like(out))

    def test_called_twice(self) -> None:
        out, vjp_fn = pj.vjp(mlp, self.mask, self.params, self.x)
        for scale in (1.0, -2.0):
            seed = jnp.full_like(out, scale)
            self.assert_right(vjp_fn(seed), seed)

    def test_crosses_jit(self) -> None:
        """One jit returns it, another calls it: it is a pytree without tracers inside."""
        scale = jnp.arange(1.0, 1 + WIDTHS[-1])

        @jax.jit
        def forward(params: Any, x: jax.Array, scale: jax.Array) -> Any:
            return pj.vjp(lambda params, x: mlp(params, x) * scale, self.mask, params, x)

        with jax.checking_leaks():
            out, vjp_fn = forward(self.params, self.x, scale)
        grads = jax.jit(lambda vjp_fn, seed: vjp_fn(seed))(vjp_fn, jnp.ones_like(out))
        self.assert_right(grads, jnp.broadcast_to(scale, out.shape))
        shapes = jax.eval_shape(lambda vjp_fn: vjp_fn, vjp_fn)
        assert jax.tree.structure(shapes) == jax.tree.structure(vjp_fn)

    def test_under_vmap(self) -> None:
        """One cotangent for each of several, and one backward pass for each of several inputs."""
        out, vjp_fn = pj.vjp(mlp, self.mask, self.params, self.x)
        seeds = jnp.stack([jnp.ones_like(out), 2 * jnp.ones_like(out)])
        grads = jax.vmap(vjp_fn)(seeds)
        for i, seed in enumerate(seeds):
            self.assert_right(jax.tree.map(lambda g, i=i: g[i], grads), seed)

        outs, vjp_fns = jax.vmap(lambda x: pj.vjp(mlp, self.mask, self.params, x))(self.x)
        each = jax.vmap(lambda vjp_fn, seed: vjp_fn(seed))(vjp_fns, jnp.ones_like(outs))
        total = jax.tree.map(lambda g: g.sum(0), each)
        self.assert_right(total, jnp.ones_like(out))

    def test_differentiated_again(self) -> None:
        """Hessian-vector products, in both orders of the modes, through what it keeps."""

        def penalty(params: Any, transform: Callable[..., Any]) -> jax.Array:
            out, vjp_fn = transform(params)
            grads = jax.tree.leaves(vjp_fn(jnp.cos(out)))
            return jnp.stack([jnp.sum(g**2) for g in grads]).sum()

        def sparse(params: Any) -> Any:
            return pj.vjp(lambda p, x: mlp(p, x, jnp.tanh), self.mask, params, self.x)

        def reference(params: Any) -> Any:
            out, vjp_fn = jax.vjp(lambda p: mlp(p, self.x, jnp.tanh), params)
            return out, lambda seed: pj.pack(vjp_fn(seed)[0], self.mask)

        found, wanted = (jax.grad(penalty)(self.params, f) for f in (sparse, reference))
        assert_close(found, wanted, wanted, 2**-23, ulps=256)
        tangents = jax.tree.map(jnp.ones_like, self.params)
        found, wanted = (
            jax.jvp(lambda p, f=f: penalty(p, f), [self.params], [tangents])[1]
            for f in (sparse, reference)
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-4)

    def test_auxiliary_outputs(self) -> None:
        def fun(params: Any, x: jax.Array) -> Any:
            hidden = dense(params[0], x)
            return mlp(params, x), {"hidden": hidden, "none": None}

        out, vjp_fn, aux = pj.vjp(fun, self.mask, self.params, self.x, has_aux=True)
        assert aux["none"] is None and aux["hidden"].shape == (BATCH, WIDTHS[1])
        self.assert_right(vjp_fn(jnp.ones_like(out)), jnp.ones_like(out))

    def test_wrong_cotangent(self) -> None:
        out, vjp_fn = pj.vjp(mlp, self.mask, self.params, self.x)
        with pytest.raises(TypeError, match="structure of the function's output"):
            vjp_fn((out, out))
        with pytest.raises(TypeError, match=r"shape and dtype.*float32\[16,8\]"):
            vjp_fn(out[:1])
        with pytest.raises(TypeError, match="shape and dtype"):
            vjp_fn(out.astype(jnp.bfloat16))
