"""A training step of onnxruntime-training in a process and an environment of its own."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.training import artifacts
from onnxruntime.training.api import CheckpointState, Module, Optimizer

from experiments.speed.torch_networks import choose, load, without_norms
from experiments.speed.worker import Made, work


def make(name: str, folder: Path, rate: float) -> Callable[[], Made]:
    """Load the problem; what is returned makes the training graph, and a session of it."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, named, inputs, labels = load(folder, attn_implementation="eager")
    trained = choose(model, named, folder, name)  # by the problem's names
    own = {theirs: n for n, theirs in named.items() if theirs in trained}
    given = (inputs.numpy(), labels.numpy())

    def build() -> Made:
        with tempfile.TemporaryDirectory(prefix="pockjax-ort-") as scratch:
            _export(model, inputs, list(own.values()), Path(scratch))
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = len(os.sched_getaffinity(0))
            state = CheckpointState.load_checkpoint(f"{scratch}/checkpoint")
            module = Module(
                f"{scratch}/training_model.onnx", state, device="cpu", session_options=options
            )
            optimizer = Optimizer(f"{scratch}/optimizer_model.onnx", module)
        optimizer.set_learning_rate(rate)
        module.train()

        def step() -> Any:
            loss = module(*given)
            optimizer.step()
            module.lazy_reset_grad()
            return np.asarray(loss).item()

        def weights() -> dict[str, np.ndarray]:
            return {theirs: state.parameters[n].data for theirs, n in own.items()}

        version = f"onnxruntime-training {onnxruntime.__version__}, onnx {onnx.__version__}"
        return Made(step, weights, about={"version": version})

    return build


def _export(model: Any, inputs: Any, trained: list[str], scratch: Path) -> None:
    """Write the training graph, the optimizer's, and the weights."""
    torch.onnx.export(
        without_norms(model),
        (inputs,),
        str(scratch / "model.onnx"),
        input_names=["inputs"],
        output_names=["logits"],
        export_params=True,
        training=torch.onnx.TrainingMode.PRESERVE,  # that of the model: no dropout
        do_constant_folding=False,
        opset_version=15,
    )
    graph = onnx.load(str(scratch / "model.onnx"))
    known = {tensor.name for tensor in graph.graph.initializer}
    if missing := set(trained) - known:
        raise SystemExit(f"the exporter renamed {sorted(missing)[:3]}")
    artifacts.generate_artifacts(
        graph,
        requires_grad=trained,
        frozen_params=sorted(known - set(trained)),
        loss=artifacts.LossType.CrossEntropyLoss,
        optimizer=artifacts.OptimType.SGD,
        artifact_directory=str(scratch),
    )


if __name__ == "__main__":
    work(make)
