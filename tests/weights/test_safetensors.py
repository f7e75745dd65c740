"""The reader of safetensors against the format's own library."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from pockjax.weights import WeightsError, read_safetensors


def _tensors():
    generator = np.random.default_rng(0)
    kinds = [np.float64, np.float32, np.float16, np.int64, np.int32, np.int8, np.uint8]
    tensors = {np.dtype(kind).name: generator.normal(0, 9, (3, 4)).astype(kind) for kind in kinds}
    return tensors | {"empty": np.zeros((0, 2), np.float32), "scalar": np.array(3.5, np.float32)}


def test_what_the_library_writes(tmp_path):
    tensors = _tensors()
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "np"})
    found = read_safetensors(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)


def test_bfloat16(tmp_path):
    header = b'{"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    values = np.array([1.5, -2], ml_dtypes.bfloat16)
    content = len(header).to_bytes(8, "little") + header + values.tobytes()
    (tmp_path / "w.safetensors").write_bytes(content)
    found = read_safetensors(tmp_path / "w.safetensors")["w"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, values)


def test_files_that_are_cut_short(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(_tensors(), file)
    whole = file.read_bytes()
    for size in (0, 7, 20, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match="cut short"):
            read_safetensors(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json at all", "not JSON"),
        (b'{"w":{"dtype":"F4","shape":[2],"data_offsets":[0,8]}}', "dtype F4"),
        (b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', r"8 bytes, not those of \[3\]"),
        (b'{"w":{"dtype":"F32"}}', "damaged"),
        (b"[1]", "damaged"),
    ],
)
def test_headers_that_are_wrong(tmp_path, header, message):
    file = tmp_path / "w.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(WeightsError, match=message):
        read_safetensors(file)
