"""Reading, splitting, encoding and batching of labelled texts."""

import itertools

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from pockjax.data import (
    Corpus,
    Encoded,
    encode,
    evaluation_batches,
    read_folders,
    split,
    training_batches,
)


def _write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def _numbered(count):
    numbers = np.arange(count, dtype=np.int32)
    return Encoded(numbers[:, None], np.ones((count, 1), bool), numbers)


def test_folders_are_classes(tmp_path):
    _write(tmp_path, {"tech/1.txt": "a\n\n b", "art/2.txt": "c", "art/1.txt": "d", "README": "x"})
    assert read_folders(tmp_path) == Corpus(("d", "c", "a b"), (0, 0, 1), ("art", "tech"))


def test_copies_are_kept_once(tmp_path):
    _write(tmp_path, {"a/1.txt": "same  text", "a/2.txt": "same\ntext", "b/1.txt": "other"})
    assert read_folders(tmp_path).texts == ("same text", "other")


def test_one_text_in_two_classes_is_an_error(tmp_path):
    _write(tmp_path, {"a/1.txt": "same", "b/7.txt": "same"})
    with pytest.raises(ValueError, match=r"7.txt is also in class 'a'"):
        read_folders(tmp_path)


def test_bytes_that_are_not_utf8_are_replaced(tmp_path):
    _write(tmp_path, {"a/1.txt": b"\xa35m", "b/1.txt": "x"})
    assert read_folders(tmp_path).texts[0] == "\N{REPLACEMENT CHARACTER}5m"


def test_a_corpus_needs_two_classes(tmp_path):
    _write(tmp_path, {"a/1.txt": "x"})
    with pytest.raises(FileNotFoundError, match="has 1 folders"):
        read_folders(tmp_path)


def test_bbc_news(bbc_news):
    corpus = read_folders(bbc_news)
    assert corpus.classes == ("business", "entertainment", "politics", "sports", "tech")
    assert len(corpus) == 2125  # 2,225 files, of which 100 are copies


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    held_out=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32),
)
def test_split_is_a_stratified_partition(labels, held_out, seed):
    texts = tuple(str(i) for i in range(len(labels)))
    corpus = Corpus(texts, tuple(labels), ("a", "b", "c", "d"))
    train, test = split(corpus, held_out=held_out, seed=seed)
    assert sorted(train.texts + test.texts) == sorted(texts)
    for part in (train, test):
        assert part.labels == tuple(labels[int(str(text))] for text in part.texts)
    for label in range(4):
        assert test.labels.count(label) == round(held_out * labels.count(label))
    assert split(corpus, held_out=held_out, seed=seed) == (train, test)


def test_seed_decides_the_split():
    corpus = Corpus(tuple(map(str, range(40))), (0, 1) * 20, ("a", "b"))
    parts = {split(corpus, held_out=0.5, seed=seed)[1].texts for seed in range(5)}
    assert len(parts) == 5


@pytest.mark.parametrize("held_out", [0, 1, -0.1, 20])
def test_held_out_is_a_fraction(held_out):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split(Corpus(("x",), (0,), ("a",)), held_out=held_out, seed=0)


def test_training_batches_go_through_all_texts_before_any_comes_again():
    batches = training_batches(_numbered(12), size=4, seed=0)
    passes = [np.concatenate([b.labels for b in itertools.islice(batches, 3)]) for _ in range(3)]
    for one in passes:
        assert sorted(one) == list(range(12))
    assert not np.array_equal(passes[0], passes[1])


def test_training_batches_are_all_of_one_size_and_repeatable():
    draws = [
        [
            b.labels.tolist()
            for b in itertools.islice(training_batches(_numbered(10), size=4, seed=s), 7)
        ]
        for s in (3, 3, 4)
    ]
    assert {len(labels) for labels in draws[0]} == {4}
    assert draws[0] == draws[1] != draws[2]


def test_batch_larger_than_the_data_is_an_error():
    with pytest.raises(ValueError, match="batch of 5 cannot be drawn from 4"):
        next(training_batches(_numbered(4), size=5, seed=0))


@given(count=st.integers(1, 30), size=st.integers(1, 40))
def test_evaluation_batches_count_each_text_once(count, size):
    seen = []
    for batch, counted in evaluation_batches(_numbered(count), size=size):
        assert len(batch) == size
        seen += batch.labels[:counted].tolist()
    assert seen == list(range(count))


def test_encode_cuts_and_pads(tmp_path):
    words = {"[PAD]": 0, "[UNK]": 1, "one": 2, "two": 3, "three": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    corpus = Corpus(("one two three two", "three nine"), (1, 0), ("a", "b"))
    encoded = encode(corpus, tmp_path / "tokenizer.json", length=3)
    assert encoded.tokens.tolist() == [[2, 3, 4], [4, 1, 0]]
    assert encoded.valid.tolist() == [[True, True, True], [True, True, False]]
    assert encoded.labels.tolist() == [1, 0]


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json"):
        encode(Corpus((), (), ()), tmp_path / "tokenizer.json", length=3)
