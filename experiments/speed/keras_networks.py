"""The problem's networks as Keras models; imports no JAX."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from safetensors.numpy import load_file


@dataclass
class Builder:
    """Makes layers, and notes which of their variables is which array of the problem.

    Attributes:
        folder: where the problem is.
        found: each variable, how its array goes from PyTorch's layout to Keras's and back, by name.
    """

    folder: Path
    found: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the weights."""
        self.given = json.loads((self.folder / "problem.json").read_text())
        self._tensors = load_file(self.folder / "weights.safetensors")

    def note(self, path: str, variable: Any, there: tuple[int, ...] = ()) -> None:
        """Fill a variable with the array of a path, its axes put in another order."""
        name = self.given["names"][path]
        back = tuple(int(i) for i in np.argsort(there))
        value = self._tensors[name]
        variable.assign(value.transpose(there) if there else value)
        self.found[name] = (variable, there, back)

    def as_torch(self, variables: dict[str, Any]) -> dict[str, np.ndarray]:
        """Values of variables in PyTorch's layout."""
        return {
            name: np.ascontiguousarray(
                np.transpose(np.asarray(value), self.found[name][2])
                if self.found[name][1]
                else np.asarray(value)
            )
            for name, value in variables.items()
        }

    def conv(
        self, x: Any, path: str, outputs: int, size: int, stride: int = 1, *,
        depthwise: bool = False, padding: str = "centered", epsilon: float | None = 1e-5,
    ) -> Any:  # fmt: skip
        """A convolution and the batch norm with frozen statistics that follows it."""
        if padding == "centered" and stride > 1 and size > 1:
            x = layers.ZeroPadding2D(size // 2)(x)
        kind: dict[str, Any] = {
            "strides": stride,
            "padding": "valid" if padding == "centered" and stride > 1 else "same",
            "use_bias": epsilon is None,
        }
        if depthwise:
            layer = layers.DepthwiseConv2D(size, **kind)
        else:
            layer = layers.Conv2D(outputs, size, **kind)
        x = layer(x)
        there = (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)
        self.note(f"{path}/conv/kernel", layer.kernel, there)
        if epsilon is None:
            self.note(f"{path}/conv/bias", layer.bias)
            return x
        norm = layers.BatchNormalization(epsilon=epsilon)
        x = norm(x)
        parts = {
            "scale": norm.gamma, "bias": norm.beta,
            "mean": norm.moving_mean, "var": norm.moving_variance,
        }  # fmt: skip
        for part, variable in parts.items():
            self.note(f"{path}/norm/{part}", variable)
        return x

    def dense(self, x: Any, path: str, outputs: int) -> Any:
        """A linear layer."""
        layer = layers.Dense(outputs)
        x = layer(x)
        self.note(f"{path}/kernel", layer.kernel, (1, 0))
        self.note(f"{path}/bias", layer.bias)
        return x

    def layer_norm(self, x: Any, path: str, epsilon: float) -> Any:
        """A layer norm."""
        layer = layers.LayerNormalization(epsilon=epsilon)
        x = layer(x)
        self.note(f"{path}/scale", layer.gamma)
        self.note(f"{path}/bias", layer.beta)
        return x

    def embedding(self, tokens: Any, path: str, count: int, width: int) -> Any:
        """A table of vectors."""
        layer = layers.Embedding(count, width)
        x = layer(tokens)
        self.note(f"{path}/embedding", layer.embeddings)
        return x

    def plus_rows(self, x: Any, path: str, count: int, used: int) -> Any:
        """The sum with the first rows of a table, one for each token or one for all."""
        layer = Rows(count, used)
        x = layer(x)
        self.note(f"{path}/embedding", layer.table)
        return x


class Rows(layers.Layer):
    """Adds the first rows of a table."""

    def __init__(self, count: int, used: int, **kwargs: Any):
        """Of `count` rows, the first `used` are added."""
        super().__init__(**kwargs)
        self.count, self.used = count, used

    def build(self, shape: tuple[int, ...]) -> None:
        """Make the table."""
        self.table = self.add_weight(shape=(self.count, shape[-1]))

    def call(self, x: Any) -> Any:
        """Add them."""
        return x + self.table[: self.used]


def _mobile(b: Builder, shape: dict[str, Any], size: int) -> Any:
    common = {"padding": shape["padding"], "epsilon": shape["norm_epsilon"]}
    images = keras.Input((size, size, 3))
    x = ops.relu6(b.conv(images, "stem", shape["stem"], 3, 2, **common))
    channels = shape["stem"]
    for k, block in enumerate(shape["blocks"]):
        path, y = f"blocks/{k}", x
        if block["expand"]:
            y = ops.relu6(b.conv(y, f"{path}/expand", block["expanded"], 1, **common))
        y = b.conv(
            y, f"{path}/depthwise", block["expanded"], block["kernel"], block["stride"],
            depthwise=True, **common,
        )  # fmt: skip
        y = b.conv(ops.relu6(y), f"{path}/project", block["channels"], 1, **common)
        x = x + y if block["stride"] == 1 and channels == block["channels"] else y
        channels = block["channels"]
    if shape["head"]:
        x = ops.relu6(b.conv(x, "head", shape["head"], 1, **common))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, b.dense(x, "classifier", shape["classes"]))


