"""What a network's images have to go through before it: resize, crop, normalise."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8

from pockjax._extras import require

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImagePreprocess:
    """Turns an image into an array that a network takes.

    The shorter side is brought to `resize` pixels, the square of `crop` pixels in the middle is
    cut out, and values in [0, 1] become (value - mean) / std.

    Attributes:
        resize: Of the shorter side, in pixels.
        crop: Height and width of the result, in pixels.
        mean: Of each colour.
        std: Of each colour.
        interpolation: "bilinear" or "bicubic".

    Example:
        >>> preprocess = ImagePreprocess(4, 2, mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> preprocess(np.full((4, 6, 3), 255, np.uint8))[0, 0]
        array([1., 1., 1.], dtype=float32)
    """

    resize: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __call__(self, image: Any) -> Float[np.ndarray, "crop crop 3"]:
        """Prepare one image.

        Args:
            image: A file's path, a `PIL.Image.Image`, or an array of uint8 of shape
                (height, width, 3).

        Raises:
            MissingExtraError: `pip install 'pockjax[image]'` is needed.
            FileNotFoundError: There is no such file.
            ValueError: The array is no image.
        """
        return self.normalise(self.pixels(image))

    def pixels(self, image: Any) -> UInt8[np.ndarray, "crop crop 3"]:
        """The same without the normalisation; takes a quarter of the memory to keep."""
        pillow = require("PIL.Image", "image")
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(
                    f"an image is uint8 of shape (height, width, 3), not {image.dtype} of shape "
                    f"{image.shape}"
                )
            opened = pillow.fromarray(image)
        elif isinstance(image, str | os.PathLike):
            with pillow.open(image) as file:
                opened = file.convert("RGB")
        else:
            opened = image.convert("RGB")
        width, height = opened.size
        if min(width, height) != self.resize:
            # The longer side is cut, not rounded, as torchvision does.
            longer = int(self.resize * max(width, height) / min(width, height))
            size = (self.resize, longer) if width <= height else (longer, self.resize)
            filters = {"bilinear": pillow.BILINEAR, "bicubic": pillow.BICUBIC}
            opened = opened.resize(size, filters[self.interpolation])
            width, height = opened.size
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        return np.asarray(opened.crop((left, top, left + self.crop, top + self.crop)))

    def normalise(
        self, pixels: UInt8[np.ndarray, "*batch height width 3"]
    ) -> Float[np.ndarray, "*batch height width 3"]:
        """From 0 to 255 to the values that the network was trained on."""
        mean = np.asarray(self.mean, np.float32)
        std = np.asarray(self.std, np.float32)
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std
