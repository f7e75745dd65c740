"""Make ../data/cnn.npz: logits of three networks, written here in torch from their papers.

Run with Python 3.11, torch 2.13.0 and numpy:

    python tests/models/oracles/cnn.py mobilenet_v2-b0353104.pth \
        efficientnet-lite0-57934424.pth resnet20.th

The first two files are in the wheels of the hub's sources "mobilenet_v2" and "efficientnet_lite0",
the third is of https://github.com/akamaster/pytorch_resnet_cifar10.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

# Two images each, of a size at which no padding is symmetric by accident.
IMAGES = np.random.default_rng(0).standard_normal((2, 3, 98, 90)).astype(np.float32)


class Same(nn.Conv2d):
    """A convolution padded as TensorFlow pads."""

    def forward(self, x):
        pad = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pad += [total // 2, total - total // 2]
        x = functional.pad(x, pad)
        return functional.conv2d(x, self.weight, None, self.stride, 0, 1, self.groups)


def conv_norm(i, o, size, stride=1, groups=1):
    return [
        nn.Conv2d(i, o, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(o),
    ]


def activated(*args, **kwargs):
    return nn.Sequential(*conv_norm(*args, **kwargs), nn.ReLU6())


class Inverted(nn.Module):
    def __init__(self, i, o, stride, expansion):
        super().__init__()
        inner = i * expansion
        first = [activated(i, inner, 1)] if expansion != 1 else []
        middle = activated(inner, inner, 3, stride, groups=inner)
        self.conv = nn.Sequential(*first, middle, *conv_norm(inner, o, 1))
        self.adds = stride == 1 and i == o

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self):
        super().__init__()
        layers, channels = [activated(3, 32, 3, 2)], 32
        for expansion, o, count, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
            (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for k in range(count):
                layers.append(Inverted(channels, o, stride if k == 0 else 1, expansion))
                channels = o
        self.features = nn.Sequential(*layers, activated(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(1280, 1000))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class LiteBlock(nn.Module):
    def __init__(self, i, o, kernel, stride, expansion):
        super().__init__()
        inner = i * expansion
        if expansion != 1:
            self._expand_conv = Same(i, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, eps=1e-3)
        self._depthwise_conv = Same(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self._project_conv = Same(inner, o, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(o, eps=1e-3)
        self.adds = stride == 1 and i == o

    def forward(self, x):
        y = x
        if hasattr(self, "_expand_conv"):
            y = functional.relu6(self._bn0(self._expand_conv(y)))
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    def __init__(self):
        super().__init__()
        self._conv_stem = Same(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, channels = [], 32
        for kernel, stride, expansion, o, count in (
            (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
            (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
        ):  # fmt: skip
            for k in range(count):
                blocks.append(LiteBlock(channels, o, kernel, stride if k == 0 else 1, expansion))
                channels = o
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = Same(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x):
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = functional.relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))


class Basic(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(i, o, 3, stride)
        self.conv2, self.bn2 = conv_norm(o, o, 3)
        self.stride, self.new = stride, o - i

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        x = functional.pad(x, (0, 0, 0, 0, self.new // 2, self.new // 2))
        return functional.relu(x + y)


class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(3, 16, 3)
        self.layer1 = nn.Sequential(*(Basic(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Basic(16, 32, 2), Basic(32, 32, 1), Basic(32, 32, 1))
        self.layer3 = nn.Sequential(Basic(32, 64, 2), Basic(64, 64, 1), Basic(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def logits(model, file):
    state = torch.load(file, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise SystemExit(f"{file}: missing {missing}, unexpected {unexpected}")
    with torch.inference_mode():
        return model.eval().double()(torch.from_numpy(IMAGES).double()).float().numpy()


if __name__ == "__main__":
    mobilenet_v2, efficientnet_lite0, resnet20 = sys.argv[1:]
    np.savez_compressed(
        Path(__file__).parents[1] / "data" / "cnn.npz",
        mobilenet_v2=logits(MobileNetV2(), mobilenet_v2),
        efficientnet_lite0=logits(EfficientNetLite0(), efficientnet_lite0),
        resnet20=logits(ResNet20(), resnet20),
    )
