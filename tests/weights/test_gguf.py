"""GGUF files: blocks as the gguf package dequantises them, and files that are no good."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from pockjax.weights import WeightsError, read_gguf
from tests.weights.gguf_files import Q5_K, Packed, write_gguf

ORACLE = np.load(Path(__file__).parents[1] / "models" / "data" / "llama.npz")
KINDS = {"F32": 0, "F16": 1, "BF16": 30, "Q8_0": 8, "Q4_0": 2, "Q4_1": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_dequantised_as_by_the_gguf_package(tmp_path, kind):
    packed = Packed(KINDS[kind], (2, 64), ORACLE[f"{kind}_packed"].tobytes())
    file = read_gguf(write_gguf(tmp_path / "a.gguf", {"first": packed, "second": packed}))
    assert file.tensors.format("first") == kind
    for name in ("first", "second"):
        value = file.tensors[name]
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, ORACLE[f"{kind}_numbers"])


def test_published_file_is_dequantised_as_by_the_gguf_package(smollm2):
    file = read_gguf(next(smollm2.glob("*.gguf")))
    assert len(file.tensors) == 272
    assert file.metadata["general.name"].startswith("Smollm2 135M")
    formats = set()
    for name, expected in zip(ORACLE["smollm2_names"], ORACLE["smollm2_sha256"], strict=True):
        formats.add(file.tensors.format(name))
        value = np.ascontiguousarray(file.tensors[name], "<f4")
        assert hashlib.sha256(value).hexdigest() == expected
    assert formats == {"Q4_1", "Q8_0"}


def test_metadata_and_tensors_come_back(tmp_path):
    metadata = {
        "text": "naïve",
        "number": -3,
        "fraction": 0.5,
        "flag": True,
        "texts": ["a", "b c"],
        "numbers": [1, 2, 3],
    }
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = write_gguf(tmp_path / "a.gguf", {"x": Packed.float32(value)}, metadata, version=2)
    file = read_gguf(path)
    assert file.metadata == metadata
    assert list(file.tensors) == ["x"] and file.tensors.shape("x") == (2, 3)
    np.testing.assert_array_equal(file.tensors["x"], value)


@pytest.fixture
def small(tmp_path) -> Path:
    value = np.ones((4, 8), np.float32)
    return write_gguf(tmp_path / "a.gguf", {"x": Packed.float32(value)}, {"texts": ["a", "b"]})


def test_every_cut_is_noticed(small):
    data = small.read_bytes()
    for size in range(4, len(data)):
        small.write_bytes(data[:size])
        with pytest.raises(WeightsError, match=rf"{re.escape(str(small))} is cut short"):
            read_gguf(small)


def test_cut_tensor_is_named_with_its_shape(small):
    small.write_bytes(small.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"tensor 'x' of shape \(4, 8\), F32, ends at byte"):
        read_gguf(small)


@pytest.mark.parametrize("data", [b"", b"GG", b"GGML" + bytes(40)])
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"a.gguf is not a GGUF file"):
        read_gguf(path)


def test_other_versions_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="GGUF version 1"):
        read_gguf(write_gguf(tmp_path / "a.gguf", {}, version=1))


@pytest.mark.parametrize(("kind", "name"), [(Q5_K, "Q5_K"), (99, "99")])
def test_type_that_is_not_read_is_named(tmp_path, kind, name):
    path = write_gguf(tmp_path / "a.gguf", {"x": Packed(kind, (2, 256), bytes(352))})
    with pytest.raises(WeightsError, match=rf"'x' of shape \(2, 256\) is of type {name}"):
        read_gguf(path)


def test_shape_that_blocks_do_not_fill_is_named(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"x": Packed(KINDS["Q8_0"], (2, 48), bytes(102))})
    with pytest.raises(WeightsError, match=r"'x' of shape \(2, 48\) cannot be of type Q8_0"):
        read_gguf(path)


def test_impossible_alignment(tmp_path):
    with pytest.raises(WeightsError, match="aligned to 0 bytes"):
        read_gguf(write_gguf(tmp_path / "a.gguf", {}, {"general.alignment": 0}))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "a.gguf")
