"""Make ../data/library.npz: logits and vectors of torchvision's and transformers' own networks.

Run with Python 3.11, torch 2.15.0, torchvision 0.29.2, transformers 5.23.0 and numpy:

    python tests/models/oracles/library.py FOLDER_OF_ALL_MINILM_L6_V2

The residual networks have weights that are drawn by name, so that a test can draw them too.
"""

import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision
from transformers import BertModel

# Two images of a size at which no padding is symmetric by accident, and two texts.
IMAGES = np.random.default_rng(0).standard_normal((2, 3, 98, 90)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, 30_522, (2, 11))
VALID = np.arange(11) < np.array([[11], [7]])


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that keep numbers near one from layer to layer."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return generator.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) > 1:
        return generator.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
    centre = 0.5 if name.endswith("weight") else 0.0
    return generator.normal(centre, 0.1, shape).astype(np.float32)


def residual(build) -> np.ndarray:
    model = build()
    state = {
        name: torch.from_numpy(drawn(name, tuple(value.shape)))
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    model.load_state_dict(state, strict=False)
    with torch.inference_mode():
        return model.eval().double()(torch.from_numpy(IMAGES).double()).float().numpy()


def minilm(folder: str) -> np.ndarray:
    """Mean-pooled vectors."""
    model = BertModel.from_pretrained(folder).eval().double()
    valid = torch.from_numpy(VALID)
    with torch.inference_mode():
        hidden = model(torch.from_numpy(TOKENS), attention_mask=valid.long()).last_hidden_state
    weights = valid[..., None].double()
    return ((hidden * weights).sum(1) / weights.sum(1)).float().numpy()


if __name__ == "__main__":
    np.savez_compressed(
        Path(__file__).parents[1] / "data" / "library.npz",
        resnet18=residual(torchvision.models.resnet18),
        resnet50=residual(torchvision.models.resnet50),
        minilm=minilm(sys.argv[1]),
    )
