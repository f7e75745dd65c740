"""EfficientNet-Lite 0 to 4: EfficientNet (arXiv:1905.11946) without squeeze-and-excitation, ReLU6.

As published in https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
Paths of the parameters: see `pockjax.models._mobile`.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from pockjax.models._mobile import Block, Mobile, MobileNet, round_channels
from pockjax.models._preprocess import ImagePreprocess
from pockjax.models._pretrained import classifier_names, conv_norm_names, load_network
from pockjax.models._registry import register

# Kernel, stride of the first block, expansion, channels, blocks.
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


@dataclass(frozen=True)
class EfficientNetLiteConfig:
    """A size of the family.

    Attributes:
        width: What the numbers of channels are multiplied by, but not in the stem and the head.
        depth: What the numbers of blocks are multiplied by, but not in the first and last stage.
        image: Height and width that the weights were trained for, in pixels.
        classes: Outputs of the classifier.
    """

    width: float = 1.0
    depth: float = 1.0
    image: int = 224
    classes: int = 1000

    @property
    def network(self) -> Mobile:
        """Every layer's shape."""
        stem = channels = 32
        blocks = []
        for stage, (kernel, stride, expansion, base, count) in enumerate(_STAGES):
            if 0 < stage < len(_STAGES) - 1:
                count = math.ceil(count * self.depth)
            for k in range(count):
                out = round_channels(base * self.width)
                first = stride if k == 0 else 1
                expanded = channels * expansion
                blocks.append(Block(expanded, kernel, first, out, expand=expansion != 1))
                channels = out
        return Mobile(stem, tuple(blocks), 1280, self.classes, padding="same", norm_epsilon=1e-3)


LITE_0 = EfficientNetLiteConfig(1.0, 1.0, 224)
LITE_1 = EfficientNetLiteConfig(1.0, 1.1, 240)
LITE_2 = EfficientNetLiteConfig(1.1, 1.2, 260)
LITE_3 = EfficientNetLiteConfig(1.2, 1.4, 280)
LITE_4 = EfficientNetLiteConfig(1.4, 1.8, 300)


class EfficientNetLite(MobileNet):
    """The network.

    Example:
        >>> model = EfficientNetLite(EfficientNetLiteConfig(classes=10), rngs=nnx.Rngs(0))
        >>> model(np.zeros((2, 32, 32, 3), np.float32)).shape
        (2, 10)
    """

    def __init__(self, config: EfficientNetLiteConfig, *, rngs: nnx.Rngs) -> None:
        """Make a network with random weights; `load_efficientnet_lite` has trained ones."""
        super().__init__(config.network, rngs=rngs)


def load_efficientnet_lite(
    file: str | os.PathLike[str],
    config: EfficientNetLiteConfig = LITE_0,
    *,
    classes: int | None = None,
    rngs: nnx.Rngs,
) -> EfficientNetLite:
    """Build an EfficientNet-Lite from weights with the names of efficientnet-pytorch.

    Args:
        file: Safetensors, or written by `torch.save`.
        config: The size of the weights.
        classes: Outputs of a new classifier; None keeps the one in the file.
        rngs: For the new classifier.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: It cannot be read, or does not fit.
    """
    return load_network(
        lambda: EfficientNetLite(config, rngs=nnx.Rngs(0)),
        published_names(config),
        Path(file),
        classes=classes,
        rngs=rngs,
    )


def published_names(config: EfficientNetLiteConfig) -> dict[str, str]:
    """Map each array's path to its name in files of efficientnet-pytorch."""
    names = conv_norm_names("stem", "_conv_stem", "_bn0")
    for k, block in enumerate(config.network.blocks):
        layers = {"depthwise": 1, "project": 2} | ({"expand": 0} if block.expand else {})
        for layer, norm in layers.items():
            inside = f"_blocks.{k}"
            names |= conv_norm_names(
                f"blocks/{k}/{layer}", f"{inside}._{layer}_conv", f"{inside}._bn{norm}"
            )
    names |= conv_norm_names("head", "_conv_head", "_bn1")
    return names | classifier_names("_fc")


_MEAN = (127 / 255, 127 / 255, 127 / 255)
_STD = (128 / 255, 128 / 255, 128 / 255)


def _register(name: str, config: EfficientNetLiteConfig, about: str, **where: str) -> None:
    size = config.image

    @register(
        name,
        about=about,
        inputs=(jax.ShapeDtypeStruct((size, size, 3), np.dtype(np.float32)),),
        preprocess=ImagePreprocess(size + 32, size, mean=_MEAN, std=_STD, interpolation="bicubic"),
        **where,
    )
    def build(weights: Path | None, classes: int | None, rngs: nnx.Rngs) -> EfficientNetLite:
        if weights is None:
            return EfficientNetLite(replace(config, classes=classes or config.classes), rngs=rngs)
        return load_efficientnet_lite(weights, config, classes=classes, rngs=rngs)


_register(
    "efficientnet_lite0",
    LITE_0,
    "image classifier: EfficientNet-Lite0, 4.7 M parameters, ImageNet 75.1 %",
    source="efficientnet_lite0",
    file="efficientnet-lite0-57934424.pth",
)
_register("efficientnet_lite1", LITE_1, "image classifier: EfficientNet-Lite1, 5.4 M parameters")
_register("efficientnet_lite2", LITE_2, "image classifier: EfficientNet-Lite2, 6.1 M parameters")
_register("efficientnet_lite3", LITE_3, "image classifier: EfficientNet-Lite3, 8.2 M parameters")
_register("efficientnet_lite4", LITE_4, "image classifier: EfficientNet-Lite4, 13.0 M parameters")
