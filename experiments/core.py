"""The figures of the core: FLOPs, residuals, parity, trace overhead and predicted memory.

``python -m experiments.core`` measures them all, prints them as a table and writes
``experiments/results/core.json``. Times are ratios of interleaved runs in one process.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import pockjax as pj
from experiments.exactness import sweep
from experiments.networks import (
    conv_net,
    conv_params,
    mlp,
    mlp_params,
    transformer,
    transformer_params,
)
from pockjax._files import replacing
from pockjax.costs import CompiledCost, tree_bytes


@dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        out: where to write the figures, as JSON and beside it as a table.
        repeats: interleaved repetitions of each timing.
        layers: layers of the transformer whose trace is timed.
        cases: random functions and masks to compare with the dense gradient.
        quick: a few repetitions and cases, to see that all of it runs.
    """

    out: Path = Path("experiments/results/core.json")
    repeats: int = 9
    layers: int = 30
    cases: int = 300
    quick: bool = False

    def __post_init__(self) -> None:
        """Fewer of everything for a quick run."""
        if self.quick:
            for name, most in (("repeats", 3), ("cases", 20)):
                object.__setattr__(self, name, min(most, getattr(self, name)))


@dataclass(frozen=True)
class Figure:
    """One measured number beside what it has to be.

    Attributes:
        name: what was measured.
        value: the number.
        limit: its upper limit.
        spread: lowest and highest of the repetitions, for timings.
    """

    name: str
    value: float
    limit: float
    spread: tuple[float, float] | None = None


def compiled_flops(fun: Callable[..., Any], *args: Any) -> float:
    """Operations of a compiled function, as XLA counts them."""
    analysis = jax.jit(fun).lower(*args).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def square(fun: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A loss of a network's output."""
    return lambda params, x: jnp.sum(fun(params, x) ** 2)


def flops_figures() -> Iterator[Figure]:
    """Training a part of the middle of three layers, against forward + dX above it + its dW."""
    batch, width, k = 64, 512, 64
    params, x = mlp_params(jax.random.key(0), [width] * 4), jnp.ones((batch, width))
    product = 2 * batch * width * width
    indices = np.random.default_rng(0).permutation(width)[:k]
    parts = {
        "input channels": (pj.part[:k], k / width),
        "output channels": (pj.part[:, :k], k / width),
        "block": (pj.part[:k, :k], (k / width) ** 2),
        "index array": (pj.part[indices], k / width),
    }
    for name, (part, share) in parts.items():
        mask = [False, {"kernel": part, "bias": False}, False]
        fun = pj.value_and_grad(square(mlp), mask)
        least = product * (3 + 1 + share)
        yield Figure(f"FLOPs, dense, {name}", compiled_flops(fun, params, x) / least, 1.02)

    channels, side, k = 64, 16, 16
    kernels, images = conv_params(jax.random.key(0), [channels] * 4), jnp.ones((4, side, side, 64))
    taps = (3 * side - 2) ** 2  # of nine at each position, those that meet no padding
    product = 2 * 4 * taps * channels * channels
    for name, part in {
        "input channels": pj.part[:, :, :k],
        "output channels": pj.part[..., :k],
    }.items():
        mask = [False, {"kernel": part, "bias": False}, False]
        fun = pj.value_and_grad(square(conv_net), mask)
        least = product * (3 + 1 + k / channels)
        yield Figure(
            f"FLOPs, convolution, {name}", compiled_flops(fun, kernels, images) / least, 1.02
        )


def block_figures() -> Iterator[Figure]:
    """Training a quarter of the input channels of ``up`` in the first of two transformer blocks."""
    tokens, width, heads, ffn = 64, 64, 4, 256
    params = transformer_params(jax.random.key(0), 2, width, ffn)
    mask = pj.mask(params, [("0/up/kernel", {"in": 0.25})])
    fun = pj.value_and_grad(square(lambda p, x: transformer(p, x, heads)), mask)
    found = product_flops(jax.make_jaxpr(fun)(params, jnp.ones((2, tokens, width))))
    projection, feed, mixing = (2 * 2 * tokens * n for n in (width**2, width * ffn, width * tokens))
    forward = 4 * projection + 2 * feed + 2 * mixing
    # Above up: of the first block dX of down, of the second dX of everything.
    least = 2 * forward + feed + (4 * projection + 2 * feed + 4 * mixing) + feed / 4
    yield Figure("FLOPs, transformer blocks, input channels of up", found / least, 1.02)


def scan_figures() -> Iterator[Figure]:
    """Training channels of the last two of six scanned layers; loops counted as they run."""
    layers, batch, width, k = 6, 64, 256, 32
    stack = jax.random.normal(jax.random.key(0), (layers, width, width)) / 16

    def loss(stack: jax.Array, x: jax.Array) -> jax.Array:
        out, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)
        return jnp.sum(out**2)

    product = 2 * batch * width * width
    for name, part, least in (
        ("last two layers", pj.part[4:], layers + 1 + 2),
        ("channels of the last two", pj.part[4:, :k], layers + 1 + 2 * k / width),
        ("channels of all", pj.part[:, :k], layers + 5 + 6 * k / width),
    ):
        traced = jax.make_jaxpr(pj.value_and_grad(loss, part))(stack, jnp.ones((batch, width)))
        ratio = product_flops(traced) / (product * least)
        yield Figure(f"FLOPs, split scan, {name}", ratio, 1.02)


