"""Low-rank adapters for any function."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pockjax._compat import dtype_of, shape_of
from pockjax._paths import flatten_with_paths
from pockjax.adapters._sites import Site
from pockjax.adapters._walk import Analysis, Pairs, evaluate
from pockjax.autodiff import Primal, is_array, trace
from pockjax.masks import mask as make_mask
from pockjax.masks import named_entries

PyTree = Any


class AdaptedParams(NamedTuple):
    """Parameters, and the adapters beside them.

    Attributes:
        params: the parameters as they were.
        adapters: by path of the weight, its factors ``a`` and ``b``.
    """

    params: PyTree
    adapters: dict[str, dict[str, jax.Array]]


@dataclass(frozen=True, eq=False)
class AdaptedFunction:
    """A function of `AdaptedParams`; see `adapt`.

    Attributes:
        fun: the function of the parameters alone.
        scale: what adapters are multiplied by.
        left_out: paths of the arrays of two axes and more without an adapter, and why.
    """

    fun: Callable[..., Any]
    scale: float
    left_out: dict[str, str]
    _sites: dict[str, Site]

    def __call__(self, params: AdaptedParams, *args: Any, **kwargs: Any) -> Any:
        """What the function returns where the adapters add to its weights.

        Raises:
            TypeError: the parameters are not those of an adapted function.
            ValueError: the function, for these arguments, reads a weight with an adapter in another
                way than it did when it was adapted.
        """
        _check_type(params)
        primal = trace(self.fun, params.params, args, kwargs, scalar=False)
        place = {path: i for i, (path, _) in enumerate(_named(params.params))}
        analysis = _analysis(primal)
        part = analysis.whole(primal.jaxpr)
        pairs: Pairs = {}
        for path, factors in params.adapters.items():
            site = self._sites.get(path)
            if site is None or set(factors) != {"a", "b"}:
                raise ValueError(f"'{path}' is no weight with an adapter of factors a and b")
            now, why = _one_site(analysis.uses.get(place[path], []))
            if now is None or not now.like(site):
                raise ValueError(
                    f"the function reads '{path}' in another way than it did when it was adapted"
                    f"{why and f' ({why})'}; adapt it with arguments like these"
                )
            _check_shapes(path, site, factors)
            pairs[place[path]] = factors["a"], factors["b"]
        inputs = [*primal.params.arrays, *primal.args.arrays]
        outs = zip(evaluate(part, inputs, pairs, self.scale), primal.jaxpr.outvars, strict=True)
        arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x, dtype_of(v)) for x, v in outs]
        return primal.outputs(arrays)[0]

    def merge(self, params: AdaptedParams) -> PyTree:
        """The parameters with which the function alone returns the same.

        Args:
            params: parameters and trained adapters.

        Raises:
            TypeError: these are not the parameters of an adapted function.
            ValueError: a weight is computed with before it meets the activations (it is
                dequantised, say), so that nothing can be added to the parameter itself.
        """
        _check_type(params)
        added, before = {}, dict(_named(params.params))
        for path, factors in params.adapters.items():
            param = before[path]
            try:
                delta = self._sites[path].weight(factors["a"], factors["b"], param)
            except ValueError as error:
                raise ValueError(f"the adapter of '{path}' cannot be merged: {error}") from None
            added[path] = param + (self.scale * delta).astype(param.dtype)
        named, treedef = flatten_with_paths(params.params)
        return treedef.unflatten([added.get(path, leaf) for path, leaf in named])


def adapt(
    fun: Callable[..., Any],
    params: PyTree,
    *batch: Any,
    rank: int = 8,
    alpha: float | None = None,
    among: Any = None,
    seed: int = 0,
) -> tuple[AdaptedFunction, AdaptedParams]:
    """Puts a low-rank adapter beside each weight of a function.

    LoRA (Hu et al., arXiv:2106.09685): where activations x meet a weight W, x·W becomes
    x·W + (x·A)·B·alpha/rank. B is zero at first, so that nothing changes before it is trained; the
    gradient of W, as large as W, is never computed. The products are found in the jaxpr, so that it
    works for any model of any library: matrix products, also batched ones, convolutions without
    groups (A is a convolution, B a 1×1 one), in loops (`jax.lax.scan`) over stacked layers, in
    branches and checkpointed blocks. What it returns is a function and its parameters as any other:
    `units` offers an adapter in the group of its weight, `mask` trains all of them by the rule
    ``("adapters/.*", "all")``, the parameters themselves are found under ``params/``.

    Args:
        fun: ``fun(params, *batch)``, a loss or a model; it is traced once and not run.
        params: arrays or shapes.
        *batch: the other arguments, arrays or shapes.
        rank: of each adapter.
        alpha: what adapters are multiplied by, times ``rank``; default ``rank``.
        among: the weights that get one, in any form that `pockjax.mask` takes; default all that
            are larger than their adapter.
        seed: for A, uniform within ±1/√(number of inputs).

    Returns:
        The function of `AdaptedParams`, which has ``merge`` for what was trained; and these.

    Raises:
        ValueError: no weight can have an adapter, or the rank is none.

    >>> params = {"w": jnp.ones((64, 32)), "b": jnp.zeros(32)}
    >>> model = lambda params, x: x @ params["w"] + params["b"]
    >>> x = jnp.ones((2, 64))
    >>> adapted, params = adapt(model, params, x, rank=4)
    >>> jax.tree.map(jnp.shape, params.adapters)
    {'w': {'a': (64, 4), 'b': (4, 32)}}
    >>> bool(jnp.allclose(adapted(params, x), model(adapted.merge(params), x)))
    True
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    primal = trace(fun, params, batch, scalar=False)
    named = _named(params)
    analysis = _analysis(primal)
    analysis.whole(primal.jaxpr)
    allowed = _allowed(params, among)
    sites: dict[str, Site] = {}
    left_out: dict[str, str] = {}
    for leaf, uses in analysis.uses.items():
        path = named[leaf][0]
        site, why = _one_site(uses)
        if not allowed[path]:
            site, why = None, "not among those asked for"
        elif site is not None and _size(site, rank) >= math.prod((*site.made.stack, *site.shape)):
            site, why = None, f"an adapter of rank {rank} would be no smaller"
        if site is None:
            left_out[path] = why
        else:
            sites[path] = site
    for path, leaf in named:
        if len(leaf.shape) > 1 and path not in sites:
            left_out.setdefault(path, "it meets no activations in a product")
    left_out = {p: left_out[p] for p, leaf in named if p in left_out and len(leaf.shape) > 1}
    if not sites:
        reasons = "; ".join(f"'{path}': {why}" for path, why in left_out.items())
        raise ValueError(f"no weight can have an adapter ({reasons or 'there are none'})")
    keys = jax.random.split(jax.random.key(seed), len(sites))
    adapters = {
        path: _new(site, rank, dict(named)[path].dtype, key)
        for (path, site), key in zip(sorted(sites.items()), keys, strict=True)
    }
    scale = 1.0 if alpha is None else alpha / rank
    return AdaptedFunction(fun, scale, left_out, sites), AdaptedParams(params, adapters)


