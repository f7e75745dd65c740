"""MCUNet: networks for microcontrollers, from the int8 weights published with MCUNetV3.

Three chains of inverted bottlenecks for ImageNet at 128 x 128 pixels, as published with
arXiv:2206.15472 (https://github.com/mit-han-lab/tiny-training), quantised after training. Here they
stand twice: as ordinary networks of float weights (`MCUNet`), and as the quantised graph that the
files describe, scales and zero points kept (`pockjax.models.quantized`).

The float networks have no batch norms, which were folded before the weights were quantised. Paths
of the parameters: see `pockjax.models._mobile`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from pockjax.models._mobile import Block, Mobile, MobileNet
from pockjax.models._preprocess import ImagePreprocess
from pockjax.models._pretrained import new_classifier
from pockjax.models._registry import register
from pockjax.models.quantized import Grid, Layer, QuantizedMobile, QuantizedMobileNet
from pockjax.weights import WeightsError, fill, from_torch, read_torch

ORIGIN = "https://github.com/mit-han-lab/tiny-training"


@dataclass(frozen=True)
class MCUNetConfig:
    """A network of the family.

    Attributes:
        blocks: The inverted bottlenecks: expanded channels / kernel / stride / channels of each.
        stem: Channels of the first convolution.
        classes: Outputs of the classifier.
    """

    blocks: str
    stem: int = 16
    classes: int = 1000

    @property
    def network(self) -> Mobile:
        """Every layer's shape."""
        numbers = [tuple(map(int, block.split("/"))) for block in self.blocks.split()]
        blocks = [Block(*shape, expand=k > 0) for k, shape in enumerate(numbers)]
        return Mobile(self.stem, tuple(blocks), 0, self.classes, norm_epsilon=None)


MCUNET_5FPS = MCUNetConfig(
    "16/3/1/8 32/3/2/16 48/3/1/16 48/7/2/24 120/3/1/24 120/3/2/40 160/7/1/40 160/5/1/48 "
    "144/3/1/48 192/3/1/48 240/7/2/96 384/5/1/96 384/5/1/96 576/3/1/160"
)
PROXYLESS_W03 = MCUNetConfig(
    "16/3/1/8 24/5/2/16 48/3/1/16 48/7/2/16 48/3/1/16 48/5/1/16 48/5/1/16 96/7/2/24 72/5/1/24 "
    "72/5/1/24 72/5/1/24 144/5/1/32 96/5/1/32 96/5/1/32 96/5/1/32 192/7/2/64 384/7/1/64 "
    "192/7/1/64 192/7/1/64 384/7/1/96"
)
MBV2_W035 = MCUNetConfig(
    "16/3/1/8 48/3/2/8 48/3/1/8 48/3/2/16 96/3/1/16 96/3/1/16 96/3/2/24 144/3/1/24 144/3/1/24 "
    "144/3/1/24 144/3/1/32 192/3/1/32 192/3/1/32 192/3/2/56 336/3/1/56 336/3/1/56 336/3/1/112"
)


class MCUNet(MobileNet):
    """The network in floats.

    Example:
        >>> model = MCUNet(replace(MCUNET_5FPS, classes=10), rngs=nnx.Rngs(0))
        >>> model(np.zeros((2, 32, 32, 3), np.float32)).shape
        (2, 10)
    """

    def __init__(self, config: MCUNetConfig, *, rngs: nnx.Rngs) -> None:
        """Make a network with random weights; `load_mcunet` has trained ones."""
        super().__init__(config.network, rngs=rngs)


def load_mcunet(
    file: str | os.PathLike[str],
    config: MCUNetConfig,
    *,
    classes: int | None = None,
    rngs: nnx.Rngs,
) -> MCUNet:
    """Build a network of float weights from a published int8 file.

    The weights are the rounded ones, so this start is slightly damaged. Activations are not
    rounded, so its logits are near to, but not those of the quantised graph.

    Args:
        file: One of the published pickles.
        config: The network of the weights.
        classes: Outputs of a new classifier; None keeps the one in the file, of 1000 classes.
        rngs: For the new classifier.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: It cannot be read, or does not fit.
    """
    file = Path(file)
    tensors = {}
    for path, layer in read_quantized(file, config).layers.items():
        where = path if path == "classifier" else f"{path}/conv"
        scale = layer.kernel_scale
        tensors[f"{where}/kernel"] = layer.kernel * scale
        tensors[f"{where}/bias"] = (layer.bias * (scale * layer.input.scale)).astype(np.float32)
    model = fill(
        lambda: MCUNet(config, rngs=nnx.Rngs(0)),
        {path: path for path in tensors},
        tensors,
        file=file,
        layout=lambda value: value,
        fresh=() if classes is None else ("classifier/",),
    )
    return model if classes is None else new_classifier(model, classes, rngs)


