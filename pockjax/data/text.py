"""Labelled texts: a folder of them, and from texts to arrays."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from pockjax.data._loader import Draw, fitting
from pockjax.data.tokenizer import load_tokenizer

type Text = str | tuple[str, str]


@dataclass(frozen=True)
class Corpus:
    """Texts, each of one class.

    Attributes:
        texts: The texts, or pairs of texts that are judged together.
        labels: For each text, the index of its class in `classes`.
        classes: The classes' names.
    """

    texts: tuple[Text, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.texts)

    def take(self, indices: Sequence[int] | Int[np.ndarray, " taken"]) -> "Corpus":
        """The texts at these places, in this order, with the same classes."""
        return Corpus(
            texts=tuple(self.texts[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            classes=self.classes,
        )


@dataclass(frozen=True)
class Encoded:
    """Texts as arrays of one fixed length.

    Attributes:
        tokens: Token ids, padded at the end.
        valid: Which of them are not padding.
        labels: The index of each text's class.
        buckets: Lengths below the fixed one that batches of short texts are cut to.
    """

    tokens: Int[np.ndarray, "texts length"]
    valid: Bool[np.ndarray, "texts length"]
    labels: Int[np.ndarray, " texts"]
    buckets: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.labels)

    def take(self, indices: Int[np.ndarray, " taken"]) -> "Encoded":
        """The texts at these places, in this order."""
        return Encoded(
            self.tokens[indices], self.valid[indices], self.labels[indices], self.buckets
        )

    @property
    def widths(self) -> Int[np.ndarray, " texts"]:
        """The length that each text is padded to: its bucket."""
        return fitting(self.valid.sum(axis=1), self.buckets, self.tokens.shape[1])

    def batch(self, indices: Int[np.ndarray, " taken"], draw: Draw | None = None) -> "Encoded":
        """The texts at these places, cut to the bucket of the longest."""
        taken = self.take(indices)
        width = int(taken.widths.max())
        return Encoded(taken.tokens[:, :width], taken.valid[:, :width], taken.labels)


def read_folders(folder: str | os.PathLike[str]) -> Corpus:
    """Read a corpus that has a folder for each class and in it a `.txt` file for each text.

    A text that is there twice is kept once, however its white space differs: a copy on the other
    side of a split would be a held-out text that was trained on. Bytes that are not UTF-8 become
    the replacement character.

    Raises:
        FileNotFoundError: There are not two classes.
        ValueError: The same text is in two classes.
    """
    root = Path(folder)
    classes = tuple(sorted({path.parent.name for path in root.glob("*/*.txt")}))
    if len(classes) < 2:
        raise FileNotFoundError(
            f"{root} has {len(classes)} folders with .txt files; a corpus has one for each class"
        )
    label_of: dict[str, int] = {}
    for label, name in enumerate(classes):
        for path in sorted((root / name).glob("*.txt")):
            text = " ".join(path.read_text(encoding="utf-8", errors="replace").split())
            if label_of.setdefault(text, label) != label:
                raise ValueError(f"{path} is also in class {classes[label_of[text]]!r}")
    return Corpus(tuple(label_of), tuple(label_of.values()), classes)


def encode(
    corpus: Corpus,
    tokenizer: str | os.PathLike[str],
    *,
    length: int,
    buckets: tuple[int, ...] = (),
) -> Encoded:
    """Tokenise every text, cut or padded to one length.

    Args:
        corpus: The texts. Pairs are joined as the tokenizer says, and cut at the end of the longer.
        tokenizer: Anything that `pockjax.data.load_tokenizer` reads.
        length: Tokens for each text, the special ones included.
        buckets: Shorter lengths that batches of short texts are cut to; each costs one more
            compilation.

    Raises:
        MissingExtraError: `pip install 'pockjax[text]'` is needed.
        FileNotFoundError: There is no such file.
        ValueError: A bucket is longer than `length`.
    """
    reader = load_tokenizer(tokenizer)
    reader.enable_truncation(length)
    reader.enable_padding(length=length)
    encodings = reader.encode_batch(list(corpus.texts))
    fitting(np.zeros(0, int), buckets, length)  # before the tokens are used, not in the first batch
    return Encoded(
        tokens=np.array([encoding.ids for encoding in encodings], np.int32).reshape(-1, length),
        valid=np.array([e.attention_mask for e in encodings], np.bool_).reshape(-1, length),
        labels=np.array(corpus.labels, np.int32),
        buckets=buckets,
    )
