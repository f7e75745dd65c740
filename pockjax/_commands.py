"""The commands of `pockjax`, as `tyro` reads them; needs the extra `cli`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from pockjax import demo, hub, models
from pockjax._downloads import download_bar
from pockjax._extras import require


@dataclass(frozen=True)
class Demo(demo.DemoConfig):
    """Fine-tune a text encoder for topic classification twice: full and sparse backpropagation."""

    def run(self) -> None:
        """Run the demo."""
        for module in ("safetensors", "tokenizers"):
            require(module, "text")
        demo.run(self)


@dataclass(frozen=True)
class ListModels:
    """List the models, and where their pretrained weights come from."""

    def run(self) -> None:
        """Print the table."""
        table = Table("model", "what", "pretrained weights", "licence")
        for name in models.names():
            entry = models.entry(name)
            table.add_row(name, entry.about, _weights(entry), entry.license or "-")
        # Piped into another program there is no width that lines would have to be broken at.
        console = Console()
        Console(width=None if console.is_terminal else 200).print(table)


def _weights(entry: models.Entry) -> str:
    if entry.source is not None:
        source = hub.sources()[entry.source]
        there = hub.is_fetched(entry.source)
        return "fetched" if there else f"to fetch, {source.size / 1e6:.0f} MB"
    return f"a file from {entry.origin}" if entry.origin else "a file of your own"


@dataclass(frozen=True)
class GetModels:
    """Download the pretrained weights of models, and print where they are.

    Attributes:
        names: Of the models; `pockjax models list` has them.
    """

    names: tyro.conf.Positional[tuple[str, ...]]

    def run(self) -> None:
        """Download."""
        if not self.names:
            raise ValueError("name at least one model; `pockjax models list` has them")
        for name in self.names:  # before any download, so that a typo costs no waiting
            models.entry(name)
        for name in self.names:
            with download_bar(name, Console(stderr=True)) as progress:
                path = models.weights_path(name, progress=progress)
            print(path)


@dataclass(frozen=True)
class Models:
    """List the reference models, or download their pretrained weights."""

    command: (
        Annotated[ListModels, tyro.conf.subcommand("list")]
        | Annotated[GetModels, tyro.conf.subcommand("get")]
    )

    def run(self) -> None:
        """Run what was chosen."""
        self.command.run()


@dataclass(frozen=True)
class SearchScheme:
    """Find what to train of a model: measure sensitivities, search under a budget, write a scheme.

    Attributes:
        config: A YAML file; configs/search has some.
        out: Folder for the results; that of the file unless given.
    """

    config: tyro.conf.Positional[Path]
    out: Path | None = None

    def run(self) -> None:
        """Search, show what was found, and print where it is written."""
        from pockjax._search_command import SearchConfig, run

        config = SearchConfig.load(self.config)
        config = config if self.out is None else replace(config, out=self.out)
        for path in run(config, Console(stderr=True)):
            print(path)


type Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Models, tyro.conf.subcommand("models")]
    | Annotated[SearchScheme, tyro.conf.subcommand("search")]
)


def parse(arguments: list[str]) -> Demo | Models | SearchScheme:
    """The command that the words after `pockjax` ask for.

    Raises:
        SystemExit: After printing help, or what is wrong.
    """
    return tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]
        prog="pockjax",
        args=arguments,
        description="Sparse backpropagation for JAX.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
