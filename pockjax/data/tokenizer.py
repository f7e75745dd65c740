"""Tokenizers, wherever a vocabulary stands: tokenizer.json, inside a GGUF file, or llama2.c's .bin.

All of them become a `tokenizers.Tokenizer`, so that text goes in and out in one way:

    tokenizer = load_tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer.decode(tokenizer.encode("The capital of Italy is").ids)

Two kinds of vocabulary are read. A byte-level one ("gpt2" in GGUF) lists which neighbours merge, in
order. One in SentencePiece's manner ("llama" in GGUF, and llama2.c's) has a score for each piece
instead: the neighbours that make the piece with the best score merge first.
"""

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pockjax._extras import require
from pockjax.weights import read_gguf

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# How text is cut before pieces merge, by GGUF's "tokenizer.ggml.pre".
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r")
_AS_GPT2 = ("gpt-2", "default")
_AS_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(path: str | os.PathLike[str]) -> "Tokenizer":
    """Read a tokenizer.

    Args:
        path: A `tokenizer.json` as Hugging Face writes it, a GGUF file, a llama2.c vocabulary
            (`.bin`), or a folder with a `tokenizer.json` or one `.gguf`.

    Raises:
        MissingExtraError: `pip install 'pockjax[text]'` is needed.
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or its kind of vocabulary is not read.
    """
    library = require("tokenizers", "text")
    path = Path(path)
    if path.is_dir():
        files = [path / "tokenizer.json"]
        files = files if files[0].is_file() else sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise FileNotFoundError(f"{path} holds neither tokenizer.json nor exactly one .gguf")
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.suffix == ".bin":
        return _from_llama2c(path)
    try:
        return library.Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def _from_gguf(path: Path) -> "Tokenizer":
    given = read_gguf(path).metadata
    kind = given.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{path}: its vocabulary is of kind {kind!r}; read are 'gpt2' and 'llama'")
    pieces = given["tokenizer.ggml.tokens"]
    types = given.get("tokenizer.ggml.token_type", [_NORMAL] * len(pieces))
    if kind == "gpt2":
        tokenizer = _byte_level(path, pieces, given)
    else:
        normal = [kind == _NORMAL for kind in types]
        unknown = pieces[given.get("tokenizer.ggml.unknown_token_id", 0)]
        prefix = given.get("tokenizer.ggml.add_space_prefix", True)
        scores = given["tokenizer.ggml.scores"]
        # SentencePiece writes spaces as a lower block.
        tokenizer = _scored(pieces, scores, normal, unknown, space="\u2581", prefix=prefix)
    _mark(tokenizer, [p for p, t in zip(pieces, types, strict=True) if t == _CONTROL], special=True)
    apart = [p for p, t in zip(pieces, types, strict=True) if t == _USER_DEFINED]
    _mark(tokenizer, apart, special=False)
    if given.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        _begin_with(tokenizer, pieces[given["tokenizer.ggml.bos_token_id"]])
    return tokenizer


def _from_llama2c(path: Path) -> "Tokenizer":
    """Read the longest piece's size, then for each piece its score, size and bytes."""
    data = path.read_bytes()
    pieces, scores, at = [], [], 4
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError(f"{path} is cut short: piece {len(pieces)} has no size")
        score, size = struct.unpack_from("<fi", data, at)
        piece, at = data[at + 8 : at + 8 + size], at + 8 + size
        if size < 1 or len(piece) < size:
            raise ValueError(
                f"{path} is cut short or not a vocabulary: piece {len(pieces)} of {size} bytes "
                f"ends at byte {at}, the file at {len(data)}"
            )
        scores.append(score)
        pieces.append(piece.decode("utf-8", errors="surrogateescape"))
    # The first three are unknown, begin and end; single bytes follow, then what merges.
    if len(pieces) < 3 + 256:
        raise ValueError(f"{path} is not a vocabulary: it has only {len(pieces)} pieces")
    normal = [k >= 3 + 256 for k in range(len(pieces))]
    tokenizer = _scored(pieces, scores, normal, pieces[0], space=" ", prefix=True)
    _mark(tokenizer, pieces[1:3], special=True)
    _begin_with(tokenizer, pieces[1])
    return tokenizer


def _byte_level(path: Path, pieces: Sequence[str], given: Mapping[str, Any]) -> "Tokenizer":
    library = require("tokenizers", "text")
    merges = [tuple(merge.split(" ", 1)) for merge in given["tokenizer.ggml.merges"]]
    vocabulary = {piece: k for k, piece in enumerate(pieces)}
    tokenizer = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=merges))
    cut, pre = library.pre_tokenizers, given.get("tokenizer.ggml.pre", "default")
    if pre in _AS_GPT2:
        steps = [cut.ByteLevel(add_prefix_space=False)]
    elif pre in _DIGITS_APART:
        steps = [cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)]
    elif pre in _AS_LLAMA3:
        pattern = library.Regex(_LLAMA3_PATTERN)
        steps = [
            cut.Split(pattern, behavior="isolated"),
            cut.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        known = ", ".join((*_AS_GPT2, *_DIGITS_APART, *_AS_LLAMA3))
        raise ValueError(f"{path}: text is cut in the manner of {pre!r}; read are: {known}")
    tokenizer.pre_tokenizer = cut.Sequence(steps)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _scored(
    pieces: Sequence[str],
    scores: Sequence[float],
    normal: Sequence[bool],
    unknown: str,
    *,
    space: str,
    prefix: bool,
) -> "Tokenizer":
    library = require("tokenizers", "text")
    vocabulary = {piece: k for k, piece in enumerate(pieces)}
    mergeable = [k for k in range(len(pieces)) if normal[k]]
    # Best score first; of equal ones the first in the vocabulary.
    mergeable.sort(key=lambda k: (-scores[k], k))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in (pieces[k] for k in mergeable)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = library.Tokenizer(
        library.models.BPE(
            vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    normalize, decode = library.normalizers, library.decoders
    steps = [normalize.Prepend(space)] if prefix else []
    tokenizer.normalizer = normalize.Sequence([*steps, normalize.Replace(" ", space)])
    back = [decode.Replace(space, " "), decode.ByteFallback(), decode.Fuse()]
    tokenizer.decoder = decode.Sequence([*back, decode.Strip(" ", 1, 0)] if prefix else back)
    return tokenizer


def _mark(tokenizer: "Tokenizer", pieces: Sequence[str], *, special: bool) -> None:
    """Have pieces found whole in a text; special ones are left out when tokens are decoded."""
    library = require("tokenizers", "text")
    tokens = [library.AddedToken(piece, special=special, normalized=False) for piece in pieces]
    tokenizer.add_special_tokens(tokens) if special else tokenizer.add_tokens(tokens)


def _begin_with(tokenizer: "Tokenizer", piece: str) -> None:
    library = require("tokenizers", "text")
    # Between its pieces a template wants names without spaces and colons.
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=["<begin>", "$A"],
        pair=["<begin>", "$A", "<begin>", "$B"],
        special_tokens=[
            {"id": "<begin>", "ids": [tokenizer.token_to_id(piece)], "tokens": [piece]}
        ],
    )