def load_quantized_mcunet(
    file: str | os.PathLike[str],
    config: MCUNetConfig,
    *,
    classes: int | None = None,
    dtype: Any = np.float32,
    rngs: nnx.Rngs,
) -> QuantizedMobileNet:
    """Build the quantised graph that a published int8 file describes.

    Args:
        file: One of the published pickles.
        config: The network of the weights.
        classes: Outputs of a new classifier, which is not quantised; None keeps the one in the
            file, of 1000 classes, which is.
        dtype: What holds the integers, see `QuantizedMobileNet`: float32 or int8.
        rngs: For the new classifier.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: It cannot be read, or does not fit.
    """
    quantized = read_quantized(Path(file), config)
    return QuantizedMobileNet(quantized, dtype=dtype, classes=classes, rngs=rngs)


# What the file calls the layers of a block.
_LAYERS = {"expand": "pointwise1", "depthwise": "depthwise", "project": "pointwise2"}


def read_quantized(file: Path, config: MCUNetConfig) -> QuantizedMobile:
    """The integers, scales and zero points of a published file.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: It cannot be read, or describes another network.
    """
    described = read_torch(file)
    try:
        blocks = described["blocks"]
        found = {"stem": described["first_conv"], "classifier": described["classifier"]}
        for k, block in enumerate(blocks):
            for ours, theirs in _LAYERS.items():
                found[f"blocks/{k}/{ours}"] = block[theirs]
        sums = {k: block["residual"] for k, block in enumerate(blocks)}
        quantized = QuantizedMobile(
            config.network,
            {path: _layer(path, given["params"]) for path, given in found.items() if given},
            {k: _grid(given["params"], "y") for k, given in sums.items() if given},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{file} is none of MCUNet's files: {error!r}") from error
    _check(quantized, config, file)
    return quantized


def _layer(path: str, params: Mapping[str, Any]) -> Layer:
    kernel = from_torch(params["weight"])
    return Layer(
        kernel=kernel[0, 0] if path == "classifier" else kernel,
        bias=params["bias"],
        kernel_scale=params["w_scales"],
        input=_grid(params, "x"),
        output=_grid(params, "y"),
    )


def _grid(params: Mapping[str, Any], which: str) -> Grid:
    return Grid(params[f"{which}_scale"], params[f"{which}_zero"])


def _check(quantized: QuantizedMobile, config: MCUNetConfig, file: Path) -> None:
    """Raise a `WeightsError` unless the layers are those of the network."""
    model = nnx.eval_shape(lambda: MCUNet(config, rngs=nnx.Rngs(0)))
    shapes = {
        "/".join(map(str, path)).removesuffix("/kernel").removesuffix("/conv"): variable.shape
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if path[-1] == "kernel"
    }
    for path in sorted(shapes.keys() | quantized.layers.keys()):
        layer = quantized.layers.get(path)
        found = None if layer is None else layer.kernel.shape
        if found != shapes.get(path):
            raise WeightsError(
                f"{file}: the kernel of {path} has shape {shapes.get(path)} in the model, and "
                f"shape {found} in the file"
            )
    if sums := quantized.sums.keys() ^ {k for k, b in enumerate(model.blocks) if b.adds_input}:
        raise WeightsError(f"{file} and the model differ in whether blocks {sums} add their input")


# The int8 input is the pixel less 128, with a scale of 2 / 255.
_MEAN = (128 / 255, 128 / 255, 128 / 255)
_STD = (0.5, 0.5, 0.5)


def _register(name: str, config: MCUNetConfig, about: str) -> None:
    common: dict[str, Any] = {
        "inputs": (jax.ShapeDtypeStruct((128, 128, 3), np.dtype(np.float32)),),
        "file": f"{name}.pkl",
        "origin": ORIGIN,
        "preprocess": ImagePreprocess(128, 128, mean=_MEAN, std=_STD),
    }

    @register(name, about=f"image classifier: {about}, float weights", **common)
    def build(weights: Path | None, classes: int | None, rngs: nnx.Rngs) -> MCUNet:
        if weights is None:
            return MCUNet(replace(config, classes=classes or config.classes), rngs=rngs)
        return load_mcunet(weights, config, classes=classes, rngs=rngs)

    @register(f"{name}-int8", about=f"image classifier: {about}, quantised graph", **common)
    def build_quantized(
        weights: Path | None, classes: int | None, rngs: nnx.Rngs
    ) -> QuantizedMobileNet:
        if weights is None:
            raise ValueError(f"{name}-int8 takes its scales from the weights; None are given")
        return load_quantized_mcunet(weights, config, classes=classes, rngs=rngs)


_register("mcunet-5fps", MCUNET_5FPS, "MCUNet, 0.6 M parameters, ImageNet 54.1 % in int8")
_register("proxyless-w0.3", PROXYLESS_W03, "ProxylessNAS x 0.3, ImageNet 48.3 % in int8")
_register("mbv2-w0.35", MBV2_W035, "MobileNetV2 x 0.35, no head, ImageNet 45.7 % in int8")
