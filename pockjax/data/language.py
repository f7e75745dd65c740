"""Texts to continue: plain ones as windows, and instructions with their answers."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from pockjax.data._loader import Draw, fitting
from pockjax.data.tokenizer import load_tokenizer


class Continuations(NamedTuple):
    """A batch of sequences; unpack it into a step: `step(state, *batch)`.

    Attributes:
        tokens: What the model reads.
        targets: For each token, the one that follows it.
        weights: 1 where a target counts in the loss, else 0.
    """

    tokens: Int[np.ndarray, "batch length"]
    targets: Int[np.ndarray, "batch length"]
    weights: Float[np.ndarray, "batch length"]


@dataclass(frozen=True)
class Sequences:
    """Sequences of tokens to be predicted one by one.

    Attributes:
        tokens: Token ids, padded at the end; one more than a batch's length, as the last is only
            predicted.
        counted: Which of them count when they are predicted.
        valid: How many of each sequence are not padding.
        buckets: Lengths below the full one that batches of short sequences are cut to.
    """

    tokens: Int[np.ndarray, "sequences length+1"]
    counted: Bool[np.ndarray, "sequences length+1"]
    valid: Int[np.ndarray, " sequences"]
    buckets: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.tokens)

    @property
    def widths(self) -> Int[np.ndarray, " sequences"]:
        """The length that each sequence is padded to: its bucket."""
        return fitting(self.valid - 1, self.buckets, self.tokens.shape[1] - 1)

    def take(self, indices: Any) -> "Sequences":
        """The sequences at these places, in this order."""
        indices = np.asarray(indices, int)
        return Sequences(
            self.tokens[indices], self.counted[indices], self.valid[indices], self.buckets
        )

    def batch(self, indices: Int[np.ndarray, " taken"], draw: Draw | None = None) -> Continuations:
        """The sequences at these places, cut to the bucket of the longest."""
        taken = self.take(indices)
        width = int(taken.widths.max())
        return Continuations(
            taken.tokens[:, :width],
            taken.tokens[:, 1 : width + 1],
            taken.counted[:, 1 : width + 1].astype(np.float32),
        )


def read_texts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read a plain text, or every `.txt` below a folder, in alphabetical order.

    Raises:
        FileNotFoundError: There is no text.
        ValueError: A file is not UTF-8; the message has the line.
    """
    root = Path(path)
    files = sorted(root.rglob("*.txt")) if root.is_dir() else [root]
    if not files:
        raise FileNotFoundError(f"{root} has no .txt files")
    return tuple(_read(file) for file in files)


def _read(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}:{line}: not UTF-8: {error}") from error


def windows(
    texts: Sequence[str],
    tokenizer: str | os.PathLike[str],
    *,
    length: int,
    stride: int | None = None,
    separator: str | None = None,
) -> Sequences:
    """Cut texts into sequences of one length, each of whose tokens is to be predicted.

    The texts are one long row of tokens; what is left over at its end is too short and dropped.

    Args:
        texts: One or more.
        tokenizer: Anything that `pockjax.data.load_tokenizer` reads.
        length: Tokens that the model reads at a time.
        stride: Tokens from the start of one sequence to that of the next; `length` by default, so
            that each token is predicted once. With less, sequences share tokens: split the texts
            rather than the sequences.
        separator: A special token to put after each text, such as "<|endoftext|>".

    Raises:
        MissingExtraError: `pip install 'pockjax[text]'` is needed.
        FileNotFoundError: There is no such tokenizer.
        ValueError: The texts are too short, or the tokenizer has no such separator.
    """
    reader = load_tokenizer(tokenizer)
    ids: list[int] = []
    end = [] if separator is None else [_token(reader, separator)]
    for text in texts:
        ids += reader.encode(text).ids + end
    stride = length if stride is None else stride
    if length < 1 or stride < 1:
        raise ValueError(f"length {length} and stride {stride} are at least 1")
    if len(ids) <= length:
        raise ValueError(f"{len(ids)} tokens are too few for a sequence of {length} and one more")
    row = np.array(ids, np.int32)
    # Views of the row: sequences that share tokens cost nothing.
    tokens = np.lib.stride_tricks.sliding_window_view(row, length + 1)[::stride]
    return Sequences(
        tokens,
        np.broadcast_to(np.True_, tokens.shape),
        np.full(len(tokens), length + 1),
    )


