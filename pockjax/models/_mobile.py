"""What MobileNetV2, EfficientNet-Lite and MCUNet share: a chain of inverted bottlenecks.

The parameters' paths, which schemes match, are

    stem/conv/kernel                                        stem/norm/{scale,bias}
    blocks/K/{expand,depthwise,project}/conv/kernel         blocks/K/.../norm/{scale,bias}
    head/conv/kernel                                        head/norm/{scale,bias}
    classifier/{kernel,bias}

and, where batch norms are folded, `.../conv/{kernel,bias}` without `.../norm`.
"""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from pockjax.models._blocks import ConvNorm, Padding, classifier, pool


@dataclass(frozen=True)
class Block:
    """The shape of an inverted bottleneck.

    Attributes:
        expanded: Channels of the depthwise convolution.
        kernel: Height and width of its kernel.
        stride: Its stride.
        channels: Channels that go out.
        expand: Whether a pointwise convolution makes the `expanded` channels; the first block of
            these networks takes them as they come.
    """

    expanded: int
    kernel: int
    stride: int
    channels: int
    expand: bool = True


@dataclass(frozen=True)
class Mobile:
    """The shape of a network.

    Attributes:
        stem: Channels of the first convolution, which is 3 x 3 with stride 2.
        blocks: The inverted bottlenecks.
        head: Channels of the pointwise convolution before the classifier; 0 for none.
        classes: Outputs of the classifier.
        padding: See `ConvNorm`.
        norm_epsilon: Of the batch norms; None if they are folded.
    """

    stem: int
    blocks: tuple[Block, ...]
    head: int
    classes: int
    padding: Padding = "centered"
    norm_epsilon: float | None = 1e-5

    @property
    def features(self) -> int:
        """Inputs of the classifier."""
        return self.head or self.blocks[-1].channels


class InvertedBottleneck(nnx.Module):
    """Pointwise expansion, depthwise convolution, pointwise projection, and the sum with the input.

    The input is added where it has the output's shape.
    """

    def __init__(self, inputs: int, shape: Block, config: Mobile, *, rngs: nnx.Rngs) -> None:
        """Make the three convolutions."""
        common: dict[str, Any] = {
            "padding": config.padding,
            "norm_epsilon": config.norm_epsilon,
            "rngs": rngs,
        }
        inner = shape.expanded
        if shape.expand:
            self.expand = ConvNorm(inputs, inner, 1, activation=jax.nn.relu6, **common)
        self.depthwise = ConvNorm(
            inner,
            inner,
            shape.kernel,
            stride=shape.stride,
            groups=inner,
            activation=jax.nn.relu6,
            **common,
        )
        self.project = ConvNorm(inner, shape.channels, 1, **common)
        self.adds_input = shape.stride == 1 and inputs == shape.channels

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch new_height new_width channels"]:
        """Transform feature maps."""
        y = self.expand(x) if hasattr(self, "expand") else x
        y = self.project(self.depthwise(y))
        return x + y if self.adds_input else y


class MobileNet(nnx.Module):
    """Stem, inverted bottlenecks, head, mean over the pixels, linear classifier."""

    def __init__(self, config: Mobile, *, rngs: nnx.Rngs) -> None:
        """Make a network with random weights."""
        common: dict[str, Any] = {
            "activation": jax.nn.relu6,
            "padding": config.padding,
            "norm_epsilon": config.norm_epsilon,
            "rngs": rngs,
        }
        self.stem = ConvNorm(3, config.stem, 3, stride=2, **common)
        blocks, channels = [], config.stem
        for shape in config.blocks:
            blocks.append(InvertedBottleneck(channels, shape, config, rngs=rngs))
            channels = shape.channels
        self.blocks = nnx.List(blocks)
        if config.head:
            self.head = ConvNorm(channels, config.head, 1, **common)
        self.classifier = classifier(config.features, config.classes, rngs)

    def features(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch features"]:
        """What the classifier sees of each image."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return pool(self.head(x) if hasattr(self, "head") else x)

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch classes"]:
        """The classifier's logits for each image."""
        return self.classifier(self.features(images))


def round_channels(channels: float) -> int:
    """The multiple of 8 nearest to a number of channels, but not more than a tenth below it.

    >>> round_channels(32 * 0.35), round_channels(24 * 0.35)
    (16, 8)
    """
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
