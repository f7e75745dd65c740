"""What the machine allows: the time of a step's matrix products alone, and of its memory traffic.

``python -m experiments.speed.limits FOLDER`` prints, for the problem in a folder that
`experiments.speed.problem.write` made, the rate of products and of memory, and how long the
products of the forward pass and of the whole step take when each runs alone, its operands in the
cache as far as they fit. Convolutions that are still there after the rewrites count as products.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cpuinfo import get_cpu_info

import pockjax as pj
from experiments.speed.problem import Problem, read
from pockjax.costs import count_flops

PRODUCTS = ("dot_general", "conv_general_dilated")
REPEATS = 9


def products(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """All products of a jaxpr and how often each runs."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in PRODUCTS:
            yield eqn, times
        often = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for inner in _inner(eqn):
            yield from products(inner, often)


def _inner(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def best_of(run: Callable[[], Any], least: float = 2e-3) -> float:
    """Seconds of a call: the median over repeats that take at least `least` seconds each."""
    run()
    begun = time.perf_counter()
    run()
    count = max(1, int(least / max(time.perf_counter() - begun, 1e-6)))
    taken = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        for _ in range(count):
            run()
        taken.append((time.perf_counter() - begun) / count)
    return float(np.median(taken))


def alone(eqn: Any, overhead: float) -> float:
    """Seconds of one product on its own, less what any call costs."""
    generator = np.random.default_rng(0)
    given = [
        jnp.asarray(generator.normal(size=v.aval.shape), v.aval.dtype) for v in eqn.invars
    ]  # random, because products with zeros may be faster
    fun = jax.jit(lambda *xs: eqn.primitive.bind(*xs, **eqn.params)).lower(*given).compile()
    return max(best_of(lambda: jax.block_until_ready(fun(*given))) - overhead, 0.0)


def floor(fun: Callable[..., Any], args: Any, overhead: float, known: dict[str, float]) -> Any:
    """Seconds of the products of ``fun(*args)``, their number, and their operations."""
    counted: Counter[str] = Counter()
    for eqn, times in products(jax.make_jaxpr(fun)(*args)):
        signature = (
            f"{[v.aval.str_short() for v in eqn.invars]} {sorted(eqn.params.items(), key=str)}"
        )
        if signature not in known:
            known[signature] = alone(eqn, overhead)
        counted[signature] += times
    seconds = sum(known[s] * times for s, times in counted.items())
    return {"seconds": seconds, "products": sum(counted.values()), "kinds": len(counted)}


def product_flops(fun: Callable[..., Any], args: Any) -> int:
    """Operations of the products of ``fun(*args)`` alone."""
    jaxpr = jax.make_jaxpr(fun)(*args)
    total = 0
    for eqn, times in products(jaxpr):
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        one = jax.make_jaxpr(lambda *xs, eqn=eqn: eqn.primitive.bind(*xs, **eqn.params))(*shapes)
        total += times * count_flops(one)
    return total


def machine(size: int = 2048, words: int = 2**25) -> dict[str, float]:
    """Operations a second of a large square product, and bytes a second of a sum in place."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    rate = 2 * size**3 / best_of(lambda: jax.block_until_ready(multiply(a, a)))
    add = jax.jit(jnp.add, donate_argnums=0)
    held, other = jnp.zeros(words), jnp.ones(words)

    def once() -> None:
        nonlocal held
        held = jax.block_until_ready(add(held, other))

    return {"flops_per_second": rate, "bytes_per_second": 3 * held.nbytes / best_of(once)}


def processor() -> str:
    """What is known of the processor, in words."""
    known = get_cpu_info()
    words = [known.get("brand_raw", "unknown")]
    words += [f"{name} {known[name]}" for name in ("family", "model", "stepping") if name in known]
    return ", ".join([*words, known.get("hz_advertised_friendly", "")]).rstrip(", ")


def main(folder: Path) -> None:
    """Measure and print."""
    problem = Problem(**json.loads((folder / "question.json").read_text()))
    loss, params, batch = read(problem, folder)
    tiny = jax.jit(lambda x: x + 1).lower(jnp.zeros(())).compile()
    zero = jnp.zeros(())
    overhead = best_of(lambda: jax.block_until_ready(tiny(zero)))
    mask = pj.mask(params, problem.rules)
    known: dict[str, float] = {}
    found: dict[str, Any] = {"machine": {"processor": processor(), **machine()}}
    for name, fun in {
        "forward": pj.rewrite(loss),
        "step": pj.rewrite(pj.value_and_grad(loss, mask)),
    }.items():
        found[name] = floor(fun, (params, *batch), overhead, known)
        found[name]["flops"] = product_flops(fun, (params, *batch))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    pj.keep_memory()
    main(Path(sys.argv[1]))
