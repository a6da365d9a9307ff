"""Where images lie, and which are the right ones: known without reading them, and without torch, which takes seconds to load."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from alphaprune.errors import UsageError

# Official batches and their MD5.
CIFAR10 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
# 480 training and 120 test images of CIFAR-10, the first 48 and 12 of each class, in this package.
SAMPLE = {
    "train.bin": "7b73ef68a9e9a4992206ed67984d6786",
    "test.bin": "7ac50cea04ac4bcb5ef50c079c161b1a",
}
# Of the training images of a source, those that are validation images. The 500 are the first of the 5,000. What is compared with published
# results, which are trained on all 50,000 images, is trained on nearly all.
HELD_OUT = {"cifar10": 5000, "cifar10-49500": 500, "sample": 80}


def cache_folder() -> Path:
    """Where downloads live: ALPHAPRUNE_DATA, else XDG_CACHE_HOME/alphaprune, else ~/.cache/alphaprune."""
    own = os.environ.get("ALPHAPRUNE_DATA")
    folder = own or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "alphaprune")
    try:
        return Path(folder).expanduser()
    except RuntimeError:  # ~name of nobody
        raise UsageError(f"{folder} names no folder; point ALPHAPRUNE_DATA to one") from None


def place(source: str) -> tuple[Path, dict[str, str]]:
    """The folder of a source, one of `HELD_OUT`, and the MD5 of its files by their names (raises UsageError)."""
    if source not in HELD_OUT:
        *others, last = (f"'{known}'" for known in HELD_OUT)
        raise UsageError(f"data source '{source}' is unknown; use {', '.join(others)} or {last}")
    if source == "sample":
        return Path(__file__).parent / "sample", SAMPLE
    return cache_folder() / "cifar-10-batches-bin", CIFAR10


def checksum(source: str) -> str:
    """SHA-256 over the MD5s of a source's files, and how it is split if not as others of the same files: names the data without reading them."""
    split = f"{HELD_OUT[source]} held out" if source == "cifar10-49500" else ""
    return hashlib.sha256("".join([*place(source)[1].values(), split]).encode()).hexdigest()
