"""The command line: `pockjax demo`, `models`, `search`, `--version`. No logic of its own."""

import sys
from collections.abc import Sequence
from importlib.metadata import version

from pockjax._allocator import begin_again
from pockjax._extras import MissingExtraError, require


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The words after `pockjax`; those of the process unless given.

    Returns:
        The exit code: 0, 1 for an error that was explained, 2 for wrong arguments, 130 for Ctrl-C.
    """
    if arguments is None:  # the process is ours, not that of a program that calls this
        if sys.argv[1:] != ["--version"]:
            begin_again()
        arguments = sys.argv[1:]
    try:
        if list(arguments) == ["--version"]:
            print(f"pockjax {version('pockjax')}")
            return 0
        return _command(arguments)
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _command(arguments: Sequence[str]) -> int:
    for module in ("tyro", "rich", "matplotlib", "psutil"):
        require(module, "cli")
    # Here, because they need the extra, and because `--version` need not wait for JAX.
    from pockjax._commands import parse
    from pockjax.demo import DemoError
    from pockjax.hub import HubError

    try:
        parse(list(arguments)).run()
    except SystemExit as ending:  # tyro printed the help, or what is wrong
        return ending.code if isinstance(ending.code, int) else 2
    except (DemoError, HubError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
