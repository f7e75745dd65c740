"""Schemes: masks as text, to be read, compared, kept and reproduced."""

import dataclasses
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml
from jaxtyping import PyTree

from pockjax._names import unknown_key
from pockjax.masks._part import MaskError, Part
from pockjax.masks._resolve import resolve
from pockjax.masks._rules import Rule

_TEXTS = ("name", "model", "source")
_MAPPINGS = ("budget", "predicted", "notes")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A mask as text: ordered rules, and where they come from.

    A leaf is decided by the first rule whose pattern matches its path, and frozen if
    none does. Turn a scheme into a mask with `mask`.

    Attributes:
        rules: the rules.
        name: what the scheme is called.
        model: the model whose parameters the rules are written for.
        source: where the scheme is from: a publication, a search.
        budget: what a step may take, such as ``{"memory": "48MiB"}``.
        predicted: what a step was predicted to take.
        notes: anything else worth keeping.

    Raises:
        MaskError: if a field is not text, or not plain data, where it must be.

    >>> scheme = Scheme.from_rules([(".*/bias", "all"), ("head/kernel", {"in": 0.5})], name="toy")
    >>> print(scheme)
    name: toy
    rules:
    - path: .*/bias
      train: all
    - path: head/kernel
      train: {in: 0.5}
    """

    rules: tuple[Rule, ...]
    name: str = ""
    model: str = ""
    source: str = ""
    budget: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    predicted: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the fields and make metadata plain data, so that it survives as text."""
        if not self.rules:
            raise MaskError("a scheme needs at least one rule")
        for field in _TEXTS:
            if not isinstance(getattr(self, field), str):
                raise MaskError(f"{field} must be text, got {getattr(self, field)!r}")
        for field in _MAPPINGS:
            if not isinstance(getattr(self, field), Mapping):
                raise MaskError(f"{field} must be a mapping, got {getattr(self, field)!r}")
            object.__setattr__(self, field, _plain(getattr(self, field), field))

    @classmethod
    def from_rules(
        cls, rules: Iterable[Rule | Sequence[Any] | Mapping[str, Any]], **metadata: Any
    ) -> Self:
        """Make a scheme of rules.

        Args:
            rules: each a `Rule`, a tuple of its fields or a mapping with them as keys.
            **metadata: the other fields of the scheme.

        Raises:
            MaskError: if a rule is malformed, saying which and what is allowed.
        """
        made = []
        for number, rule in enumerate(rules, start=1):
            try:
                made.append(_make_rule(rule))
            except MaskError as error:
                raise MaskError(f"rule {number}: {error}") from None
        return cls(tuple(made), **metadata)

    @classmethod
    def from_mask(cls, params: PyTree, mask: PyTree, **metadata: Any) -> Self:
        """Write a mask down exactly, with one rule for each trained leaf.

        Args:
            params: the parameters that the mask is for.
            mask: True, False or a `Part` for each leaf, or a prefix of that. Traced
                indices are written down with the values they have.
            **metadata: the other fields of the scheme.

        Raises:
            MaskError: if the mask does not fit, trains nothing, or has indices whose
                values are not known because they are being traced.

        >>> params = {"w": np.ones((4, 8)), "b": np.ones(8)}
        >>> Scheme.from_mask(params, {"w": Part((slice(2),)), "b": False}).rules
        (Rule(path='w', train='[:2]', note=''),)
        """
        entries, _, paths = resolve(params, mask)
        rules = [
            (re.escape(path), entry if isinstance(entry, bool) else Part.from_block(entry))
            for path, entry in zip(paths, entries, strict=True)
            if entry is not False
        ]
        return cls.from_rules(rules, **metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a scheme from a YAML file.

        Raises:
            MaskError: if it is not a scheme, naming the file, the rule and what is
                allowed there.
            OSError: if the file cannot be read.
        """
        return cls.parse(Path(path).read_text(encoding="utf-8"), origin=os.fspath(path))

    @classmethod
    def parse(cls, text: str, origin: str = "scheme") -> Self:
        """Read a scheme from YAML.

        Args:
            text: what `str` of a scheme gives, or a person wrote.
            origin: where it is from, for error messages.

        Raises:
            MaskError: as `load` does.
        """
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise MaskError(
                f"{origin}: not valid YAML (indices must be quoted, as in '[:, :64]'): {error}"
            ) from None
        try:
            if not isinstance(data, Mapping):
                raise MaskError(f"must be a mapping, got {type(data).__name__}")
            _check_keys(data, cls)
            if not isinstance(data.get("rules"), list):
                raise MaskError("rules must be a list of {path: ..., train: ...}")
            return cls.from_rules(**data)
        except MaskError as error:
            raise MaskError(f"{origin}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scheme to a YAML file, all of it or, if that fails, nothing."""
        path = Path(path)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            # A file inside, as tempfile's own files are readable by their owner alone.
            written = Path(folder, path.name)
            written.write_text(f"{self}\n", encoding="utf-8")
            os.replace(written, path)

    def __str__(self) -> str:
        """Write the scheme as YAML, fields left empty omitted."""
        data = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "rules" and getattr(self, field.name)
        }
        data["rules"] = [
            {"path": rule.path, "train": _Inline(rule.train)}
            | ({"note": rule.note} if rule.note else {})
            for rule in self.rules
        ]
        text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=88)
        return text.rstrip("\n")


class _Inline:
    """Data to be written on one line."""

    def __init__(self, data: Any) -> None:
        self.data = data


class _Dumper(yaml.SafeDumper):
    pass


def _represent_inline(dumper: _Dumper, inline: _Inline) -> yaml.Node:
    node = dumper.represent_data(inline.data)
    pending = [node]
    while pending:
        item = pending.pop()
        if isinstance(item, yaml.CollectionNode):
            item.flow_style = True
            for child in item.value:
                pending += child if isinstance(child, tuple) else [child]
    return node


_Dumper.add_representer(_Inline, _represent_inline)


def _make_rule(rule: Rule | Sequence[Any] | Mapping[str, Any]) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, Mapping):
        _check_keys(rule, Rule)
        if "path" in rule and "train" in rule:
            return Rule(**rule)
    elif isinstance(rule, Sequence) and not isinstance(rule, str) and len(rule) in (2, 3):
        return Rule(*rule)
    raise MaskError(f"a rule needs path and train, got {rule!r}")


def _check_keys(data: Mapping[str, Any], made_of: type) -> None:
    """Raise for a key that is no field of a dataclass."""
    problem = unknown_key(data, [field.name for field in dataclasses.fields(made_of)])
    if problem is not None:
        raise MaskError(problem)


def _plain(value: Any, where: str) -> Any:
    """Copy metadata as plain data that YAML gives back unchanged."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise MaskError(f"{where} must be plain data (text, numbers, lists, mappings), got {value!r}")
