"""llama2.c files: what comes out, and what is refused."""

import struct

import numpy as np
import pytest

from pockjax.weights import WeightsError, read_llama2c


def test_published_file(shared_data):
    file = read_llama2c(shared_data / "weights" / "stories260k" / "stories260K.bin")
    assert (file.width, file.layers, file.heads, file.kv_heads) == (64, 5, 8, 4)
    weights = {name for name in file.tensors if not name.startswith("freq")}
    assert file.tied and sum(file.tensors[name].size for name in weights) == 260_032
    # The tables hold the rotation that the model computes.
    angles = np.outer(np.arange(512), 10_000.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(file.tensors["freq_cis_real"], np.cos(angles), atol=1e-4)


def header(**changes: int) -> bytes:
    given = {"width": 8, "ffn": 12, "layers": 2, "heads": 4, "kv": 2, "vocabulary": 9, "length": 5}
    return struct.pack("<7i", *(given | changes).values())


def numbers(vocabulary: int) -> int:
    layer = 2 * 8 + 2 * 8 * 8 + 2 * 4 * 8 + 3 * 12 * 8
    return abs(vocabulary) * 8 * (1 if vocabulary > 0 else 2) + 2 * layer + 8 + 2 * 5


@pytest.mark.parametrize("vocabulary", [9, -9])
def test_head_of_its_own_is_marked_by_the_sign(tmp_path, vocabulary):
    path = tmp_path / "a.bin"
    path.write_bytes(header(vocabulary=vocabulary) + bytes(4 * numbers(vocabulary)))
    file = read_llama2c(path)
    assert file.vocabulary == 9 and file.tied == (vocabulary > 0)
    assert ("wcls" in file.tensors) == (vocabulary < 0)
    assert file.tensors["wk"].shape == (2, 4, 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short"),
        (
            header() + bytes(4 * numbers(9) - 1),
            f"takes {28 + 4 * numbers(9)} bytes, not {27 + 4 * numbers(9)}",
        ),
        (header() + bytes(4 * numbers(9) + 1), "cut short or not"),
        (header(heads=3), "its header reads"),
        (header(layers=-1), "its header reads"),
        (b"GGUF" + bytes(60), "its header reads"),
        (b"24ka" + bytes(252), "newer"),
    ],
)
def test_other_files_are_refused(tmp_path, data, message):
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=rf"a\.bin.*{message}"):
        read_llama2c(path)
