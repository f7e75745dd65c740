"""What rewriting gains for single operations: each beside plain JAX, in turn.

``python -m experiments.rewrites`` writes ``experiments/results/rewrites.md``: milliseconds (median,
10th and 90th percentile) and temporary memory of operations as networks have them, compiled as
they are and through `pockjax.rewrite`. Results are compared before anything is timed. Large pages
make a difference: ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` in the environment.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax

import pockjax as pj
from pockjax._files import replacing

FAR = 2e-5
"""The largest difference that passes, over the largest number of a result."""


@dataclass(frozen=True)
class Config:
    """How to measure.

    Attributes:
        rounds: how often each program runs, in turn with the other.
        out: file for the table.
    """

    rounds: int = 40
    out: Path = Path("experiments/results/rewrites.md")


def operations() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Names, functions and their arguments."""
    generator = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    def pulled_back(fun: Callable[..., Any]) -> Callable[..., Any]:
        """The cotangents of all arguments."""
        return lambda ct, *args: jax.vjp(fun, *args)[1](ct)

    # MiniLM: 16 texts of 128 tokens, 12 heads of 32.
    heads = [array(16, 128, 12, 32) for _ in range(3)]
    bias = jnp.zeros((16, 1, 1, 128))

    def attention(*heads: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(*heads, bias=bias)

    yield "attention, 16 x 128, 12 heads of 32", attention, (*heads,)
    yield "its gradient", pulled_back(attention), (array(16, 128, 12, 32), *heads)

    def dense(weights: jax.Array, x: jax.Array) -> jax.Array:
        return x @ weights

    for inner, outer in [(384, 1536), (1536, 384)]:
        yield (
            f"gradient of dense weights, 16 x 128, {inner} to {outer}",
            lambda ct, weights, x: jax.vjp(lambda w: dense(w, x), weights)[1](ct)[0],
            (array(16, 128, outer), array(inner, outer), array(16, 128, inner)),
        )

    # SmolLM2: 256 tokens of width 576, 49,152 words.
    hidden, table = array(1, 256, 576), array(49_152, 576)
    labels = jnp.arange(256)[None] * 100

    def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
        logits = hidden @ table.T / 24
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    yield "gradient of a cross entropy of 49152 words", jax.grad(loss), (hidden, table)

    # ResNet-50: 8 images of 128 pixels.
    def pool(x: jax.Array) -> jax.Array:
        sides, edge = (1, 3, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
        return lax.reduce_window(x, -jnp.inf, lax.max, sides, (1, 2, 2, 1), edge)

    yield (
        "gradient of max pooling, 64 x 64 x 64",
        pulled_back(pool),
        (array(8, 32, 32, 64), array(8, 64, 64, 64)),
    )
    # ResNet-50's convolutions, then MobileNetV2's: pixels, channels in and out, window, stride.
    for pixels, inner, outer, side, stride in [
        (32, 64, 64, 3, 1), (16, 128, 128, 3, 1), (8, 256, 256, 3, 1), (4, 512, 512, 3, 1),
        (16, 256, 256, 3, 2), (8, 512, 512, 3, 2), (32, 24, 144, 1, 1), (8, 576, 96, 1, 1),
    ]:  # fmt: skip
        x, kernel = array(8, pixels, pixels, inner), array(side, side, inner, outer)
        yield from convolution(x, kernel, stride, array)
    for pixels, channels, stride in [(64, 96, 2), (32, 144, 1), (8, 576, 1)]:
        x, kernel = array(8, pixels, pixels, channels), array(3, 3, 1, channels)
        yield from convolution(x, kernel, stride, array)

    def normed(x: jax.Array, kernel: jax.Array, *norm: jax.Array) -> jax.Array:
        mean, deviation, scale, bias = norm
        return jax.nn.relu6((x @ kernel - mean) / deviation * scale + bias)

    norm = (array(144), 1 + array(144) ** 2, array(144), array(144))
    yield (
        "product, frozen batch norm and relu6, 32 x 32 x 144",
        normed,
        (array(8, 32, 32, 24), array(24, 144), *norm),
    )


def convolution(
    x: jax.Array, kernel: jax.Array, stride: int, array: Callable[..., jax.Array]
) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """A convolution and its two gradients."""
    side, _, inner, outer = kernel.shape
    groups = x.shape[-1] // inner

    def fun(x: jax.Array, kernel: jax.Array) -> jax.Array:
        edge = (side // 2, side // 2)
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), (edge, edge), feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    what = f"{side}x{side} convolution, {x.shape[1]} x {x.shape[2]} x {x.shape[3]}"
    what = f"depthwise {what}" if groups > 1 else f"{what} to {outer}"
    what += f", stride {stride}" * (stride > 1)
    ct = array(*jax.eval_shape(fun, x, kernel).shape)
    yield what, fun, (x, kernel)
    yield (
        f"gradient of the input, {what}",
        lambda ct, x, kernel: jax.vjp(lambda x: fun(x, kernel), x)[1](ct)[0],
        (ct, x, kernel),
    )
    yield (
        f"gradient of the kernel, {what}",
        lambda ct, x, kernel: jax.vjp(lambda kernel: fun(x, kernel), kernel)[1](ct)[0],
        (ct, x, kernel),
    )


def compare(fun: Callable[..., Any], args: tuple[Any, ...], rounds: int) -> list[str]:
    """Milliseconds and temporary megabytes without and with rewriting, and their ratio.

    Raises:
        AssertionError: the two do not compute the same.
    """
    both = [jax.jit(f).lower(*args).compile() for f in (fun, pj.rewrite(fun))]
    plain, ours = (jax.tree.leaves(program(*args)) for program in both)
    for a, b in zip(plain, ours, strict=True):
        apart = float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a)))
        assert apart < FAR, f"results differ by {apart}"
    taken: list[list[float]] = [[], []]
    for _ in range(rounds):
        for program, times in zip(both, taken, strict=True):
            jax.block_until_ready(program(*args))  # what the other left in the cache is not needed
            begun = time.perf_counter()
            jax.block_until_ready(program(*args))
            times.append(1e3 * (time.perf_counter() - begun))
    row = []
    for program, times in zip(both, taken, strict=True):
        low, median, high = np.percentile(times, [10, 50, 90])
        analysis: Any = program.memory_analysis()
        row += [
            f"{median:.2f} ({low:.2f}–{high:.2f})",
            f"{analysis.temp_size_in_bytes / 1e6:.1f}",
        ]
    return [*row, f"{np.median(taken[0]) / np.median(taken[1]):.2f}"]


def main(config: Config) -> None:
    """Measure, print and write."""
    head = ["operation", "JAX, ms", "temp, MB", "rewritten, ms", "temp, MB", "JAX ÷ rewritten"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, fun, args in operations():
        lines.append("| " + " | ".join([name, *compare(fun, args, config.rounds)]) + " |")
        print(lines[-1], flush=True)
    with replacing(config.out) as path:
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    pj.keep_memory()
    main(tyro.cli(Config))
