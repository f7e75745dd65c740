"""Rules: the lines of a scheme, and how they are matched against parameters."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any

from pockjax.masks._part import MaskError, Part
from pockjax.masks._resolve import is_trainable, resolve_leaf, untrainable
from pockjax.masks._train import entry_for, normalise_train


@dataclasses.dataclass(frozen=True)
class Rule:
    """Says what to train of the leaves whose path matches a pattern.

    What to train is one of

    - ``all`` or ``none``;
    - an index in NumPy's notation, as a string: ``"[:, :64]"``, ``"[..., [0, 3]]"``;
    - input or output channels at a ratio: ``{in: 0.25}``, ``{in: 0.5, out: 0.5}``;
    - channels of any axis: ``{axis: 1, first: 8}``, ``{axis: -2, ratio: 0.25, divisor: 8}``;
    - a list of the last, for a block cut along several axes.

    An axis is a number, ``in`` or ``out``: in kernels as Flax lays them out, input
    channels are axis -2 and output channels axis -1. Channels of it are chosen by one of
    ``ratio`` (the first ``round(ratio * n)`` of n, at least one; with ``divisor``, a
    multiple of that), ``first``, ``last``, ``indices``, or ``start`` and ``stop``.

    Attributes:
        path: regular expression that must match the whole "/"-joined path of a leaf.
        train: what to train of such a leaf; a bool or a `Part` without traced indices
            is accepted, too, and written in one of the forms above.
        note: why, for readers.

    Raises:
        MaskError: if the pattern is no regular expression or `train` none of its forms.

    >>> Rule("blocks/[0-9]+/expand/conv/kernel", {"in": 0.5}).train
    {'in': 0.5}
    """

    path: str
    train: Any
    note: str = ""

    def __post_init__(self) -> None:
        """Check the fields and bring `train` into normal form."""
        if not isinstance(self.path, str) or not isinstance(self.note, str):
            raise MaskError(f"path and note must be text, got {self.path!r}, {self.note!r}")
        try:
            re.compile(self.path)
        except re.error as error:
            raise MaskError(f"{self.path!r} is not a regular expression: {error}") from None
        object.__setattr__(self, "train", normalise_train(self.train))


def apply_rules(rules: Sequence[Rule], named: Sequence[tuple[str, Any]]) -> list[bool | Part]:
    """Give every leaf the entry of the first rule that matches it, or False.

    Args:
        rules: rules, the first to match a leaf deciding.
        named: pairs ``(path, leaf)``.

    Returns:
        For each leaf True, False or a Part, validated against the leaf.

    Raises:
        MaskError: if a rule matches no leaf or only leaves that earlier rules have
            matched, if what it trains does not fit a leaf, or if it singles out a leaf
            that cannot be trained.

    >>> import numpy as np
    >>> leaves = [("a/kernel", np.ones((4, 8))), ("a/bias", np.ones(8))]
    >>> apply_rules([Rule(".*bias", "all"), Rule("a/.*", {"out": 0.5})], leaves)
    [part[:, :4], True]
    """
    patterns = [re.compile(rule.path) for rule in rules]
    matches = [
        [i for i, pattern in enumerate(patterns) if pattern.fullmatch(path)] for path, _ in named
    ]
    for number, rule in enumerate(rules):
        _check_used(number, rule, matches, [path for path, _ in named])
    entries = []
    for (path, leaf), matched in zip(named, matches, strict=True):
        entry: bool | Part = False
        if matched:
            rule = rules[matched[0]]
            label = f"{matched[0] + 1}: '{rule.path}'"
            if rule.train != "none" and not is_trainable(leaf):
                # A pattern may sweep over such leaves; one that names this leaf, or
                # a block of it, means it.
                if rule.train != "all" or rule.path in (path, re.escape(path)):
                    raise untrainable(leaf, path, f"train {rule.train}", label)
            else:
                entry = entry_for(rule.train, getattr(leaf, "shape", ()), path, label)
                resolve_leaf(leaf, entry, path, label)
        entries.append(entry)
    return entries


def _check_used(number: int, rule: Rule, matches: list[list[int]], paths: list[str]) -> None:
    """Raise if a rule decides about no leaf."""
    if any(matched[:1] == [number] for matched in matches):
        return
    label = f"rule {number + 1}: '{rule.path}'"
    before = sorted({matched[0] + 1 for matched in matches if number in matched})
    if before:
        raise MaskError(
            f"{label} is never reached: all that it matches is matched before, by rule "
            + ", ".join(map(str, before))
        )
    nearest = difflib.get_close_matches(rule.path, paths, n=3, cutoff=0.0)
    raise MaskError(
        f"{label} matches no parameter; the nearest are "
        + ", ".join(f"'{path}'" for path in nearest)
    )
