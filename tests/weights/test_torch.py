"""Files of torch's, written here byte by byte: what is read, and what is refused."""

import os
import pickle
import time
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from pockjax.weights import WeightsError, read_torch
from tests.weights.torch_files import Tensor, write_legacy, write_zip

_WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])


def _array(dtype, *shape):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@_WRITERS
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.int8, np.bool_]
)
def test_dtypes(tmp_path, write, dtype):
    expected = _array(dtype, 3, 4)
    found = read_torch(write(tmp_path / "w.pth", OrderedDict(w=Tensor.of(expected))))
    assert list(found) == ["w"] and found["w"].dtype == dtype
    np.testing.assert_array_equal(found["w"], expected)


@_WRITERS
def test_views_of_one_storage(tmp_path, write):
    storage = _array(np.float32, 24)
    tree = {
        "transposed": Tensor(storage, (4, 6), (1, 4)),
        "tail": Tensor(storage, (5,), (1,), offset=19),
        "scalar": Tensor(storage, (), (), offset=7),
        "empty": Tensor(storage, (0, 3), (3, 1)),
        "same": Tensor(storage, (2, 2), (0, 1)),
    }
    found = read_torch(write(tmp_path / "w.pth", tree))
    np.testing.assert_array_equal(found["transposed"], storage.reshape(6, 4).T)
    np.testing.assert_array_equal(found["tail"], storage[19:])
    assert found["scalar"].shape == () and found["scalar"] == 7
    assert found["empty"].shape == (0, 3)
    np.testing.assert_array_equal(found["same"], [[0, 1], [0, 1]])


@_WRITERS
def test_checkpoints_hold_more_than_tensors(tmp_path, write):
    tree = {
        "state_dict": {"w": Tensor.of(_array(np.float32, 2))},
        "best": 91.5,
        "names": ["a", None],
    }
    found = read_torch(write(tmp_path / "w.pth", tree))
    assert found["best"] == 91.5 and found["names"] == ["a", None]
    np.testing.assert_array_equal(found["state_dict"]["w"], [0, 1])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["i1", "i4", "f4", "f8"])
def test_arrays_of_numpy_inside_the_pickle(tmp_path, kind, order):
    expected = _array(np.dtype(kind).newbyteorder(order), 2, 3)
    fortran = np.asfortranarray(expected)
    found = read_torch(
        write_zip(tmp_path / "w.pkl", {"c": expected, "f": fortran, "s": expected[1, 2]})
    )
    np.testing.assert_array_equal(found["c"], expected)
    np.testing.assert_array_equal(found["f"], expected)
    assert found["s"] == expected[1, 2]


class _Runs:
    """What an attacker would pickle."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@_WRITERS
@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (_Runs(os.system, "touch {marker}"), r"\w+\.system"),
        (_Runs(eval, "open({marker!r}, 'w')"), r"\w+\.eval"),
        (_Runs(getattr, "", "join"), r"\w+\.getattr"),
        (_Runs(np.load, "{marker}"), r"numpy\S*\.load"),
    ],
)
def test_code_is_refused_and_named(tmp_path, write, payload, name):
    marker = tmp_path / "marker"
    call = [a.format(marker=str(marker)) if isinstance(a, str) else a for a in payload.call]
    file = write(tmp_path / "w.pth", {"w": Tensor.of(_array(np.float32, 2)), "x": _Runs(*call)})
    with pytest.raises(WeightsError, match=rf"w\.pth: refused: it names the global {name}"):
        read_torch(file)
    assert not marker.exists()


def test_objects_in_arrays_are_refused(tmp_path):
    file = write_zip(tmp_path / "w.pkl", np.array([{}, None], object))
    with pytest.raises(WeightsError, match="dtype 'O8'"):
        read_torch(file)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Tensor(np.zeros(6, np.float32), (7,), (1,)), "reaches beyond its storage"),
        (Tensor(np.zeros(6, np.float32), (2,), (1,), offset=5), "reaches beyond its storage"),
        (Tensor(np.zeros(6, np.float32), (2,), (1,), offset=-1), "reaches beyond its storage"),
        (Tensor(np.zeros(6, np.float32), (3,), (-1,), offset=5), "strides"),
        (Tensor(np.zeros(6, np.float32), (3,), (1, 1)), "strides"),
    ],
)
@_WRITERS
def test_tensors_stay_inside_their_storage(tmp_path, write, tensor, message):
    with pytest.raises(WeightsError, match=message):
        read_torch(write(tmp_path / "w.pth", tensor))


@_WRITERS
def test_files_that_are_cut_short(tmp_path, write):
    file = write(tmp_path / "w.pth", {"w": Tensor.of(_array(np.float32, 50))})
    whole = file.read_bytes()
    for size in {0, 1, 10, 100, len(whole) // 2, len(whole) - 60, len(whole) - 1}:
        file.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=r"w\.pth"):
            read_torch(file)


def test_a_storage_that_is_missing_or_short(tmp_path):
    file = write_zip(tmp_path / "w.pth", {"w": Tensor.of(_array(np.float32, 50))})
    with zipfile.ZipFile(file) as archive:
        pickled = archive.read("archive/data.pkl")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(WeightsError, match="archive/data/0"):
        read_torch(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", b"\0" * 100)
    with pytest.raises(WeightsError, match="storage 0 has 100 bytes of 200"):
        read_torch(file)


@pytest.mark.parametrize("content", [b"not a pickle at all", pickle.dumps([1, 2])])
def test_other_files(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.pth"):
        read_torch(tmp_path / "w.pth")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "name", [b"numpy\ndtype", b"numpy\nndarray", b"_codecs\nencode", b"torch\nFloatStorage"]
)
def test_stand_ins_cannot_be_changed(tmp_path, name):
    # GLOBAL, then BUILD with a state that is to be set as attributes.
    pickled = b"c" + name + b"\n(N}X\x08\x00\x00\x00__code__K\x01stb."
    with zipfile.ZipFile(tmp_path / "w.pkl", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(WeightsError, match="damaged"):
        read_torch(tmp_path / "w.pkl")


def _legacy(pickled: bytes) -> bytes:
    return b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, _MACHINE)) + pickled


_MACHINE = {"little_endian": True}


@pytest.mark.parametrize(
    "pickled",
    [
        # Each list holds the one before it twice: walked as a tree, there are 2^60 of them.
        b"]q\x00" + b"".join(bytes([0x28, 0x68, i, 0x68, i, 0x6C, 0x71, i + 1]) for i in range(60)),
        b"]r\xff\xff\xff\x7f",  # the last of two thousand million remembered objects
        b"]q\x00h\x00a",  # a list that holds itself
        b"(" * 5000 + b"t" * 5000,
        b"\x8e" + (2**45).to_bytes(8, "little"),
    ],
    ids=["sharing", "memo", "cycle", "depth", "length"],
)
def test_small_files_ask_for_little(tmp_path, pickled):
    file = tmp_path / "w.pth"
    file.write_bytes(_legacy(pickled + b".") + pickle.dumps([], 2))
    begun = time.monotonic()
    try:
        read_torch(file)
    except WeightsError as error:
        assert "w.pth" in str(error)
    assert time.monotonic() - begun < 10


@_WRITERS
def test_repeated_numbers_are_refused(tmp_path, write):
    file = tmp_path / "w.pth"
    write(file, {"a": Tensor(np.zeros(4, np.float32), (500_000_000,), (0,))})
    with pytest.raises(WeightsError, match="is larger than its storage"):
        read_torch(file)
