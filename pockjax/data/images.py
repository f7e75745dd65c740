"""Folders of labelled images: `folder/class/any.jpg`, decoded when a batch asks for them."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from pockjax._extras import require
from pockjax.data._loader import Draw

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class Images(NamedTuple):
    """A batch of images; unpack it into a step: `step(state, *batch)`.

    Attributes:
        images: Red, green and blue, normalised.
        labels: The index of each image's class.
    """

    images: Float[np.ndarray, "batch size size 3"]
    labels: Int[np.ndarray, " batch"]


@dataclass(frozen=True)
class Augmentation:
    """What training changes in an image at random, differently in each pass.

    Attributes:
        padding: Black pixels put around an image before a square is cut out of it at a random
            place; 4 is usual for images of 32 pixels. 0 cuts inside the image alone.
        flip: Whether half of the images are mirrored left to right.
    """

    padding: int = 0
    flip: bool = True


@dataclass(frozen=True)
class ImageFolder:
    """Labelled image files, and how they become arrays. Made by `read_images`.

    Attributes:
        files: The images.
        labels: For each, the index of its class in `classes`.
        classes: The classes' names.
        size: Pixels of a batch's images in each direction.
        resize: Pixels of the shorter side, before a square of `size` is cut out of the image.
        augmentation: What is random while training; None for nothing.
        mean: Of each colour, subtracted after it was brought to 0…1.
        std: Of each colour; divides what is left.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    size: int
    resize: int
    augmentation: Augmentation | None = None
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    @property
    def widths(self) -> Int[np.ndarray, " examples"]:
        """All alike: `size`."""
        return np.full(len(self), self.size)

    def take(self, indices: Any) -> "ImageFolder":
        """The images at these places, in this order, with the same classes."""
        files, labels = self.files, self.labels
        return replace(
            self,
            files=tuple(files[i] for i in indices),
            labels=tuple(labels[i] for i in indices),
        )

    def batch(self, indices: Int[np.ndarray, " taken"], draw: Draw | None = None) -> Images:
        """Decode the images at these places; those of a `draw` are augmented, others cut centrally.

        Raises:
            ValueError: A file is no image, or is cut short.
        """
        cut = []
        for index in indices.tolist():
            image = _decode(self.files[index], self.resize)
            if draw is None or self.augmentation is None:
                cut.append(_cut(image, self.size, 0.5, 0.5))
            else:
                # Seeded by the image, so that what happens to it does not hang on its batch.
                cut.append(_augment(image, self.size, self.augmentation, (*draw, index)))
        colours = np.stack(cut).astype(np.float32) / 255
        images = (colours - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return Images(images, np.array([self.labels[i] for i in indices], np.int32))


def read_images(
    folder: str | os.PathLike[str],
    *,
    size: int,
    resize: int | None = None,
    classes: tuple[str, ...] | None = None,
    augmentation: Augmentation | None = None,
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
    std: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> ImageFolder:
    """Read a data set that has a folder of images for each class.

    Args:
        folder: Holds the classes' folders; images may lie deeper in them.
        size: Pixels of a batch's images in each direction.
        resize: Scale images so that this is their shorter side, before a square is cut out; `size`
            by default.
        classes: The classes, in the order of their labels; by default every folder with images, in
            alphabetical order. Give the training data's classes to read its test data.
        augmentation: What to change at random while training.
        mean: Of each colour, subtracted after it was brought to 0…1.
        std: Of each colour; divides what is left.

    Raises:
        MissingExtraError: `pip install 'pockjax[image]'` is needed.
        FileNotFoundError: There are no images, or none of a class.
        ValueError: A folder is none of the given classes, or the sizes make no sense.
    """
    require("PIL.Image", "image")
    root = Path(folder)
    resize = size if resize is None else resize
    if not 1 <= size <= resize:
        raise ValueError(f"a square of {size} pixels cannot be cut out of a side of {resize}")
    found = [
        (path.relative_to(root).parts[0], path)
        for path in sorted(root.glob("*/**/*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    names = {name for name, _ in found}
    if not names:
        if not root.is_dir():
            raise FileNotFoundError(
                f"there is no folder {root}; give one with a folder of images for each class"
            )
        raise FileNotFoundError(f"{root} has no folders with images ({', '.join(_SUFFIXES)})")
    if classes is None:
        classes = tuple(sorted(names))
    elif empty := [name for name in classes if name not in names]:
        raise FileNotFoundError(f"{root} has no images of {', '.join(empty)}")
    elif other := sorted(names.difference(classes)):
        raise ValueError(f"{root} has images of {', '.join(other)}; the classes are {classes}")
    label = {name: k for k, name in enumerate(classes)}
    return ImageFolder(
        files=tuple(path for _, path in found),
        labels=tuple(label[name] for name, _ in found),
        classes=classes,
        size=size,
        resize=resize,
        augmentation=augmentation,
        mean=mean,
        std=std,
    )


def _decode(path: Path, shorter: int) -> UInt8[np.ndarray, "height width 3"]:
    library = require("PIL.Image", "image")
    try:
        with library.open(path) as image:
            image = image.convert("RGB")
            scale = shorter / min(image.size)
            if scale != 1:
                size = [max(shorter, round(side * scale)) for side in image.size]
                image = image.resize(size, library.Resampling.BICUBIC)
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for bad files
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _cut(
    image: UInt8[np.ndarray, "height width 3"], size: int, down: float, right: float
) -> UInt8[np.ndarray, "size size 3"]:
    """The square at fractions of the way from the top and from the left."""
    height, width, _ = image.shape
    top, left = round((height - size) * down), round((width - size) * right)
    return image[top : top + size, left : left + size]


def _augment(
    image: UInt8[np.ndarray, "height width 3"], size: int, how: Augmentation, draw: Draw
) -> UInt8[np.ndarray, "size size 3"]:
    generator = np.random.default_rng(draw)
    down, right, mirror = generator.random(3)
    around = (how.padding, how.padding)
    square = _cut(np.pad(image, (around, around, (0, 0))), size, down, right)
    return square[:, ::-1] if how.flip and mirror < 0.5 else square
