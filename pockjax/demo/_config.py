"""What can be chosen in the demo, and the files that it reads."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoConfig:
    """Fine-tune a text encoder for topic classification twice: full and sparse backpropagation.

    Attributes:
        steps: Training steps of each of the two.
        batch: Texts in a batch.
        length: Tokens of each text, counted from its beginning.
        learning_rate: Peak of the schedule, the same for both.
        seed: For the split, the order of the batches and the new classifier's weights.
        held_out: Fraction of the texts to measure accuracy on.
        alternations: How often the two compiled steps are timed in turn, after training.
        scheme: A scheme file, or the name of one that comes with pockjax.
        weights: `all-minilm-l6-v2`, or a folder with config.json, model.safetensors and
            tokenizer.json.
        data: `bbc-news`, or a folder that holds a folder of .txt files for each class.
        out: Folder for report.json, scheme.yaml and trained.png.
    """

    steps: int = 50
    batch: int = 16
    length: int = 128
    learning_rate: float = 2e-4
    seed: int = 0
    held_out: float = 0.2
    alternations: int = 10
    scheme: str = "minilm"
    weights: str = "all-minilm-l6-v2"
    data: str = "bbc-news"
    out: Path = Path("runs/demo")

    def __post_init__(self) -> None:
        """Reject numbers that no run could use."""
        for name in ("steps", "batch", "length", "alternations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a fraction between 0 and 1, not {self.held_out}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is above 0, not {self.learning_rate}")


@dataclass(frozen=True)
class Job:
    """What a child process is asked to do.

    Attributes:
        mode: "full" or "sparse": train, then evaluate. "compare": time both compiled steps in turn.
        config: The demo's choices.
        classes: The classes' names.
        weights: Folder with the encoder's weights.
        scheme: The scheme file.
        train: `.npz` file with the encoded training texts.
        test: The same for the held-out texts.
    """

    mode: str
    config: DemoConfig
    classes: tuple[str, ...]
    weights: Path
    scheme: Path
    train: Path
    test: Path


def scheme_file(scheme: str) -> Path:
    """Find a scheme: a file, or the name of one that comes with pockjax.

    Raises:
        FileNotFoundError: There is none; the message lists those that come with pockjax.
    """
    if Path(scheme).is_file():
        return Path(scheme)
    package = Path(__file__).parents[1]
    # Beside the code in an installed wheel; at the top of the repository in a checkout.
    folders = [package / "configs" / "schemes", package.parent / "configs" / "schemes"]
    shipped = {path.stem: path for folder in folders for path in folder.glob("*.yaml")}
    if scheme in shipped:
        return shipped[scheme]
    raise FileNotFoundError(
        f"{scheme!r} is neither a scheme file nor one of: {', '.join(sorted(shipped)) or 'none'}"
    )
