"""Image folders: what comes out, what augmentation changes, and files that are no good."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pockjax.data import Augmentation, Loader, read_images, split


@pytest.fixture
def folder(tmp_path):
    """Two classes, of images whose pixels tell where they are from."""
    for k, name in enumerate(("cat", "dog")):
        for index in range(6):
            below = tmp_path / name / ("deep" if index == 5 else ".")
            below.mkdir(parents=True, exist_ok=True)
            pixels = np.zeros((12, 8, 3), np.uint8)
            pixels[..., 0] = np.arange(12)[:, None]
            pixels[..., 1] = np.arange(8)
            pixels[..., 2] = 100 * k + index
            Image.fromarray(pixels).save(below / f"{index}.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def bytes_of(batch):
    return np.rint(batch.images * 255).astype(int)


def test_images_are_cut_centrally(folder):
    data = read_images(folder, size=4, resize=8)
    assert data.classes == ("cat", "dog") and data.labels == (0,) * 6 + (1,) * 6
    batch = data.batch(np.array([1, 7]))
    assert batch.images.shape == (2, 4, 4, 3) and batch.images.dtype == np.float32
    found = bytes_of(batch)
    assert found[0, :, 0, 0].tolist() == [4, 5, 6, 7] and found[0, 0, :, 1].tolist() == [2, 3, 4, 5]
    assert found[:, 0, 0, 2].tolist() == [1, 101] and batch.labels.tolist() == [0, 1]


def test_images_are_scaled_by_their_shorter_side(folder):
    batch = read_images(folder, size=16, resize=16).batch(np.array([0]))
    assert batch.images.shape == (1, 16, 16, 3)
    # Half of 24 rows are left: from a sixth to five sixths of the way.
    assert 1 <= bytes_of(batch)[0, 0, 0, 0] <= 3 and 8 <= bytes_of(batch)[0, -1, 0, 0] <= 10


def test_colours_are_normalised(folder):
    plain = read_images(folder, size=4).batch(np.array([3]))
    data = read_images(folder, size=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    expected = (plain.images - [0.1, 0.2, 0.3]) / [0.5, 0.25, 2.0]
    np.testing.assert_allclose(data.batch(np.array([3])).images, expected, rtol=1e-5, atol=1e-6)


def test_augmentation_is_repeatable_and_its_own_for_each_pass_and_image(folder):
    data = read_images(folder, size=8, augmentation=Augmentation(padding=2))
    indices = np.array([2, 4])
    one, same = data.batch(indices, (0, 0)).images, data.batch(indices, (0, 0)).images
    np.testing.assert_array_equal(one, same)
    # The company that an image is in changes nothing.
    np.testing.assert_array_equal(one[1:], data.batch(indices[1:], (0, 0)).images)
    passes = {data.batch(indices, (0, k)).images.tobytes() for k in range(8)}
    assert len(passes) > 4
    plain = replace(data, augmentation=None).batch(indices).images
    np.testing.assert_array_equal(data.batch(indices).images, plain)


def test_augmented_images_are_squares_of_the_padded_one(folder):
    data = read_images(folder, size=8, augmentation=Augmentation(padding=2))
    for k in range(20):
        found = bytes_of(data.batch(np.array([1]), (0, k)))[0]
        inside = found[..., 2] == 1
        rows, columns = found[..., 0][inside], found[..., 1][inside]
        assert inside.sum() >= 6 * 6
        width = len(set(columns.tolist()))
        assert len(set(rows.tolist())) * width == inside.sum()
        steps = np.diff(columns.reshape(-1, width), axis=1)
        assert abs(steps).max() == 1 and len(np.unique(steps)) == 1


def test_flip_is_an_option(folder):
    flips = {
        flip: {
            int(np.sign(bytes_of(data.batch(np.array([0]), (0, k)))[0, 0, :2, 1] @ [-1, 1]))
            for k in range(20)
        }
        for flip in (True, False)
        for data in [read_images(folder, size=4, augmentation=Augmentation(flip=flip))]
    }
    assert flips == {True: {-1, 1}, False: {1}}


def test_split_and_resume(folder):
    data = read_images(folder, size=4, augmentation=Augmentation(padding=1))
    train, test = split(data, held_out=1 / 3, seed=0)
    assert test.labels == (0, 0, 1, 1) and not set(train.files) & set(test.files)
    loader = Loader(train, size=3, seed=1)
    next(iter(loader))
    other = Loader(train, size=3, seed=1)
    other.load_state_dict(loader.state_dict())
    for one, same in zip(loader, other, strict=True):
        np.testing.assert_array_equal(one.images, same.images)


def test_classes_of_the_training_data_number_those_of_the_test_data(folder):
    assert read_images(folder, size=4, classes=("dog", "cat")).labels == (1,) * 6 + (0,) * 6
    with pytest.raises(FileNotFoundError, match="no images of bird"):
        read_images(folder, size=4, classes=("bird", "cat", "dog"))
    with pytest.raises(ValueError, match="has images of dog"):
        read_images(folder, size=4, classes=("cat",))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"text"])
def test_damaged_image_is_named(folder, damage):
    path = folder / "dog" / "2.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"dog/2\.png cannot be read as an image"):
        read_images(folder, size=4).batch(np.arange(12))


def test_folder_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folders with images"):
        read_images(tmp_path, size=4)


def test_square_larger_than_the_image(folder):
    with pytest.raises(ValueError, match="square of 9 pixels"):
        read_images(folder, size=9, resize=8)


@pytest.mark.parametrize(
    ("name", "train", "test"), [("cifar10", 10_000, 2000), ("clothing", 3068, 372)]
)
def test_published_data(shared_data, name, train, test):
    data = read_images(shared_data / "images" / name / "train", size=32)
    held_out = read_images(shared_data / "images" / name / "test", size=32, classes=data.classes)
    assert (len(data), len(held_out), len(data.classes)) == (train, test, 10)
    images, labels = next(iter(Loader(data, size=16)))
    assert images.shape == (16, 32, 32, 3) and 0 <= images.min() < images.max() <= 1
    assert len(set(labels.tolist())) > 3
