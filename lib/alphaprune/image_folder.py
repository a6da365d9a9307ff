"""A folder of one's own images, one subfolder a class, held in memory like CIFAR-10."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import ImageFolder

from alphaprune.data import VALIDATION_SEED, Dataset, Split
from alphaprune.errors import UsageError, shown

LARGEST_SIDE = 4096
LONGEST = 50  # sides of an image: the longer one by the shorter; scaling what is narrower takes gigabytes
# Of the images that torchvision's pretrained networks were trained on, in units of 0..1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def load_folder(folder: Path | str, size: int = 224, held_out: float = 0.2) -> tuple[Dataset, list[str]]:
    """Read `<folder>/<class>/<image>` into memory, a part of it as validation images.

    Each image is scaled so that its shorter side is `size`, and its middle is taken. Memory: 3 * size * size bytes an
    image, 150 kB at 224.

    Args:
        folder: holds one subfolder a class.
        size: side of the square images, in pixels.
        held_out: share of the images that are validation images, in (0, 1). Which ones is fixed.

    Returns:
        The data set, normalised as torchvision's pretrained networks expect, and the names of the classes.

    Raises:
        UsageError: if there are fewer than two classes or too few images, a file is no image, or the subfolders are
            train, val or test, with the classes inside.
    """
    if not isinstance(held_out, float) or not 0 < held_out < 1:
        raise UsageError(f"held_out is {shown(held_out)}; give a share in (0, 1), such as 0.2")
    if type(size) is not int or not 1 <= size <= LARGEST_SIDE:
        raise UsageError(
            f"size is {shown(size)}; give a whole number of pixels up to {LARGEST_SIDE}, such as 224"
        )
    if not isinstance(folder, Path | str) or "\0" in str(folder):
        raise UsageError(f"{shown(folder)} is not a folder; give its path as text")
    if not Path(folder).is_dir():
        raise UsageError(
            f"{folder} is not a folder; give one that holds a subfolder of images for each class"
        )
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as e:
        raise UsageError(
            f"{folder} holds no images in subfolders, one a class ({str(e).splitlines()[0][:160]})"
        ) from None
    if {name.lower() for name in found.classes} <= _SPLITS and all(
        any(inner.is_dir() for inner in Path(folder, name).iterdir()) for name in found.classes
    ):
        raise UsageError(
            f"{folder} holds {' and '.join(found.classes)}, which hold folders themselves; give the one of them whose subfolders are "
            f"the classes, such as {Path(folder, _training(found.classes))}: a part of it is held out for validation"
        )
    if len(found.classes) < 2:
        raise UsageError(f"{folder} holds the one class '{found.classes[0]}'; at least two are needed")
    images = torch.stack([_read(Path(path), size) for path, _ in found.samples])
    labels = torch.tensor(found.targets)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(VALIDATION_SEED))
    count = round(held_out * len(labels))
    if not 0 < count < len(labels):
        raise UsageError(f"{folder} holds {len(labels)} images, too few to hold {held_out:.0%} of them out")
    val, train = order[:count], order[count:]
    split = lambda i: Split(images[i], labels[i], IMAGENET_MEAN, IMAGENET_STD)  # noqa: E731
    return Dataset(train=split(train), val=split(val)), found.classes


_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def _training(names: list[str]) -> str:
    return next((name for name in names if name.lower().startswith("train")), names[0])


# What Pillow raises for damaged files, whatever the format; a few kilobytes can claim gigapixels.
_UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
)


def _read(path: Path, size: int) -> Tensor:
    """One image as (3, size, size) uint8."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except _UNREADABLE as e:
        raise UsageError(f"{path} cannot be read as an image ({e}); remove it or convert it") from None
    if max(picture.size) > LONGEST * min(picture.size):
        raise UsageError(
            f"{path} is {picture.width} x {picture.height} pixels, too narrow to take its middle; crop it"
        )
    scale = size / min(picture.size)
    width, height = (max(round(n * scale), size) for n in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.resize((width, height), Image.Resampling.BILINEAR).crop(
        (left, top, left + size, top + size)
    )
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def write_folder(split: Split, classes: list[str], folder: Path) -> None:
    """Write images as `<folder>/<class>/<number>.png`, an example of what `load_folder` reads."""
    for i, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
        path = folder / classes[label] / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
