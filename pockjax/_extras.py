"""Import what only an extra installs, or say which extra that is."""

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A package is missing that only an optional part of pockjax needs."""


def require(module: str, extra: str) -> ModuleType:
    """Import a module that the core does not depend on.

    Args:
        module: The dotted name to import.
        extra: The pockjax extra that installs it.

    Raises:
        MissingExtraError: The module is not installed; the message is the command that installs it.

    Example:
        >>> require("json", "text").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the module is there, and something that it needs is not
        raise MissingExtraError(
            f"{module!r} is not installed; it comes with: pip install 'pockjax[{extra}]' "
            f"(in a checkout: pip install '.[{extra}]')",
            name=error.name,
        ) from error
