"""Tokenizers from every format, against the algorithms that they stand for."""

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pockjax.data import load_tokenizer
from tests.weights.gguf_files import write_gguf

TEXTS = (
    "Once upon a time, there was a little girl.",
    "  two  spaces,\ta tab\nand a line",
    "déjà vu in 1984 … 😀",
    "",
)


def merged_by_score(data: bytes, text: str) -> list[int]:
    """What llama2.c does: again and again merge the neighbours whose piece scores best."""
    pieces, at = [], 4
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        pieces.append((data[at + 8 : at + 8 + size], score))
        at += 8 + size
    number = {piece: k for k, (piece, _) in reversed(list(enumerate(pieces)))}
    ids = []
    for character in f" {text}" if text else "":
        encoded = character.encode()
        ids += [number[encoded]] if encoded in number else [byte + 3 for byte in encoded]
    while True:
        best = max(
            (
                (pieces[number[both]][1], -k)
                for k in range(len(ids) - 1)
                if (both := pieces[ids[k]][0] + pieces[ids[k + 1]][0]) in number
            ),
            default=None,
        )
        if best is None:
            return [1, *ids]
        k = -best[1]
        ids[k : k + 2] = [number[pieces[ids[k]][0] + pieces[ids[k + 1]][0]]]


@pytest.fixture(scope="module")
def tok512(shared_data) -> Path:
    return shared_data / "weights" / "stories260k" / "tok512.bin"


@given(
    text=st.text(st.sampled_from("the cat sat on and was to Lily .,'\n\"éß\u2003😀"), max_size=40)
)
def test_scores_decide_what_merges(tok512, text):
    tokenizer = load_tokenizer(tok512)
    ids = tokenizer.encode(text).ids
    assert ids == merged_by_score(tok512.read_bytes(), text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_llama2c_vocabulary_there_and_back(tok512, text):
    tokenizer = load_tokenizer(tok512)
    assert tokenizer.get_vocab_size() == 512
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_gguf_vocabulary_there_and_back(smollm2, text):
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.get_vocab_size() == 49_152
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_gguf_vocabulary_cuts_as_its_model_was_trained(smollm2):
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.encode("The capital of Italy is").ids == [504, 3575, 282, 7158, 314]
    # Every digit is a token of its own, and a special token is found whole.
    assert tokenizer.encode(" 1984<|im_end|>").tokens == ["Ġ", "1", "9", "8", "4", "<|im_end|>"]
    assert tokenizer.decode([504, 2]) == "The"


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def scored_gguf(folder: Path, **changes) -> Path:
    pieces = ["<unk>", "<s>", "</s>", *BYTES, "▁", "a", "b", "ab", "▁a", "▁ab"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
        "tokenizer.ggml.bos_token_id": 1,
    }
    return write_gguf(folder / "a.gguf", {}, metadata | changes)


def test_gguf_vocabulary_with_scores(tmp_path):
    tokenizer = load_tokenizer(scored_gguf(tmp_path))
    encoding = tokenizer.encode("ab aé")
    assert encoding.tokens == ["<s>", "▁ab", "▁a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoding.ids) == "ab aé"
    assert tokenizer.encode("b</s>").tokens == ["<s>", "▁", "b", "</s>"]


def test_gguf_says_whether_texts_begin_with_a_token_and_a_space(tmp_path):
    changes = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}
    assert load_tokenizer(scored_gguf(tmp_path, **changes)).encode("ab").tokens == ["ab"]


def test_kinds_that_are_not_read_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.gguf.*'bert'"):
        load_tokenizer(scored_gguf(tmp_path, **{"tokenizer.ggml.model": "bert"}))
    changes = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b"]}
    with pytest.raises(ValueError, match=r"a\.gguf.*'chatglm-bpe'"):
        load_tokenizer(scored_gguf(tmp_path, **changes, **{"tokenizer.ggml.pre": "chatglm-bpe"}))


def test_damaged_llama2c_vocabulary_is_refused(tok512, tmp_path):
    data = tok512.read_bytes()
    for cut, message in ((1, "cut short"), (6, "cut short"), (len(data) - 44, "only 3 pieces")):
        path = tmp_path / "tok.bin"
        path.write_bytes(data[:-cut])
        with pytest.raises(ValueError, match=rf"tok\.bin.*{message}"):
            load_tokenizer(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": "none"}))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "tok.bin")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json"):
        load_tokenizer(tmp_path)
