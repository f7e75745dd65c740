"""A training step of ExecuTorch in a process and an environment of its own."""

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.exir import to_edge
from executorch.extension.training import (
    _load_for_executorch_for_training_from_buffer,
    get_sgd_optimizer,
)
from torch.export import export
from torch.export.experimental import _export_forward_backward

from experiments.speed.torch_networks import choose, load, without_norms
from experiments.speed.worker import Made, work


class Loss(torch.nn.Module):
    """A network and its loss: what ExecuTorch differentiates."""

    def __init__(self, network: Any):
        """Of `network`, which gives logits."""
        super().__init__()
        self.network = network

    def forward(self, inputs: Any, labels: Any) -> Any:
        """The mean cross entropy."""
        return torch.nn.functional.cross_entropy(self.network(inputs), labels)


def make(name: str, folder: Path, rate: float) -> Callable[[], Made]:
    """Load the problem; what is returned exports the program and loads it."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, named, inputs, labels = load(folder, attn_implementation="eager")
    trained = choose(model, named, folder, name)
    own = {f"network.{n}": theirs for n, theirs in named.items() if theirs in trained}

    def build() -> Made:
        program = export(Loss(without_norms(model)), (inputs, labels), strict=False)
        program = to_edge(_export_forward_backward(program)).to_executorch()
        buffer = program.buffer
        module = _load_for_executorch_for_training_from_buffer(buffer)
        optimizer = None

        def step() -> Any:
            nonlocal optimizer
            _ = buffer  # the module reads it, but does not keep it alive
            loss = module.forward_backward("forward", (inputs, labels))[0]
            if optimizer is None:  # the parameters are known once the program has run
                optimizer = get_sgd_optimizer(module.named_parameters(), rate)
            optimizer.step(module.named_gradients())
            return loss

        def weights() -> dict[str, np.ndarray]:
            found = module.named_parameters()
            return {theirs: found[n].detach().numpy() for n, theirs in own.items()}

        version = f"executorch {importlib.metadata.version('executorch')}"
        return Made(step, weights, about={"version": f"{version}, torch {torch.__version__}"})

    return build


if __name__ == "__main__":
    work(make)
