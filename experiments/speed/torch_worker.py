"""A training step of PyTorch in a process and an environment of its own; imports no JAX."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from experiments.speed.worker import memory, serve

RATE = 1e-3


class MeanPooled(torch.nn.Module):
    """BERT with a classifier on the mean of its tokens."""

    def __init__(self, classes: int) -> None:
        """Of the size of all-MiniLM-L6-v2."""
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.classifier = torch.nn.Linear(384, classes)

    def forward(self, tokens: Any) -> Any:
        """Logits."""
        return self.classifier(self.encoder(tokens).last_hidden_state.mean(1))


class NextToken(torch.nn.Module):
    """SmolLM2-135M."""

    def __init__(self) -> None:
        """Of its published size."""
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.inner = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49_152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, intermediate_size=1536, tie_word_embeddings=True,
                rms_norm_eps=1e-5, rope_theta=100_000.0, max_position_embeddings=8192,
            )
        )  # fmt: skip

    def forward(self, tokens: Any) -> Any:
        """Logits, as rows."""
        return self.inner(tokens, use_cache=False).logits.flatten(0, 1)


def build(model: str) -> tuple[torch.nn.Module, str]:
    """A network, and what its names begin with."""
    if model in ("mobilenet_v2", "resnet50"):
        import torchvision

        return getattr(torchvision.models, model)(), ""
    if model == "efficientnet_lite0":
        from tests.models.oracles.cnn import EfficientNetLite0

        return EfficientNetLite0(), ""
    if model == "all-minilm-l6-v2":
        return MeanPooled(10), "encoder."
    return NextToken(), "inner."


def peer(name: str, folder: Path) -> None:
    """Build what `name` says, and serve it."""
    given = json.loads((folder / "problem.json").read_text())
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, prefix = build(given["model"])
    state = load_file(folder / "weights.safetensors")
    own = {n: n if n.startswith("classifier.") and prefix else prefix + n for n in state}
    if not prefix:
        own = {n: n for n in state}
    missing, unexpected = model.load_state_dict({own[n]: v for n, v in state.items()}, strict=False)
    left = [
        n
        for n in missing
        if not n.endswith(("num_batches_tracked", "position_ids", "lm_head.weight"))
    ]
    if left or unexpected:
        raise SystemExit(f"weights do not fit: missing {left}, unexpected {unexpected}")
    model.eval()  # batch statistics are frozen, as in the other peers
    inputs, labels = (torch.from_numpy(np.load(folder / f"{n}.npy")) for n in ("inputs", "labels"))
    labels = labels.long().flatten()
    if inputs.ndim == 4:
        model = model.to(memory_format=torch.channels_last)
        inputs = inputs.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    else:
        inputs = inputs.long()
    trained = {own[n] for n in given["trained"]}
    for n, p in model.named_parameters():
        p.requires_grad = name.endswith("full") or n in trained
    loaded, begun = memory(), time.perf_counter()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    network = torch.compile(model) if name.startswith("torch-compile") else model
    criterion = torch.nn.CrossEntropyLoss()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = criterion(network(inputs), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def forward() -> float:
        with torch.inference_mode():
            return criterion(network(inputs), labels)

    run = forward if name.endswith("forward") else step
    first = float(run())
    if name == "torch-leaves":
        back = {own[n]: n for n in state}
        grads = {back[n]: p.grad.numpy() for n, p in model.named_parameters() if n in trained}
        np.savez(folder / f"{name}.npz", **grads)
    serve(run, {
        "loss": first, "compile_seconds": time.perf_counter() - begun, "loaded": loaded,
        "version": f"torch {torch.__version__}",
    })  # fmt: skip


if __name__ == "__main__":
    peer(sys.argv[1], Path(sys.argv[3]))
