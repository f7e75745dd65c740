"""The problem's networks in PyTorch; imports no JAX, and nothing that one of them does not need."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional


class ConvNorm(nn.Module):
    """A convolution whose batch norm is folded into it."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1):
        """Padded alike on all sides."""
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups)

    def forward(self, x: Any) -> Any:
        """Convolve."""
        return self.conv(x)


class Bottleneck(nn.Module):
    """Expansion, depthwise convolution, projection."""

    def __init__(self, inputs: int, shape: dict[str, Any]):
        """Of the shape that `problem.json` gives."""
        super().__init__()
        inner = shape["expanded"]
        self.expand = ConvNorm(inputs, inner, 1) if shape["expand"] else None
        self.depthwise = ConvNorm(inner, inner, shape["kernel"], shape["stride"], inner)
        self.project = ConvNorm(inner, shape["channels"], 1)
        self.adds_input = shape["stride"] == 1 and inputs == shape["channels"]

    def forward(self, x: Any) -> Any:
        """Transform feature maps."""
        y = x if self.expand is None else functional.relu6(self.expand(x))
        y = self.project(functional.relu6(self.depthwise(y)))
        return x + y if self.adds_input else y


class Mobile(nn.Module):
    """A chain of bottlenecks without batch norms and without a head, as MCUNet is."""

    def __init__(self, shape: dict[str, Any]):
        """Of the shape that `problem.json` gives."""
        super().__init__()
        if shape["norm_epsilon"] is not None or shape["head"] or shape["padding"] != "centered":
            raise ValueError("only networks with folded norms and no head are written out here")
        self.stem = ConvNorm(3, shape["stem"], 3, 2)
        channels = [shape["stem"], *(block["channels"] for block in shape["blocks"])]
        self.blocks = nn.Sequential(*map(Bottleneck, channels, shape["blocks"]))
        self.classifier = nn.Linear(channels[-1], shape["classes"])

    def forward(self, x: Any) -> Any:
        """Logits."""
        return self.classifier(self.blocks(functional.relu6(self.stem(x))).mean((2, 3)))


class MeanPooled(nn.Module):
    """BERT with a classifier on the mean of its tokens."""

    def __init__(self, shape: dict[str, Any], **options: Any):
        """Of the shape that `problem.json` gives; options are those of `transformers`."""
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            vocab_size=shape["vocabulary"],
            hidden_size=shape["width"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            intermediate_size=shape["ffn_width"],
            max_position_embeddings=shape["positions"],
            type_vocab_size=shape["token_types"],
            layer_norm_eps=shape["norm_epsilon"],
            **options,
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(shape["width"], shape["classes"])

    def forward(self, tokens: Any) -> Any:
        """Logits."""
        return self.classifier(self.encoder(tokens).last_hidden_state.mean(1))


class NextToken(nn.Module):
    """A Llama whose head is its embedding."""

    def __init__(self, shape: dict[str, Any], **options: Any):
        """Of the shape that `problem.json` gives; options are those of `transformers`."""
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.inner = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape["vocabulary"],
                hidden_size=shape["width"],
                num_hidden_layers=shape["layers"],
                num_attention_heads=shape["heads"],
                num_key_value_heads=shape["kv_heads"],
                intermediate_size=shape["ffn_width"],
                tie_word_embeddings=True,
                rms_norm_eps=shape["norm_epsilon"],
                rope_theta=shape["rope_base"],
                max_position_embeddings=shape["positions"],
                **options,
            )
        )

    def forward(self, tokens: Any) -> Any:
        """Logits, as rows."""
        return self.inner(tokens, use_cache=False).logits.flatten(0, 1)


class Frozen(nn.Module):
    """A batch norm with frozen statistics, written out for exporters that know none."""

    def __init__(self, norm: Any):
        """With the arrays of `norm`."""
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, x: Any) -> Any:
        """Normalise each channel."""
        mean, var, scale, bias = (
            v.reshape(1, -1, 1, 1)
            for v in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return (x - mean) * torch.rsqrt(var + self.eps) * scale + bias


def without_norms(module: nn.Module) -> nn.Module:
    """Write out all batch norms, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, Frozen(child))
        else:
            without_norms(child)
    return module


def _build(given: dict[str, Any], **options: Any) -> tuple[nn.Module, str]:
    """A network, and what its names begin with."""
    shape = given["network"]
    if given["model"] in ("mobilenet_v2", "resnet50"):
        import torchvision

        return getattr(torchvision.models, given["model"])(), ""
    if given["model"] == "efficientnet_lite0":
        from tests.models.oracles.cnn import EfficientNetLite0

        return EfficientNetLite0(), ""
    if shape["kind"] == "mobile":
        return Mobile(shape), ""
    if shape["kind"] == "bert":
        return MeanPooled(shape, **options), "encoder."
    return NextToken(shape, **options), "inner."


def load(folder: Path, **options: Any) -> tuple[nn.Module, dict[str, str], Any, Any]:
    """The network with its weights, the problem's name of each parameter, inputs and labels.

    Statistics of batch norms are frozen, as in the other peers, and images channels-first. Options
    are those of `transformers`, for its networks.
    """
    given = json.loads((folder / "problem.json").read_text())
    model, prefix = _build(given, **options)
    state = load_file(folder / "weights.safetensors")
    own = {n: n if n.startswith("classifier.") and prefix else prefix + n for n in state}
    missing, unexpected = model.load_state_dict({own[n]: v for n, v in state.items()}, strict=False)
    made_here = ("num_batches_tracked", "position_ids", "lm_head.weight")
    left = [n for n in missing if not n.endswith(made_here)]
    if left or unexpected:
        raise SystemExit(f"weights do not fit: missing {left}, unexpected {unexpected}")
    model.eval()
    inputs, labels = (torch.from_numpy(np.load(folder / f"{n}.npy")) for n in ("inputs", "labels"))
    labels = labels.long().flatten()
    inputs = inputs.permute(0, 3, 1, 2).contiguous() if inputs.ndim == 4 else inputs.long()
    return model, {own[n]: n for n in given["params"]}, inputs, labels


def choose(model: nn.Module, named: dict[str, str], folder: Path, name: str) -> dict[str, Any]:
    """Say what is trained, as the peer's name has it: those parameters by the problem's names."""
    trained = set(json.loads((folder / "problem.json").read_text())["trained"])
    chosen = {}
    for own, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("-full") or named[own] in trained
        if parameter.requires_grad:
            chosen[named[own]] = parameter
    return chosen
