"""What a rule trains of an array: the forms that `Rule` lists, read and applied."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pockjax.masks._part import MaskError, Part, index_text, misfit, part

type Channels = dict[str, Any]
type Train = str | Channels | list[Channels]

_NAMED_AXES = {"in": -2, "out": -1}
_WAYS = ("ratio", "first", "last", "indices", "start", "stop")
_ALLOWED = (
    "allowed are all, none, an index such as '[:, :64]', {in: 0.25}, {out: 0.25}, and "
    f"{{axis: ..., {', '.join(_WAYS)}}}"
)


def normalise_train(train: Any) -> Train:
    """Check a form and return it as plain data with one spelling.

    Args:
        train: any of the forms, a bool, or a `Part` without traced indices.

    Raises:
        MaskError: if it is none of them, saying which are allowed.

    >>> normalise_train(True), normalise_train("[ :,0:4 ]"), normalise_train({"in": 0.5})
    ('all', '[:, 0:4]', {'in': 0.5})
    """
    if isinstance(train, bool):
        return "all" if train else "none"
    if isinstance(train, Part):
        if not train.is_static:
            raise MaskError(f"{train!r} has traced indices, which a scheme cannot hold")
        return index_text(train)
    if isinstance(train, str):
        if train.strip() in ("all", "none"):
            return train.strip()
        return index_text(parse_index(train))
    if isinstance(train, Mapping):
        return _normalise_channels(train)
    if isinstance(train, Sequence) and train:
        if all(isinstance(item, Mapping) for item in train):
            return [_normalise_channels(item) for item in train]
        raise MaskError(f"{list(train)!r}: an index must be quoted; {_ALLOWED}")
    raise MaskError(f"cannot train {train!r}: {_ALLOWED}")


def parse_index(text: str) -> Part:
    """Read an index in NumPy's notation, without evaluating anything.

    Raises:
        MaskError: if it holds more than integers, slices, lists of integers or
            booleans, and ``...``.

    >>> parse_index("[:, :64]")
    part[:, :64]
    """
    if text.strip().startswith("["):
        try:
            node = ast.parse(f"_{text.strip()}", mode="eval").body
            # More than one subscript would hide in the value: "[0][1]" is "_[0][1]".
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
                indices = _read_index(node.slice)
                return part[indices]
        except MaskError:
            raise
        except (SyntaxError, ValueError):
            pass
    raise MaskError(f"cannot read {text!r}: {_ALLOWED}")


def entry_for(train: Train, shape: tuple[int, ...], path: str = "", rule: str = "") -> bool | Part:
    """Turn a normalised form into the mask entry of an array of a given shape.

    Raises:
        MaskError: if channels lie outside the array or an axis is named twice; that an
            index fits is checked by `Part.resolve`.

    >>> entry_for({"in": 0.25}, (3, 3, 16, 64))
    part[:, :, :4]
    """
    if isinstance(train, str):
        return train == "all" if train in ("all", "none") else parse_index(train)

    def fail(problem: str) -> MaskError:
        return misfit(f"train {train}", problem, shape, path, rule)

    indices: list[Any] = [slice(None)] * len(shape)
    given = [train] if isinstance(train, dict) else train
    for channels in (one_axis for item in given for one_axis in _split_axes(item)):
        axis = channels["axis"]
        axis = _NAMED_AXES[axis] if isinstance(axis, str) else axis
        if not -len(shape) <= axis < len(shape):
            raise fail(f"there is no axis {channels['axis']}")
        if indices[axis] != slice(None):
            raise fail(f"axis {channels['axis']} is named twice")
        try:
            indices[axis] = _pick(channels, shape[axis])
        except MaskError as error:
            raise fail(f"axis {channels['axis']}: {error}") from None
    while indices and indices[-1] == slice(None):
        indices.pop()
    return part[tuple(indices)]


def _read_index(node: ast.expr) -> Any:
    """Evaluate the syntax tree of an index; ValueError for anything else."""
    if isinstance(node, ast.Tuple):
        return tuple(_read_index(item) for item in node.elts)
    if isinstance(node, ast.Slice):
        bounds = (node.lower, node.upper, node.step)
        return slice(*(b and ast.literal_eval(b) for b in bounds))
    return ast.literal_eval(node)


def _normalise_channels(channels: Mapping[str, Any]) -> Channels:
    plain = {
        key: value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        for key, value in channels.items()
    }
    for one_axis in _split_axes(plain):
        _check_channels(one_axis)
    return plain


def _split_axes(channels: Channels) -> list[Channels]:
    """Write ``{in: r, out: s}`` as channels of two axes; keep other forms."""
    if channels and set(channels) <= set(_NAMED_AXES):
        return [{"axis": axis, "ratio": ratio} for axis, ratio in channels.items()]
    return [channels]


def _check_channels(channels: Channels) -> None:
    allowed = ("axis", *_WAYS, "divisor")
    unknown = [key for key in channels if key not in allowed]
    if unknown:
        raise MaskError(f"unknown key {unknown[0]!r} in {channels}: {_ALLOWED}")
    axis = channels.get("axis")
    if not (_is_int(axis) or axis in _NAMED_AXES):
        raise MaskError(f"axis must be an integer, 'in' or 'out' in {channels}")
    ways = [key for key in _WAYS if key in channels]
    if len(ways) != 1 and ways != ["start", "stop"]:
        raise MaskError(
            f"{channels} must have exactly one of ratio, first, last, indices, or start and stop"
        )
    if "divisor" in channels and ("ratio" not in channels or not _is_positive(channels["divisor"])):
        raise MaskError(f"divisor must be a positive integer beside ratio in {channels}")
    value = channels[ways[0]]
    if "ratio" in channels:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise MaskError(
                f"ratio must be above 0 and at most 1, got {value!r} in {channels}; to "
                "train nothing, write none"
            )
    elif "indices" in channels:
        if not (isinstance(value, list) and value and all(map(_is_int, value))):
            raise MaskError(f"indices must be a list of integers in {channels}")
    elif ways[0] in ("first", "last"):
        if not _is_positive(value):
            raise MaskError(f"{ways[0]} must be a positive integer in {channels}")
    elif not all(_is_int(channels[way]) for way in ways):
        raise MaskError(f"start and stop must be integers in {channels}")


def _pick(channels: Channels, size: int) -> slice | list[int]:
    """The index that names these channels of an axis."""
    if "ratio" in channels:
        unit = channels.get("divisor", 1)
        count = unit * max(1, round(channels["ratio"] * size / unit))
        return slice(min(count, size))
    if "indices" in channels:
        return channels["indices"]
    for way in ("first", "last"):
        if channels.get(way, 0) > size:
            raise MaskError(f"{way} {channels[way]} exceeds its size, {size}")
    if "first" in channels:
        return slice(channels["first"])
    if "last" in channels:
        return slice(size - channels["last"], size)
    return slice(channels.get("start"), channels.get("stop"))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_int(value) and value > 0