def _named(params: PyTree) -> list[tuple[str, Any]]:
    """The arrays of the parameters, by path.

    Raises:
        ValueError: two have the same path.
    """
    named = [(path, leaf) for path, leaf in flatten_with_paths(params)[0] if is_array(leaf)]
    paths = [path for path, _ in named]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"two parameters are called '{path}'; rename one of them")
    return named


def _allowed(params: PyTree, among: Any) -> dict[str, bool]:
    if among is None:
        return {path: True for path, _ in _named(params)}
    entries = named_entries(make_mask(params, among))
    return {path: entry is not False for path, entry in entries}


def _check_type(params: Any) -> None:
    if not isinstance(params, AdaptedParams):
        raise TypeError(f"an adapted function takes AdaptedParams, got {type(params).__name__}")


def _analysis(primal: Primal) -> Analysis:
    n_params = len(primal.params.arrays)
    return Analysis([math.prod(shape_of(v)) for v in primal.jaxpr.invars[:n_params]])


def _one_site(uses: list[tuple[str, Site | None]]) -> tuple[Site | None, str]:
    """The site that serves all uses; None, and why, if there is none."""
    for why, site in uses:
        if site is None:
            return None, why
    if not uses:
        return None, "it meets no activations in a product"
    why, first = uses[0]
    assert first is not None
    if len(uses) == 1:
        return first, ""
    # What two computations make of one weight need not be the same.
    same = all(site is not None and first.like(site) for _, site in uses)
    if first.made.moves is None or not same:
        return None, "it is read by several products in different ways"
    return first, ""


def _size(site: Site, rank: int) -> int:
    """Number of elements of an adapter."""
    return sum(map(math.prod, site.shapes(rank)))


def _check_shapes(path: str, site: Site, factors: dict[str, Any]) -> None:
    a, b = (jnp.shape(factors[name]) for name in "ab")
    rank = a[-1] if a else 0
    if (a, b) != site.shapes(rank):
        wanted = " and ".join(map(str, site.shapes(rank)))
        raise ValueError(f"the adapter of '{path}' has shapes {a} and {b}, and needs {wanted}")


def _new(site: Site, rank: int, dtype: Any, key: jax.Array) -> dict[str, jax.Array]:
    shape_a, shape_b = site.shapes(rank)
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else site.dtype
    bound = 1 / math.sqrt(math.prod(site.sizes(site.contracted)))
    a = jax.random.uniform(key, shape_a, jnp.float32, -bound, bound).astype(dtype)
    return {"a": a, "b": jnp.zeros(shape_b, dtype)}
