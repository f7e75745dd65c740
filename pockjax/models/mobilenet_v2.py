"""MobileNetV2 (Sandler et al., CVPR 2018, arXiv:1801.04381), with a width multiplier.

Paths of the parameters: see `pockjax.models._mobile`.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from pockjax.models._mobile import Block, Mobile, MobileNet, round_channels
from pockjax.models._preprocess import IMAGENET_MEAN, IMAGENET_STD, ImagePreprocess
from pockjax.models._pretrained import classifier_names, conv_norm_names, load_network
from pockjax.models._registry import register

# The paper's table 2: expansion, channels, blocks, stride of the first of them.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


@dataclass(frozen=True)
class MobileNetV2Config:
    """A size of the family.

    Attributes:
        width: What all numbers of channels are multiplied by; the head never has fewer than 1280.
        classes: Outputs of the classifier.
    """

    width: float = 1.0
    classes: int = 1000

    @property
    def network(self) -> Mobile:
        """Every layer's shape."""
        stem = channels = round_channels(32 * self.width)
        blocks = []
        for expansion, base, count, stride in _STAGES:
            for k in range(count):
                out = round_channels(base * self.width)
                first = stride if k == 0 else 1
                blocks.append(Block(channels * expansion, 3, first, out, expand=expansion != 1))
                channels = out
        head = round_channels(1280 * max(1.0, self.width))
        return Mobile(stem, tuple(blocks), head, self.classes)


class MobileNetV2(MobileNet):
    """The network.

    Example:
        >>> model = MobileNetV2(MobileNetV2Config(width=0.35, classes=10), rngs=nnx.Rngs(0))
        >>> model(np.zeros((2, 32, 32, 3), np.float32)).shape
        (2, 10)
    """

    def __init__(self, config: MobileNetV2Config, *, rngs: nnx.Rngs) -> None:
        """Make a network with random weights; `load_mobilenet_v2` has trained ones."""
        super().__init__(config.network, rngs=rngs)


def load_mobilenet_v2(
    file: str | os.PathLike[str],
    *,
    width: float = 1.0,
    classes: int | None = None,
    rngs: nnx.Rngs,
) -> MobileNetV2:
    """Build a MobileNetV2 from weights with torchvision's names.

    Args:
        file: Safetensors, or written by `torch.save`.
        width: The width multiplier of the weights.
        classes: Outputs of a new classifier; None keeps the one in the file, of 1000 classes.
        rngs: For the new classifier.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: It cannot be read, or does not fit.
    """
    config = MobileNetV2Config(width)
    names = published_names(config)
    return load_network(
        lambda: MobileNetV2(config, rngs=nnx.Rngs(0)), names, Path(file), classes=classes, rngs=rngs
    )


def published_names(config: MobileNetV2Config) -> dict[str, str]:
    """Map each array's path to its name in torchvision's file."""
    names = conv_norm_names("stem", "features.0.0", "features.0.1")
    blocks = config.network.blocks
    for k, block in enumerate(blocks):
        inside = f"features.{k + 1}.conv"
        activated = ["expand", "depthwise"] if block.expand else ["depthwise"]
        for i, layer in enumerate(activated):
            names |= conv_norm_names(f"blocks/{k}/{layer}", f"{inside}.{i}.0", f"{inside}.{i}.1")
        last = len(activated)
        names |= conv_norm_names(f"blocks/{k}/project", f"{inside}.{last}", f"{inside}.{last + 1}")
    head = f"features.{len(blocks) + 1}"
    names |= conv_norm_names("head", f"{head}.0", f"{head}.1")
    return names | classifier_names("classifier.1")


def _register(name: str, config: MobileNetV2Config, about: str, **where: str) -> None:
    @register(
        name,
        about=about,
        inputs=(jax.ShapeDtypeStruct((224, 224, 3), np.dtype(np.float32)),),
        preprocess=ImagePreprocess(256, 224, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        **where,
    )
    def build(weights: Path | None, classes: int | None, rngs: nnx.Rngs) -> MobileNetV2:
        if weights is None:
            return MobileNetV2(replace(config, classes=classes or config.classes), rngs=rngs)
        return load_mobilenet_v2(weights, width=config.width, classes=classes, rngs=rngs)


_register(
    "mobilenet_v2",
    MobileNetV2Config(),
    "image classifier: MobileNetV2, 3.5 M parameters, ImageNet 71.9 %",
    source="mobilenet_v2",
    file="mobilenet_v2-b0353104.pth",
)
_register("mobilenet_v2-w0.5", MobileNetV2Config(0.5), "MobileNetV2 of half the width")
_register("mobilenet_v2-w0.35", MobileNetV2Config(0.35), "MobileNetV2 of 0.35 the width")
