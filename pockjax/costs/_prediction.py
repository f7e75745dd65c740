"""What a mask is expected to cost, before anything is compiled for it."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Prediction:
    """What a training step of one mask is expected to cost; bytes and operations per step.

    Attributes:
        memory_bytes: the memory a step needs: its arguments, results that share none of their
            memory, and everything in between; to stand beside `CompiledCost.total_bytes`.
        argument_bytes: parameters, optimizer state and batch.
        temp_bytes: everything in between; to stand beside ``CompiledCost.temp_bytes``.
        residual_bytes: of that, what the backward pass keeps from the forward pass.
        optimizer_bytes: of the arguments, the optimizer's state.
        gradient_bytes: the packed gradient.
        flops: floating-point operations, loops counted as often as they run.
        seconds: time of a step; None until a model was calibrated on this machine.
    """

    memory_bytes: int
    argument_bytes: int
    temp_bytes: int
    residual_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    flops: int
    seconds: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """The fields, for JSON."""
        return asdict(self)