@dataclass(frozen=True)
class Instruction:
    """A task and the answer that is wanted.

    Attributes:
        instruction: The task.
        input: What it is about; may be empty.
        output: The answer.
    """

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        """What a model reads before it answers, in the form that Alpaca made usual."""
        context = ", paired with an input that provides further context" if self.input else ""
        given = f"### Input:\n{self.input}\n\n" if self.input else ""
        return (
            f"Below is an instruction that describes a task{context}. Write a response that "
            "appropriately completes the request.\n\n"
            f"### Instruction:\n{self.instruction}\n\n{given}### Response:\n"
        )


def read_instructions(path: str | os.PathLike[str]) -> tuple[Instruction, ...]:
    """Read instructions in Alpaca's format: JSON objects with "instruction", "input", "output".

    Args:
        path: A JSON array of such objects, or one a line. "input" may be missing.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Not JSON, or a record without one of the keys; the message has the line.
    """
    file = Path(path)
    found = []
    for line, record in _records(file, _read(file)):
        if not isinstance(record, dict):
            raise ValueError(f"{file}:{line}: a JSON object was expected, not {record!r:.40}")
        values = {"input": "", **record}
        for key in ("instruction", "input", "output"):
            if not isinstance(values.get(key), str):
                raise ValueError(f"{file}:{line}: the record has no text {key!r}")
        found.append(Instruction(values["instruction"], values["input"], values["output"]))
    if not found:
        raise ValueError(f"{file} has no instructions")
    return tuple(found)


def _records(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The elements of an array, or of lines, each with the line that it begins in."""
    decode = json.JSONDecoder().raw_decode
    at, array = _skip(text, 0, ""), text.lstrip().startswith("[")
    if array:
        at = _skip(text, at + 1, "")
    line, counted = 1, 0
    while at < len(text) and not (array and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            record, at = decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
        yield line, record
        at = _skip(text, at, "," if array else "")
    if array and at >= len(text):
        raise ValueError(f"{file}:{text.count(chr(10)) + 1}: the array does not end")
    if array and (rest := _skip(text, at + 1, "")) < len(text):
        line = text.count("\n", 0, rest) + 1
        raise ValueError(f"{file}:{line}: more follows the end of the array")


def _skip(text: str, at: int, also: str) -> int:
    while at < len(text) and text[at] in " \t\r\n" + also:
        at += 1
    return at


def encode_instructions(
    instructions: Sequence[Instruction],
    tokenizer: str | os.PathLike[str],
    *,
    length: int,
    end: str,
    buckets: tuple[int, ...] = (),
) -> Sequences:
    """Turn instructions into sequences of which only the answers count.

    A sequence is a prompt, its answer and the end token, cut after `length`; where not even the
    answer's first token fits, the instruction is left out.

    Args:
        instructions: What to encode.
        tokenizer: Anything that `pockjax.data.load_tokenizer` reads.
        length: The most tokens that the model reads at a time.
        end: The special token that ends an answer, such as "<|im_end|>" or "</s>".
        buckets: Shorter lengths that batches of short sequences are cut to.

    Raises:
        MissingExtraError: `pip install 'pockjax[text]'` is needed.
        FileNotFoundError: There is no such tokenizer.
        ValueError: No answer fits, a bucket is longer than `length`, or the tokenizer has no such
            end token.
    """
    reader = load_tokenizer(tokenizer)
    last = _token(reader, end)
    prompts = [one.prompt for one in instructions]
    whole = [one.prompt + one.output for one in instructions]
    tokens, counted, valid = [], [], []
    for prompt, encoding in zip(prompts, reader.encode_batch(whole), strict=True):
        # By places in the text: a prompt's last token may be another with an answer behind it.
        answer = [stop > len(prompt) for _, stop in encoding.offsets]
        ids = np.array([*encoding.ids, last], np.int32)[: length + 1]
        counts = np.array([*answer, True])[: length + 1]
        if not counts.any():
            continue
        padding = (0, length + 1 - len(ids))
        # What fills up is not counted, so that any token does.
        tokens.append(np.pad(ids, padding, constant_values=last))
        counted.append(np.pad(counts, padding))
        valid.append(len(ids))
    if not tokens:
        raise ValueError(f"none of {len(instructions)} answers begins within {length} tokens")
    fitting(np.zeros(0, int), buckets, length)  # an error here, not in the first batch
    return Sequences(np.stack(tokens), np.stack(counted), np.array(valid), buckets)


def _token(reader: Any, piece: str) -> int:
    found = reader.token_to_id(piece)
    if found is None:
        raise ValueError(f"the tokenizer has no token {piece!r}")
    return found
