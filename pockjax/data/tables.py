"""Labelled texts in tables: CSV, TSV, JSON lines, and "label text" a line."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pockjax.data.text import Corpus, Text

type Column = str | int

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")


def read_table(
    path: str | os.PathLike[str],
    *,
    text: Column | tuple[Column, Column],
    label: Column,
    delimiter: str | None = None,
    classes: Sequence[str] | None = None,
    encoding: str = "utf-8",
) -> Corpus:
    r"""Read labelled texts from a table.

    Columns are named if the table has names for them (JSON lines, or a first line with names), and
    numbered from 0 if it has none: `text=1, label=0`.

    Args:
        path: The file: `.jsonl`, or one with a text a line.
        text: The text's column, or the two columns of a pair of texts.
        label: The label's column.
        delimiter: What separates columns; by default a comma for `.csv`, where quotes may enclose a
            text, and a tab for `.tsv`, where quotes are quotes. With " " a line is its label and,
            after the first space, its text.
        classes: The labels, in the order of their numbers; by default those that occur, in
            alphabetical order. Give the training data's classes to read its test data.
        encoding: How the file is encoded; a byte order mark is skipped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line that cannot be read, with its number; or a column or label that is not
            there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "reviews.tsv"
        ...     _ = path.write_text("stars\treview\n5\tlovely\n1\tawful\n")
        ...     read_table(path, text="review", label="stars")
        Corpus(texts=('lovely', 'awful'), labels=(1, 0), classes=('1', '5'))
    """
    path = Path(path)
    columns = (label, *(text if isinstance(text, tuple) else (text,)))
    rows = list(_rows(path, columns, delimiter, encoding))
    if not rows:
        raise ValueError(f"{path} has no texts")
    if classes is None:
        classes = sorted({values[0] for _, values in rows})
    number = {name: k for k, name in enumerate(classes)}
    texts: list[Text] = []
    labels = []
    for line, (name, *parts) in rows:
        if name not in number:
            raise ValueError(f"{path}:{line}: label {name!r} is none of {', '.join(classes)}")
        texts.append(parts[0] if len(parts) == 1 else (parts[0], parts[1]))
        labels.append(number[name])
    return Corpus(tuple(texts), tuple(labels), tuple(classes))


def _rows(
    path: Path, columns: Sequence[Column], delimiter: str | None, encoding: str
) -> Iterator[tuple[int, list[str]]]:
    """For each text, its line in the file and what its columns hold."""
    named = {isinstance(column, str) for column in columns}
    if len(named) > 1:
        raise ValueError(f"columns are all names or all numbers, not {columns}")
    lines = _lines(path, encoding)
    if path.suffix in _JSON_LINES:
        yield from _objects(path, lines, columns)
        return
    if delimiter is None:
        if path.suffix not in _DELIMITERS:
            raise ValueError(f"{path}: give its delimiter; only .csv, .tsv and .jsonl imply one")
        delimiter = _DELIMITERS[path.suffix]
    cells = _cells(path, lines, delimiter)
    if named == {True}:
        _, header = next(cells, (0, []))
        if missing := [column for column in columns if column not in header]:
            raise ValueError(f"{path}:1: no column {missing[0]!r}; there are: {', '.join(header)}")
        places = [header.index(str(column)) for column in columns]
        width = len(header)
    else:
        places = [int(column) for column in columns]
        width = None
    for line, row in cells:
        width = len(row) if width is None else width
        if len(row) != width or max(places) >= width:
            raise ValueError(
                f"{path}:{line}: {len(row)} columns instead of {max(width, max(places) + 1)}"
            )
        yield line, [row[place].strip() for place in places]


def _lines(path: Path, encoding: str) -> Iterator[str]:
    """Lines, decoded one by one so that a bad byte can be found."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield line.decode(encoding)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not {encoding}: {error}") from error


def _cells(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    if delimiter != ",":
        # Only in comma-separated files do quotes mean anything.
        limit = 1 if delimiter == " " else -1
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line.rstrip("\r\n").split(delimiter, limit)
        return
    reader = csv.reader(lines, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}:{first}: {error}") from error
        if row:
            yield first, row


def _objects(
    path: Path, lines: Iterator[str], columns: Sequence[Column]
) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(record, Mapping):
            raise ValueError(f"{path}:{number}: a JSON object was expected, not {line.strip()}")
        for column in columns:
            if column not in record:
                raise ValueError(
                    f"{path}:{number}: no {column!r}; there are: {', '.join(map(str, record))}"
                )
        yield number, [str(record[column]).strip() for column in columns]
