"""ResNets (He et al., CVPR 2016, arXiv:1512.03385), for CIFAR and for ImageNet.

The parameters' paths, which schemes match, are

    stem/conv/kernel                            stem/norm/{scale,bias}
    stages/S/B/conv{1,2,3}/conv/kernel          stages/S/B/conv{1,2,3}/norm/{scale,bias}
    stages/S/B/downsample/conv/kernel           stages/S/B/downsample/norm/{scale,bias}
    classifier/{kernel,bias}

`conv3` is there in bottleneck blocks alone, `downsample` where the shape changes and the shortcut
is not merely padded.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pockjax.models._blocks import ConvNorm, classifier, pool
from pockjax.models._preprocess import IMAGENET_MEAN, IMAGENET_STD, ImagePreprocess
from pockjax.models._pretrained import classifier_names, conv_norm_names, load_network
from pockjax.models._registry import register

_BOTTLENECK = 4  # how many times wider a bottleneck block ends than its inner convolution is


@dataclass(frozen=True)
class ResNetConfig:
    """A network of the family.

    Attributes:
        blocks: Number of blocks in each stage.
        width: Channels of the first stage's 3 x 3 convolutions; they double from stage to stage.
        block: "basic" (two 3 x 3) or "bottleneck" (1 x 1, 3 x 3, 1 x 1).
        stem: "cifar" (3 x 3) or "imagenet" (7 x 7 with stride 2, then max pooling).
        shortcut: Where the shape changes: a 1 x 1 convolution ("project"), or every second pixel
            and zeros for the new channels ("pad", the paper's option A).
        classes: Outputs of the classifier.
        image: Height and width of the images that it is meant for, in pixels.
    """

    blocks: tuple[int, ...]
    width: int
    block: Literal["basic", "bottleneck"]
    stem: Literal["cifar", "imagenet"]
    shortcut: Literal["project", "pad"]
    classes: int
    image: int

    @property
    def features(self) -> int:
        """Inputs of the classifier."""
        last = self.width * 2 ** (len(self.blocks) - 1)
        return last * _BOTTLENECK if self.block == "bottleneck" else last


def _cifar(layers: int) -> ResNetConfig:
    return ResNetConfig(((layers - 2) // 6,) * 3, 16, "basic", "cifar", "pad", 10, 32)


RESNET_20 = _cifar(20)
RESNET_56 = _cifar(56)
RESNET_18 = ResNetConfig((2, 2, 2, 2), 64, "basic", "imagenet", "project", 1000, 224)
RESNET_50 = ResNetConfig((3, 4, 6, 3), 64, "bottleneck", "imagenet", "project", 1000, 224)


class ResidualBlock(nnx.Module):
    """Two or three convolutions and the sum with what came in."""

    def __init__(
        self, inputs: int, width: int, stride: int, config: ResNetConfig, *, rngs: nnx.Rngs
    ) -> None:
        """Make the convolutions; `width` is that of the 3 x 3 ones."""
        if config.block == "basic":
            outputs = width
            self.conv1 = ConvNorm(
                inputs, width, 3, stride=stride, activation=jax.nn.relu, rngs=rngs
            )
            self.conv2 = ConvNorm(width, outputs, 3, rngs=rngs)
        else:
            outputs = width * _BOTTLENECK
            self.conv1 = ConvNorm(inputs, width, 1, activation=jax.nn.relu, rngs=rngs)
            self.conv2 = ConvNorm(width, width, 3, stride=stride, activation=jax.nn.relu, rngs=rngs)
            self.conv3 = ConvNorm(width, outputs, 1, rngs=rngs)
        self.stride = stride
        self.new_channels = outputs - inputs
        if (stride != 1 or self.new_channels) and config.shortcut == "project":
            self.downsample = ConvNorm(inputs, outputs, 1, stride=stride, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch new_height new_width outputs"]:
        """Transform feature maps."""
        y = self.conv2(self.conv1(x))
        if hasattr(self, "conv3"):
            y = self.conv3(y)
        return jax.nn.relu(y + self.shortcut(x))

    def shortcut(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch new_height new_width outputs"]:
        """What came in, brought into the shape of what goes out."""
        if hasattr(self, "downsample"):
            return self.downsample(x)
        before = self.new_channels // 2
        channels = (before, self.new_channels - before)
        return jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), channels))


class ResNet(nnx.Module):
    """Stem, stages of residual blocks, mean over the pixels, linear classifier.

    Example:
        >>> model = ResNet(RESNET_20, rngs=nnx.Rngs(0))
        >>> model(np.zeros((2, 32, 32, 3), np.float32)).shape
        (2, 10)
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs) -> None:
        """Make a network with random weights; `load_resnet` has trained ones."""
        size, stride = (3, 1) if config.stem == "cifar" else (7, 2)
        channels, relu = config.width, jax.nn.relu
        self.stem = ConvNorm(3, channels, size, stride=stride, activation=relu, rngs=rngs)
        self.pools_early = config.stem == "imagenet"
        stages = []
        for s, count in enumerate(config.blocks):
            width, blocks = config.width * 2**s, []
            for b in range(count):
                stride = 2 if s > 0 and b == 0 else 1
                blocks.append(ResidualBlock(channels, width, stride, config, rngs=rngs))
                channels = width * (_BOTTLENECK if config.block == "bottleneck" else 1)
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.classifier = classifier(config.features, config.classes, rngs)

    def features(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch features"]:
        """What the classifier sees of each image."""
        x = self.stem(images)
        if self.pools_early:
            # flax takes pairs of numbers too, which its annotation does not say.
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return pool(x)

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch classes"]:
        """The classifier's logits for each image."""
        return self.classifier(self.features(images))


def load_resnet(
    file: str | os.PathLike[str],
    config: ResNetConfig,
    *,
    classes: int | None = None,
    rngs: nnx.Rngs,
) -> ResNet:
    """Build a ResNet from weights with torchvision's names, or those of pytorch_resnet_cifar10.

    Args:
        file: Safetensors, or written by `torch.save`.
        config: The network of the weights.
        classes: Outputs of a new classifier; None keeps the one in the file.
        rngs: For the new classifier.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: It cannot be read, or does not fit.
    """
    return load_network(
        lambda: ResNet(config, rngs=nnx.Rngs(0)),
        published_names(config),
        Path(file),
        classes=classes,
        rngs=rngs,
    )


def published_names(config: ResNetConfig) -> dict[str, str]:
    """Map each array's path to its name in the published files."""
    names = conv_norm_names("stem", "conv1", "bn1")
    for s, count in enumerate(config.blocks):
        for b in range(count):
            ours, theirs = f"stages/{s}/{b}", f"layer{s + 1}.{b}"
            for i in (1, 2, 3):
                names |= conv_norm_names(f"{ours}/conv{i}", f"{theirs}.conv{i}", f"{theirs}.bn{i}")
            down = f"{theirs}.downsample"
            names |= conv_norm_names(f"{ours}/downsample", f"{down}.0", f"{down}.1")
    return names | classifier_names("linear" if config.stem == "cifar" else "fc")


def _register(name: str, config: ResNetConfig, about: str, **where: str) -> None:
    size = config.image
    # Images of CIFAR are taken as they are; those of ImageNet are cut out of larger ones.
    resize = size if config.stem == "cifar" else 256

    @register(
        name,
        about=about,
        inputs=(jax.ShapeDtypeStruct((size, size, 3), np.dtype(np.float32)),),
        preprocess=ImagePreprocess(resize, size, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        **where,
    )
    def build(weights: Path | None, classes: int | None, rngs: nnx.Rngs) -> ResNet:
        if weights is None:
            return ResNet(replace(config, classes=classes or config.classes), rngs=rngs)
        return load_resnet(weights, config, classes=classes, rngs=rngs)


_CIFAR_ORIGIN = "https://github.com/akamaster/pytorch_resnet_cifar10"
_IMAGENET_ORIGIN = "https://docs.pytorch.org/vision/stable/models.html"
_register(
    "resnet20",
    RESNET_20,
    "image classifier: ResNet-20 for CIFAR-10, 270 k parameters",
    origin=_CIFAR_ORIGIN,
)
_register(
    "resnet56",
    RESNET_56,
    "image classifier: ResNet-56 for CIFAR-10, 853 k parameters",
    origin=_CIFAR_ORIGIN,
)
_register(
    "resnet18",
    RESNET_18,
    "image classifier: ResNet-18 for ImageNet, 11.7 M parameters",
    origin=_IMAGENET_ORIGIN,
)
_register(
    "resnet50",
    RESNET_50,
    "image classifier: ResNet-50 for ImageNet, 25.6 M parameters",
    origin=_IMAGENET_ORIGIN,
)