def product_flops(jaxpr: Any) -> int:
    """Operations of the products in a jaxpr, loops times their length."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * int(np.prod([lhs[d] for d in contract]))
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inner = [j for j in jax.tree.leaves(list(eqn.params.values())) if hasattr(j, "eqns")]
        total += times * sum(map(product_flops, inner))
    return total


def residual_figures() -> Iterator[Figure]:
    """Bytes that ``vjp_fn`` holds beyond the params, against the least that is needed."""
    batch, width, count, k = 64, 256, 6, 32
    params, x = mlp_params(jax.random.key(0), [width] * (count + 1)), jnp.ones((batch, width))
    elements = batch * width
    masks = {
        # A byte for each element that a ReLU passes on.
        "biases": ({"kernel": False, "bias": True}, (count - 1) * elements),
        # The same, and the trained channels of every layer's input.
        "input channels": (
            {"kernel": pj.part[:k], "bias": False},
            (count - 1) * elements + count * 4 * batch * k,
        ),
        # Every layer's input; what a ReLU passes on follows from the input of the next layer.
        "whole kernels": ({"kernel": True, "bias": False}, count * 4 * elements),
    }
    for name, (layer, least) in masks.items():
        ratio = held_bytes(mlp, [layer] * count, params, x) / least
        yield Figure(f"residuals, MLP, {name}", ratio, 1.05)

    layers, tokens, width, heads, ffn = 4, 64, 64, 4, 256
    x = jnp.ones((2, tokens, width))
    # Of each block, for its gradient with respect to its input: both norms' inputs and statistics,
    # query, key, value, the attention's weights and its sums, and the argument of the GELU.
    rows, scores = 2 * tokens, 2 * heads * tokens * tokens
    least = layers * 4 * (rows * (2 * width + 4 + 3 * width + ffn) + scores + scores // tokens)
    for scanned in (False, True):
        params = transformer_params(jax.random.key(0), layers, width, ffn, scanned=scanned)
        mask = {"norm1": {"scale": False, "bias": True}}
        mask = {**jax.tree.map(lambda _: False, params if scanned else params[0]), **mask}
        fun = lambda params, x: transformer(params, x, heads)  # noqa: E731
        held = held_bytes(fun, mask if scanned else [mask] * layers, params, x)
        form = "scanned" if scanned else "unrolled"
        yield Figure(f"residuals, transformer, biases, {form}", held / least, 1.05)


def held_bytes(fun: Callable[..., Any], mask: Any, params: Any, x: jax.Array) -> int:
    """Bytes held by ``vjp_fn`` beyond the arrays of the params."""
    _, vjp_fn = pj.vjp(fun, mask, params, x)
    known = {id(leaf) for leaf in jax.tree.leaves(params)}
    return tree_bytes([leaf for leaf in jax.tree.leaves(vjp_fn) if id(leaf) not in known])


def parity_figures() -> Iterator[Figure]:
    """Whole leaves: what `jax.grad` of the sub-tree costs by hand."""
    params, x = mlp_params(jax.random.key(0), [256] * 7), jnp.ones((512, 256))
    chosen = [i >= 4 for i in range(len(params))]

    def by_hand(params: Any, x: jax.Array) -> Any:
        head, tail = params[:4], params[4:]
        return jax.value_and_grad(lambda tail: square(mlp)([*head, *tail], x))(tail)

    ours = jax.jit(pj.value_and_grad(square(mlp), chosen)).lower(params, x).compile()
    hand = jax.jit(by_hand).lower(params, x).compile()
    a, b = CompiledCost.of(ours).flops, CompiledCost.of(hand).flops
    yield Figure("whole leaves, FLOPs over jax.grad of the sub-tree", a / b, 1.0)
    a, b = CompiledCost.of(ours).temp_bytes, CompiledCost.of(hand).temp_bytes
    yield Figure("whole leaves, temp bytes over jax.grad of the sub-tree", a / b, 1.0)


def overhead_figures(config: Config) -> Iterator[Figure]:
    """Time to trace and rewrite, over the time `jax.grad` takes to trace."""
    width, heads, ffn = 64, 4, 256
    x = jnp.ones((2, 16, width))
    for scanned in (False, True):
        params = transformer_params(jax.random.key(0), config.layers, width, ffn, scanned=scanned)
        frozen = jax.tree.map(lambda _: False, params if scanned else params[0])

        def trained(part: pj.Part) -> Any:
            return {**frozen, "query": {"kernel": part, "bias": False}}  # noqa: B023

        if scanned:
            masks = {
                "channels of all layers": trained(pj.part[:, :16]),
                "the last eight layers": trained(pj.part[-8:]),
            }
        else:
            channels = trained(pj.part[:16])
            last = [channels if i >= config.layers - 8 else False for i in range(config.layers)]
            masks = {
                "channels of all layers": [channels] * config.layers,
                "the last eight layers": last,
            }
        for name, mask in masks.items():

            def trace(grad: Callable[..., Any]) -> None:
                # A function of its own, so that nothing is found in a cache.
                loss = square(lambda p, x: transformer(p, x, heads))
                jax.jit(grad(loss)).trace(params, x)  # noqa: B023

            ratios = ratio_of_times(
                lambda: trace(lambda loss: pj.grad(loss, mask)),  # noqa: B023
                lambda: trace(jax.grad),  # noqa: B023
                config.repeats,
            )
            form = "scanned" if scanned else "unrolled"
            yield Figure(
                f"trace time over jax.grad's, {config.layers} layers {form}, {name}",
                float(np.median(ratios)), 2.0, (min(ratios), max(ratios)),
            )  # fmt: skip


def ratio_of_times(
    ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int
) -> Sequence[float]:
    """Ratio of the CPU times of two calls, in turn, repeatedly; the first is dropped."""
    ratios = []
    for _ in range(repeats + 1):
        times = []
        for call in (ours, theirs):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        ratios.append(times[0] / times[1])
    return ratios[1:]


def step_figures() -> Iterator[Figure]:
    """A compiled step: memory predicted over compiled, and what fixed residuals save."""
    params, x = mlp_params(jax.random.key(0), [512] * 9), jnp.ones((1024, 512))
    for name, layer in {
        "biases": {"kernel": False, "bias": True},
        "input channels": {"kernel": pj.part[:32], "bias": False},
        "everything": True,
    }.items():
        step = pj.compile(square(mlp), [layer] * 8, optax.sgd(0.1), params, x, residuals="auto")
        compiled, variants = step.report.compiled, step.report.variants
        yield Figure(
            f"temp bytes predicted over compiled, MLP, {name}",
            (step.report.temp_bytes or 0) / compiled.temp_bytes, 1.3,
        )  # fmt: skip
        yield Figure(
            f"step memory, residuals kept over left to XLA, MLP, {name}",
            variants["kept"] / variants["xla"], 1.0,
        )  # fmt: skip


def exactness_figures(config: Config) -> Iterator[Figure]:
    """Random functions and masks of the tests, against the dense gradient."""
    found = sweep(config.cases)
    yield Figure(f"largest error of {found.cases} gradients, in roundings", found.roundings, 8)
    different = found.evaluated - found.values
    yield Figure(f"of {found.evaluated} values, not bit-equal to the function's", different, 0)


def compile_figures() -> Iterator[Figure]:
    """Traces and compilations of one step that runs with other indices and learning rates."""
    traces, compiles = [], []

    def loss(params: Any, x: jax.Array) -> jax.Array:
        traces.append(x.shape)
        return square(mlp)(params, x)

    def listener(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiles.append(event)

    def mask(*indices: int) -> Any:
        return [{"kernel": pj.part[jnp.array(indices)], "bias": False}, True]

    params, x = mlp_params(jax.random.key(0), [32] * 3), jnp.ones((8, 32))
    masks = [mask(0, 1, 2), mask(9, 30, 4), mask(7, 8, 31)]
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    jax.monitoring.register_event_duration_secs_listener(listener)
    step = pj.compile(loss, masks[0], tx, params, x)
    built = len(compiles)
    state = step.init(params)
    for chosen in masks:
        state = step.reselect(state, chosen)
        state.opt_state.hyperparams["learning_rate"] = jnp.float32(0.05)
        state = jax.block_until_ready(state)
        before = len(compiles)
        state, _ = jax.block_until_ready(step(state, x))
        built += len(compiles) - before
    jax.monitoring.unregister_event_duration_listener(listener)
    yield Figure("traces of the loss, three selections and rates", len(traces), 1)
    yield Figure("compilations of the step, three selections and rates", built, 1)


def markdown(figures: Sequence[Figure]) -> str:
    """The figures as a table."""
    lines = ["| figure | measured | spread | limit |", "|---|---:|---:|---:|"]
    for f in figures:
        spread = f"{f.spread[0]:.2f}–{f.spread[1]:.2f}" if f.spread else ""
        lines.append(f"| {f.name} | {f.value:.4g} | {spread} | {f.limit:g} |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Measures, prints and writes every figure."""
    figures: list[Figure] = []
    parts = (
        flops_figures(), block_figures(), scan_figures(), residual_figures(), parity_figures(),
        step_figures(), compile_figures(), overhead_figures(config), exactness_figures(config),
    )  # fmt: skip
    for part in parts:
        for figure in part:
            figures.append(figure)
            mark = "" if figure.value <= figure.limit * (1 + 1e-9) else "  over the limit"
            print(f"{figure.value:8.4g}  (limit {figure.limit:g})  {figure.name}{mark}", flush=True)
    where = f"jax {jax.__version__}, {jax.default_backend()}, {platform.machine()}"
    data = {"where": where, "figures": [asdict(figure) for figure in figures]}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(config.out) as path:
        Path(path).write_text(json.dumps(data, indent=2) + "\n")
    with replacing(config.out.with_suffix(".md")) as path:
        Path(path).write_text(f"Measured with {where}.\n\n{markdown(figures)}")


if __name__ == "__main__":
    main(tyro.cli(Config))
