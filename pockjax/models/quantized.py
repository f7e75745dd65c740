"""Networks of int8 weights and activations, in the integer arithmetic that devices run.

A grid maps an int8 value q to the real number (q - zero) * scale. A layer computes

    q_out = clip(round((sum (q_in - zero_in) * kernel + bias) * m) + zero_out, -128, 127)

with m = scale_in * scale_kernel / scale_out, one per output channel; ReLU6 is what the clipping
does. The sum is exact, the product with m is float32, and rounding is to even; with other precision
a value in some ten thousand rounds the other way, which the layers after it amplify. A gradient
passes through the rounding (and is stopped by the clipping), so that the graph can be trained:
arXiv:2206.15472, section 3.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pockjax.models._blocks import classifier
from pockjax.models._mobile import Block, Mobile

_LOWEST, _HIGHEST = -128, 127


@dataclass(frozen=True)
class Grid:
    """The real numbers that int8 values stand for.

    Attributes:
        scale: Distance between neighbours.
        zero: The value that stands for 0.

    Example:
        >>> grid = Grid(scale=0.5, zero=-2)
        >>> grid.real(grid.integers(jnp.array([0.0, 0.7, 99.0])))
        Array([ 0. ,  0.5, 64.5], dtype=float32)
    """

    scale: float
    zero: int

    def integers(self, x: Array) -> Array:
        """The nearest values, as floats."""
        return _clip(round_through(x / self.scale) + self.zero)

    def real(self, q: Array) -> Array:
        """What values stand for."""
        return (q.astype(jnp.float32) - self.zero) * self.scale


@dataclass(frozen=True)
class Layer:
    """A layer as files describe it.

    Attributes:
        kernel: int8, of shape (height, width, inputs, outputs) or (inputs, outputs).
        bias: int32, one per output.
        kernel_scale: float32, one per output.
        input: The grid of what comes in.
        output: The grid of what goes out.
    """

    kernel: np.ndarray
    bias: np.ndarray
    kernel_scale: np.ndarray
    input: Grid
    output: Grid


@dataclass(frozen=True)
class QuantizedMobile:
    """A quantised chain of inverted bottlenecks.

    Attributes:
        network: The layers' shapes.
        layers: The layers, by their paths: "stem", "blocks/0/depthwise", …, "classifier".
        sums: For each block that adds its input, the grid of the sum.
    """

    network: Mobile
    layers: Mapping[str, Layer]
    sums: Mapping[int, Grid]


@jax.custom_jvp
def round_through(x: Array) -> Array:
    """Round to the nearest integer, to even where two are; the derivative is that of x."""
    return jnp.round(x)


round_through.defjvps(lambda tangent, rounded, x: tangent)


class Scale(nnx.Variable):
    """A scale of a quantised layer: fixed, neither trained nor a statistic."""


class Integers(nnx.Module):
    """The kernel and the bias of a layer, as integers."""

    def __init__(self, layer: Layer, dtype: Any) -> None:
        """Take them over.

        Args:
            layer: Where they are from.
            dtype: What holds the kernel; the bias is int32 if that is int8.
        """
        integer = jnp.issubdtype(dtype, jnp.integer)
        self.kernel = nnx.Param(jnp.asarray(layer.kernel, dtype))
        self.bias = nnx.Param(jnp.asarray(layer.bias, jnp.int32 if integer else dtype))


class QuantizedConv(nnx.Module):
    """A convolution of int8 by int8 to int8, with its bias; parameters `conv/{kernel,bias}`."""

    def __init__(self, layer: Layer, *, stride: int = 1, groups: int = 1, dtype: Any) -> None:
        """Take a layer over; `dtype` holds its kernel."""
        self.conv = Integers(layer, dtype)
        self.kernel_scale = Scale(jnp.asarray(layer.kernel_scale))
        self.input, self.output = layer.input, layer.output
        self.stride, self.groups = stride, groups

    def __call__(
        self, q: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch new_height new_width outputs"]:
        """Convolve int8 values, held in floats or integers; gives them the same way."""
        kernel = self.conv.kernel[...]
        wide = jnp.int32 if jnp.issubdtype(kernel.dtype, jnp.integer) else kernel.dtype
        border = kernel.shape[0] // 2
        sums = jax.lax.conv_general_dilated(
            q.astype(wide) - self.input.zero,  # so that padding with 0 pads with what stands for 0
            kernel.astype(wide),
            (self.stride, self.stride),
            [(border, border)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
            # Floats hold these integers exactly (they are below 2^24), if nobody shortens them.
            precision=jax.lax.Precision.HIGHEST,
        )
        return _rescale(sums, self.conv.bias[...], self).astype(q.dtype)


class QuantizedLinear(nnx.Module):
    """A linear layer of int8 by int8 to int8; parameters `{kernel,bias}`."""

    def __init__(self, layer: Layer, *, dtype: Any) -> None:
        """Take a layer over; `dtype` holds its kernel."""
        integers = Integers(layer, dtype)
        self.kernel, self.bias = integers.kernel, integers.bias
        self.kernel_scale = Scale(jnp.asarray(layer.kernel_scale))
        self.input, self.output = layer.input, layer.output

    def __call__(self, q: Float[Array, "batch inputs"]) -> Float[Array, "batch outputs"]:
        """Multiply int8 values, held in floats or integers; gives them the same way."""
        kernel = self.kernel[...]
        wide = jnp.int32 if jnp.issubdtype(kernel.dtype, jnp.integer) else kernel.dtype
        sums = jnp.matmul(
            q.astype(wide) - self.input.zero,
            kernel.astype(wide),
            precision=jax.lax.Precision.HIGHEST,
        )
        return _rescale(sums, self.bias[...], self).astype(q.dtype)


class QuantizedBottleneck(nnx.Module):
    """The quantised form of `InvertedBottleneck`."""

    def __init__(
        self, layers: Mapping[str, Layer], shape: Block, output: Grid | None, *, dtype: Any
    ) -> None:
        """Take the layers over.

        Args:
            layers: `depthwise`, `project`, and `expand` if there is one.
            shape: The block's shape.
            output: The grid of the sum with the input; None if that is not added.
            dtype: What holds the kernels.
        """
        if "expand" in layers:
            self.expand = QuantizedConv(layers["expand"], dtype=dtype)
        self.depthwise = QuantizedConv(
            layers["depthwise"], stride=shape.stride, groups=shape.expanded, dtype=dtype
        )
        self.project = QuantizedConv(layers["project"], dtype=dtype)
        self.input = layers["expand" if "expand" in layers else "depthwise"].input
        self.output = output

    def __call__(
        self, q: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch new_height new_width channels"]:
        """Transform int8 feature maps."""
        y = self.expand(q) if hasattr(self, "expand") else q
        y = self.project(self.depthwise(y))
        if self.output is None:
            return y
        total = self.project.output.real(y) + self.input.real(q)
        return self.output.integers(total).astype(q.dtype)


class QuantizedMobileNet(nnx.Module):
    """The quantised form of `MobileNet`; takes and gives real numbers.

    The parameters have the paths of the float network, and hold integers: kernels from -127 to 127,
    biases in units of the input's scale times the kernel's. In float32, the default, they can be
    trained (their gradients then want the scaling of arXiv:2206.15472, section 3.1); in int8 they
    take a quarter of the memory and the sums are integer arithmetic. The logits are the same.
    """

    def __init__(
        self,
        config: QuantizedMobile,
        *,
        dtype: Any = jnp.float32,
        classes: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Take the layers over.

        Args:
            config: The layers and their grids.
            dtype: What holds kernels and activations: float32, or int8.
            classes: Outputs of a new classifier, which is not quantised; None for the given one.
            rngs: For the new classifier.
        """
        layers = config.layers
        self.dtype = jnp.dtype(dtype)
        self.stem = QuantizedConv(layers["stem"], stride=2, dtype=dtype)
        self.blocks = nnx.List(
            [
                QuantizedBottleneck(
                    {
                        name: layers[f"blocks/{k}/{name}"]
                        for name in ("expand", "depthwise", "project")
                        if f"blocks/{k}/{name}" in layers
                    },
                    shape,
                    config.sums.get(k),
                    dtype=dtype,
                )
                for k, shape in enumerate(config.network.blocks)
            ]
        )
        self.pooled = layers["classifier"].input
        if classes is None:
            self.classifier = QuantizedLinear(layers["classifier"], dtype=dtype)
        else:
            self.classifier = classifier(config.network.features, classes, rngs)

    def features(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch features"]:
        """What the classifier sees of each image, as int8 values."""
        q = self.stem(self.stem.input.integers(images).astype(self.dtype))
        for block in self.blocks:
            q = block(q)
        mean = q.astype(jnp.float32).mean(axis=(1, 2))
        return round_through(mean).astype(self.dtype)

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch classes"]:
        """The classifier's logits for each image."""
        q = self.features(images)
        if isinstance(self.classifier, QuantizedLinear):
            return self.classifier.output.real(self.classifier(q))
        return self.classifier(self.pooled.real(q))


def _rescale(sums: Array, bias: Array, layer: QuantizedConv | QuantizedLinear) -> Array:
    """From sums of products to the output's grid."""
    scale = layer.kernel_scale[...] * jnp.float32(layer.input.scale / layer.output.scale)
    # In floats: channels that are always 0 have biases of 2^31, which int32 sums would wrap.
    total = sums.astype(jnp.float32) + bias.astype(jnp.float32)
    return _clip(round_through(total * scale) + layer.output.zero)


def _clip(q: Array) -> Array:
    return jnp.clip(q, _LOWEST, _HIGHEST)
