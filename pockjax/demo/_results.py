"""What the demo measures: the shape of `report.json`."""

from dataclasses import dataclass

from pockjax.masks import Description


@dataclass(frozen=True)
class TrainingResult:
    """One fine-tuning.

    Attributes:
        accuracy: Fraction of the held-out texts classified rightly.
        first_loss: Training loss before the first update.
        last_loss: Mean training loss of the last ten steps.
        step_seconds: Median time of a step.
        compile_seconds: Time to trace and compile the step.
        parameter_bytes: All parameters.
        optimizer_bytes: The optimizer's state.
        compiled_bytes: What the executable holds at most: arguments, outputs and temporaries.
        residual_bytes: Values kept from the forward for the backward pass.
        measured_bytes: How far resident memory rose in training, with the parameters and the
            executable already there.
        flops: Floating-point operations of a step.
        parameters: What was trained of each.
    """

    accuracy: float
    first_loss: float
    last_loss: float
    step_seconds: float
    compile_seconds: float
    parameter_bytes: int
    optimizer_bytes: int
    compiled_bytes: int
    residual_bytes: int
    measured_bytes: int
    flops: float
    parameters: Description

    @property
    def training_bytes(self) -> int:
        """What the executable holds at most, beyond the parameters themselves."""
        return self.compiled_bytes - self.parameter_bytes


@dataclass(frozen=True)
class TimingResult:
    """Both compiled steps, timed in turn in one process.

    Attributes:
        full_seconds: Times of the full step.
        sparse_seconds: Times of the sparse step, each measured right beside the full one.
    """

    full_seconds: tuple[float, ...]
    sparse_seconds: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times faster the sparse step was, in each alternation."""
        pairs = zip(self.full_seconds, self.sparse_seconds, strict=True)
        return tuple(full / sparse for full, sparse in pairs)
