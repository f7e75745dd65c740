"""Things known by name: registries, and errors that say what was probably meant."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any


class Registry[T]:
    """Things under names.

    >>> solvers = Registry[Callable[[], int]]("solver")
    >>> @solvers.register("greedy")
    ... def greedy() -> int:
    ...     return 1
    >>> solvers["greedy"]()
    1
    >>> solvers["gredy"]
    Traceback (most recent call last):
    ValueError: no solver is named 'gredy'; there are: greedy
    """

    def __init__(self, what: str):
        """Empty.

        Args:
            what: what is registered, in one word, for errors.
        """
        self._what = what
        self._known: dict[str, T] = {}

    def add(self, name: str, thing: T) -> None:
        """Makes a thing known under a name.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._known:
            raise ValueError(f"a {self._what} named {name!r} is registered already")
        self._known[name] = thing

    def register(self, name: str) -> Callable[[T], T]:
        """`add` as a decorator."""

        def decorate(thing: T) -> T:
            self.add(name, thing)
            return thing

        return decorate

    def names(self) -> tuple[str, ...]:
        """All names, in alphabetical order."""
        return tuple(sorted(self._known))

    def __getitem__(self, name: str) -> T:
        """The thing of a name.

        Raises:
            ValueError: there is none; the message has the nearest names.
        """
        if name not in self._known:
            near = difflib.get_close_matches(name, self._known) or self.names()
            raise ValueError(f"no {self._what} is named {name!r}; there are: {', '.join(near)}")
        return self._known[name]


def unknown_key(given: Iterable[Any], allowed: Iterable[str], what: str = "key") -> str | None:
    """The first of some keys that is not allowed, in words; None if all are.

    >>> unknown_key({"nmae": "x"}, ["name", "rules"])
    "unknown key 'nmae' (did you mean name?); allowed are name, rules"
    """
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            return f"unknown {what} {key!r}{hint}; allowed are {', '.join(allowed)}"
    return None