def _resnet(b: Builder, shape: dict[str, Any], size: int) -> Any:
    if (shape["block"], shape["stem"], shape["shortcut"]) != ("bottleneck", "imagenet", "project"):
        raise ValueError("only ResNets with bottlenecks for ImageNet are written out here")
    images = keras.Input((size, size, 3))
    x = layers.ZeroPadding2D(1)(ops.relu(b.conv(images, "stem", shape["width"], 7, 2)))
    x = layers.MaxPooling2D(3, 2)(x)  # zeros do, as nothing is below zero after a ReLU
    channels = shape["width"]
    for s, count in enumerate(shape["blocks"]):
        width = shape["width"] * 2**s
        for k in range(count):
            path, stride = f"stages/{s}/{k}", 2 if s > 0 and k == 0 else 1
            y = ops.relu(b.conv(x, f"{path}/conv1", width, 1))
            y = ops.relu(b.conv(y, f"{path}/conv2", width, 3, stride))
            y = b.conv(y, f"{path}/conv3", 4 * width, 1)
            if stride > 1 or channels != 4 * width:
                x = b.conv(x, f"{path}/downsample", 4 * width, 1, stride)
            x, channels = ops.relu(x + y), 4 * width
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, b.dense(x, "classifier", shape["classes"]))


def _bert(b: Builder, shape: dict[str, Any], length: int) -> Any:
    width, heads, epsilon = shape["width"], shape["heads"], shape["norm_epsilon"]
    tokens = keras.Input((length,), dtype="int32")
    x = b.embedding(tokens, "embeddings/word", shape["vocabulary"], width)
    x = b.plus_rows(x, "embeddings/position", shape["positions"], length)
    x = b.plus_rows(x, "embeddings/token_type", shape["token_types"], 1)
    x = b.layer_norm(x, "embeddings/norm", epsilon)

    def split(y: Any) -> Any:
        return ops.reshape(y, (-1, length, heads, width // heads))

    for k in range(shape["layers"]):
        path = f"layers/{k}/attention"
        query, key, value = (
            split(b.dense(x, f"{path}/{part}", width)) for part in ("query", "key", "value")
        )
        mixed = ops.reshape(ops.dot_product_attention(query, key, value), (-1, length, width))
        x = b.layer_norm(x + b.dense(mixed, f"{path}/output", width), f"{path}/norm", epsilon)
        path = f"layers/{k}/ffn"
        y = ops.gelu(b.dense(x, f"{path}/up", shape["ffn_width"]), approximate=False)
        x = b.layer_norm(x + b.dense(y, f"{path}/down", width), f"{path}/norm", epsilon)
    x = ops.mean(x, axis=1)
    return keras.Model(tokens, b.dense(x, "classifier", shape["classes"]))


_KINDS: dict[str, Callable[[Builder, dict[str, Any], int], Any]] = {
    "mobile": _mobile,
    "resnet": _resnet,
    "bert": _bert,
}


def load(folder: Path) -> tuple[Any, Builder]:
    """The network with its weights, and which of its variables is which array."""
    builder = Builder(folder)
    shape = builder.given["network"]
    size = np.load(folder / "inputs.npy").shape[1]
    model = _KINDS[shape["kind"]](builder, shape, size)
    left = builder.given["names"].values() - builder.found.keys()
    if left:
        raise SystemExit(f"weights do not fit: missing {sorted(left)}")
    return model, builder
