"""The ratios that a result is judged by, and whether they are reached."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.speed.peers import OURS


@dataclass(frozen=True)
class Ratio:
    """One peer's time over another's.

    Attributes:
        label: what it is called in the table.
        over: the peers above; the fastest of them counts.
        under: the peer below.
    """

    label: str
    over: tuple[str, ...]
    under: str = OURS


TIMES = {
    "jax_full": Ratio("plain JAX full ÷ ours", ("jax-full",)),
    "torch_full": Ratio("PyTorch full ÷ ours", ("torch-full",)),
    "torch_leaves": Ratio("PyTorch same leaves ÷ ours", ("torch-leaves",)),
    "keras_full": Ratio("Keras/TF full ÷ ours", ("keras-full", "keras-xla-full")),
    "jax_leaves": Ratio("plain JAX same leaves ÷ ours", ("jax-leaves",)),
    "keras_leaves": Ratio("Keras/TF same leaves ÷ ours", ("keras-leaves",)),
    "compile_full": Ratio("torch.compile full ÷ ours", ("compile-full",)),
    "compile_leaves": Ratio("torch.compile same leaves ÷ ours", ("compile-leaves",)),
    "lora": Ratio("PEFT LoRA ÷ ours", ("peft-lora",)),
    "ort_full": Ratio("onnxruntime full ÷ ours", ("ort-full",)),
    "ort_leaves": Ratio("onnxruntime same leaves ÷ ours", ("ort-leaves",)),
    "executorch_full": Ratio("ExecuTorch full ÷ ours", ("executorch-full",)),
    "executorch_leaves": Ratio("ExecuTorch same leaves ÷ ours", ("executorch-leaves",)),
    "torch_full_cached": Ratio(
        "PyTorch full ÷ ours, front cached", ("torch-full",), "pockjax-cached"
    ),
    "keras_full_cached": Ratio(
        "Keras/TF full ÷ ours, front cached", ("keras-full", "keras-xla-full"), "pockjax-cached"
    ),
    "our_full": Ratio("PyTorch full ÷ our full", ("torch-full",), "pockjax-full"),
    "our_forward": Ratio("PyTorch forward ÷ our forward", ("torch-forward",), "pockjax-forward"),
    "compiler_full": Ratio("compiler gain, full", ("jax-full",), "pockjax-full"),
    "compiler_scheme": Ratio("compiler gain, scheme", ("pockjax-unrewritten",)),
    "sparsity": Ratio("sparsity gain", ("pockjax-full",)),
    "prefix": Ratio("prefix gain", (OURS,), "pockjax-cached"),
}
OTHERS = {
    "over_forward": "ours ÷ (our forward × step FLOPs / forward FLOPs)",
    "memory_full": "training memory above inference, full ÷ ours",
    "memory_leaves": "XLA's memory of the step, ours ÷ plain JAX same leaves",
}
LABELS = {key: ratio.label for key, ratio in TIMES.items()} | OTHERS
AT_MOST = ("over_forward", "memory_leaves")
"""Ratios that are to be small."""


def ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """All ratios whose peers were timed, by key.

    Times are compared through pockjax's in the same sitting, where peers took turns.
    """
    peers = result["peers"]
    found = {}
    for key, ratio in TIMES.items():
        over = [peers[n]["over_ours"] for n in ratio.over if n in peers]
        if over and ratio.under in peers:
            found[key] = min(over) / peers[ratio.under]["over_ours"]
    if {OURS, "pockjax-forward"} <= peers.keys():
        ours, forward = peers[OURS], peers["pockjax-forward"]
        found["over_forward"] = 1 / forward["over_ours"] / (ours["flops"] / forward["flops"])
    found |= _memory({n: peer["total_bytes"] for n, peer in peers.items() if "total_bytes" in peer})
    return {key: found[key] for key in LABELS if key in found}


def _memory(total: Mapping[str, int]) -> dict[str, float]:
    found = {}
    full = [total[n] for n in ("jax-full", "pockjax-full") if n in total]
    if full and {OURS, "pockjax-forward"} <= total.keys():
        inference = total["pockjax-forward"]
        extra = total[OURS] - inference
        found["memory_full"] = (min(full) - inference) / extra if extra > 0 else math.inf
    if {OURS, "jax-leaves"} <= total.keys():
        found["memory_leaves"] = total[OURS] / total["jax-leaves"]
    return found


def met(key: str, value: float, target: float) -> bool:
    """Whether a ratio is what it is asked to be.

    >>> met("torch_full", 3.2, 3), met("over_forward", 1.2, 1.1)
    (True, False)
    """
    return value <= target if key in AT_MOST else value >= target


def bounds(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """How far our forward pass and our step are from the machine's limits.

    Returns:
        For "forward" and "step": milliseconds measured, those of the products alone, those that the
        products would take at the rate of a large one, those of the memory traffic alone, and the
        shares that these are of the whole.
    """
    limits, found = result["limits"], {}
    for what, name in (("forward", "pockjax-forward"), ("step", OURS)):
        if name not in result["peers"]:
            continue
        peer = result["peers"][name]
        whole = peer["milliseconds"]["median"]
        products = 1e3 * limits[what]["seconds"]
        traffic = 1e3 * peer["moved_bytes"] / limits["machine"]["bytes_per_second"]
        found[what] = {
            "milliseconds": whole,
            "products": products,
            "at_best": 1e3 * limits[what]["flops"] / limits["machine"]["flops_per_second"],
            "traffic": traffic,
            "products_share": products / whole,
            "traffic_share": traffic / whole,
            "flops_per_second": limits[what]["flops"] / max(limits[what]["seconds"], 1e-9),
        }
    return found
