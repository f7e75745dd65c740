"""Images become arrays."""

import functools

import numpy as np
import pytest
from PIL import Image

from pockjax import models
from pockjax.models import ImagePreprocess

_plain = functools.partial(ImagePreprocess, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _image(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 13), (13, 8)])
def test_the_middle_is_cut_out(height, width):
    image = _image(height, width)
    found = _plain(8, 4).pixels(image)
    top, left = round((height - 4) / 2), round((width - 4) / 2)
    np.testing.assert_array_equal(found, image[top : top + 4, left : left + 4])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (5, 9)])
def test_resize_is_pillows(height, width, interpolation):
    image = _image(height, width)
    found = _plain(16, 16, interpolation=interpolation).pixels(image)
    longer = int(16 * max(height, width) / min(height, width))
    size = (longer, 16) if width > height else (16, longer)
    resized = Image.fromarray(image).resize(size, getattr(Image, interpolation.upper()))
    start = round((longer - 16) / 2)
    expected = np.asarray(resized)
    expected = expected[:, start:][:, :16] if width > height else expected[start:][:16]
    np.testing.assert_array_equal(found, expected)


def test_files_images_and_arrays_are_alike(tmp_path):
    image = _image(20, 30)
    Image.fromarray(image).save(tmp_path / "a.png")
    preprocess = ImagePreprocess(12, 10, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = preprocess(image)
    assert expected.shape == (10, 10, 3) and expected.dtype == np.float32
    np.testing.assert_array_equal(preprocess(tmp_path / "a.png"), expected)
    np.testing.assert_array_equal(preprocess(Image.open(tmp_path / "a.png")), expected)


def test_other_colours_become_three(tmp_path):
    grey = Image.fromarray(_image(8, 8)[..., 0])
    found = _plain(8, 8).pixels(grey)
    assert found.shape == (8, 8, 3) and (found[..., 0] == found[..., 2]).all()


@pytest.mark.parametrize("wrong", [np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8)])
def test_arrays_that_are_no_images(wrong):
    with pytest.raises(ValueError, match="an image is uint8 of shape"):
        _plain(8, 8)(wrong)


@pytest.mark.parametrize(
    ("name", "black", "white"),
    [
        ("efficientnet_lite0", -127 / 128, 1.0),
        ("mcunet-5fps", -128 / 127.5, 127 / 127.5),
        ("mobilenet_v2", -0.485 / 0.229, 0.515 / 0.229),
    ],
)
def test_values_are_what_the_weights_were_trained_on(name, black, white):
    preprocess = models.entry(name).preprocess
    assert preprocess is not None
    pixels = np.array([[[0] * 3], [[255] * 3]], np.uint8)
    np.testing.assert_allclose(preprocess.normalise(pixels)[:, 0, 0], [black, white], rtol=1e-6)
