"""A training step of PyTorch, eager or compiled, or of PEFT, in an environment of its own."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.speed.torch_networks import choose, load
from experiments.speed.worker import Made, work

TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
"""Where PEFT puts adapters in these networks unless it is told otherwise."""


def make(name: str, folder: Path, rate: float) -> Callable[[], Made]:
    """Load the problem; what is returned prepares what `name` says."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, named, inputs, labels = load(folder)
    if inputs.ndim == 4:
        model = model.to(memory_format=torch.channels_last)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    version = f"torch {torch.__version__}"
    if name == "peft-lora":
        model, version = _adapted(model, version)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    else:
        trained = choose(model, named, folder, name)
    compiles = name.startswith("compile")
    criterion = torch.nn.CrossEntropyLoss()

    def build() -> Made:
        network = torch.compile(model) if compiles else model
        optimizer = torch.optim.SGD(trained.values(), lr=rate) if trained else None

        def step() -> Any:
            loss = criterion(network(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        def forward() -> Any:
            with torch.inference_mode():
                return criterion(network(inputs), labels)

        return Made(
            forward if name.endswith("-forward") else step,
            lambda: {n: p.detach().contiguous().numpy() for n, p in trained.items()},
            lazy=compiles,
            about={"version": version},
        )

    return build


def _adapted(model: Any, version: str) -> tuple[Any, str]:
    import peft

    kind = "llama" if hasattr(model, "inner") else "bert"
    also = ["classifier"] if hasattr(model, "classifier") else None
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=TARGETS[kind], modules_to_save=also, lora_dropout=0.0
    )
    adapted = peft.get_peft_model(model, config)
    return adapted.eval(), f"peft {peft.__version__}, {version}"


if __name__ == "__main__":
    work(make)
