"""Texts to continue: windows over plain text, and instructions of which the answers count."""

import json

import numpy as np
import pytest
import tokenizers

from pockjax.data import (
    Instruction,
    Loader,
    encode_instructions,
    evaluation_batches,
    read_instructions,
    read_texts,
    split,
    windows,
)

END = "<end>"


@pytest.fixture
def tokenizer(tmp_path):
    """Every character is a token, numbered by its place in the alphabet of bytes."""
    alphabet = [chr(code) for code in range(128)]
    words = {character: k for k, character in enumerate(alphabet)} | {END: 128}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.add_special_tokens([END])
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def text_of(tokens) -> str:
    return "".join(chr(token) if token < 128 else "#" for token in tokens)


def test_windows_predict_each_token_once(tokenizer):
    data = windows(["abcdefgh", "ijklm"], tokenizer, length=4)
    assert len(data) == 3  # 13 tokens: three times four, each with the one that follows
    tokens, targets, weights = data.batch(np.arange(3))
    assert [text_of(row) for row in tokens] == ["abcd", "efgh", "ijkl"]
    assert [text_of(row) for row in targets] == ["bcde", "fghi", "jklm"]
    assert weights.shape == (3, 4) and weights.dtype == np.float32 and weights.all()


def test_windows_may_overlap_and_texts_be_separated(tokenizer):
    data = windows(["abcd", "ef"], tokenizer, length=3, stride=2, separator=END)
    tokens, targets, _ = data.batch(np.arange(len(data)))
    assert [text_of(row) for row in tokens] == ["abc", "cd#", "#ef"]
    assert [text_of(row) for row in targets] == ["bcd", "d#e", "ef#"]


def test_windows_of_too_little_text(tokenizer):
    with pytest.raises(ValueError, match="3 tokens are too few for a sequence of 3"):
        windows(["abc"], tokenizer, length=3)
    with pytest.raises(ValueError, match="no token '</s>'"):
        windows(["abc"], tokenizer, length=1, separator="</s>")
    with pytest.raises(ValueError, match="at least 1"):
        windows(["abc"], tokenizer, length=1, stride=0)


def test_texts_are_read_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text {name}", encoding="utf-8-sig")
    assert read_texts(tmp_path) == ("text a.txt", "text b.txt", "text deep/c.txt")
    assert read_texts(tmp_path / "a.txt") == ("text a.txt",)
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(ValueError, match=r"b\.txt:3: not UTF-8"):
        read_texts(tmp_path)
    with pytest.raises(FileNotFoundError, match="none"):
        read_texts(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no \.txt"):
        read_texts(tmp_path / "empty")


SHORT = Instruction("Add.", "1 + 2", "3")
LONG = Instruction("Say much.", "", "word " * 30)


@pytest.mark.parametrize("one", [SHORT, LONG])
def test_only_the_answer_counts(tokenizer, one):
    data = encode_instructions([one], tokenizer, length=600, end=END)
    tokens, targets, weights = data.batch(np.array([0]))
    assert tokens.shape == targets.shape == weights.shape == (1, 600)
    assert text_of(targets[weights > 0]) == one.output + "#"
    assert text_of(tokens[0]).startswith(one.prompt + one.output + "#")


def test_prompt_has_an_input_only_if_there_is_one():
    assert "### Input:\n1 + 2\n\n### Response:\n" in SHORT.prompt
    assert "Input" not in LONG.prompt and LONG.prompt.endswith("Say much.\n\n### Response:\n")


def test_long_answers_are_cut_and_long_prompts_left_out(tokenizer):
    start = len(LONG.prompt)
    data = encode_instructions([SHORT, LONG], tokenizer, length=start + 5, end=END)
    assert len(data) == 1
    _, targets, weights = data.batch(np.array([0]))
    assert text_of(targets[weights > 0]) == "word w"
    with pytest.raises(ValueError, match="none of 1 answers begins within 20 tokens"):
        encode_instructions([LONG], tokenizer, length=20, end=END)


def test_buckets_give_short_sequences_short_batches(tokenizer):
    given = [SHORT, LONG] * 10
    buckets = (len(SHORT.prompt) + 3, 300)
    data = encode_instructions(given, tokenizer, length=400, end=END, buckets=buckets)
    shapes = {}
    for tokens, targets, weights in Loader(data, size=5):
        assert tokens.shape == targets.shape == weights.shape
        shapes[tokens.shape] = shapes.get(tokens.shape, 0) + 1
        assert weights.any(axis=1).all()
    assert shapes == {(5, buckets[0]): 2, (5, 300): 2} or len(shapes) == 1
    with pytest.raises(ValueError, match="from 1 to 400"):
        encode_instructions(given, tokenizer, length=400, end=END, buckets=(500,))


RECORDS = [
    {"instruction": "Add.", "input": "1 + 2", "output": "3"},
    {"instruction": "Say [hi],\n{now}.", "output": "hi"},
]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RECORDS),
        "\ufeff\n" + json.dumps(RECORDS, indent=2) + "\n",
        "\n".join(map(json.dumps, RECORDS)) + "\n\n",
    ],
)
def test_instructions_are_read_from_arrays_and_lines(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    assert read_instructions(path) == (
        Instruction("Add.", "1 + 2", "3"),
        Instruction("Say [hi],\n{now}.", "", "hi"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"instruction": "a", "output": "b"},\n{"instruction": "a"}]', ":3: .* 'output'"),
        ('[\n{"output": "b"}\n]', ":2: .* 'instruction'"),
        ('[\n{"instruction": "a", "input": 3, "output": "b"}\n]', ":2: .* 'input'"),
        ('[\n{"instruction": "a", "output": "b"}', ":2: the array does not end"),
        ('[\n{"instruction": "a",\n "output": b}]', ":3: not JSON"),
        ("[\n3]", ":2: a JSON object was expected, not 3"),
        ("[]", " has no instructions"),
        ("", " has no instructions"),
    ],
)
def test_bad_instructions_are_named_with_their_line(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json{message}"):
        read_instructions(path)


@pytest.mark.parametrize(
    ("name", "count"), [("alpaca_en_demo.json", 999), ("instruction-data.json", 1100)]
)
def test_published_instructions(shared_data, smollm2, name, count):
    found = read_instructions(shared_data / "text" / "instructions" / name)
    assert len(found) == count
    data = encode_instructions(found[:64], smollm2, length=256, end="<|im_end|>", buckets=(64, 128))
    assert {tokens.shape[1] for (tokens, *_), _ in evaluation_batches(data, size=8)} <= {
        64,
        128,
        256,
    }


def test_published_text(shared_data):
    texts = read_texts(shared_data / "text" / "shakespeare")
    tok512 = shared_data / "weights" / "stories260k" / "tok512.bin"
    data = windows([texts[0][:20_000]], tok512, length=64)
    train, test = split(data, held_out=0.1, seed=0)
    assert len(train) + len(test) == len(data) > 100
    tokens, targets, _ = next(iter(Loader(train, size=4)))
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("more", ['[{"instruction": "b", "output": "y"}]', "garbage"])
def test_what_follows_an_array_is_not_dropped(tmp_path, more):
    file = tmp_path / "records.json"
    file.write_text('[{"instruction": "a", "output": "x"}]\n' + more)
    with pytest.raises(ValueError, match=r"records\.json:2: more follows"):
        read_instructions(file)
