"""A folder of images: what is read, and what is said when it cannot be."""

import shutil

import pytest
import torch
from PIL import Image

from alphaprune import UsageError
from alphaprune import data as cifar
from alphaprune.image_folder import load_folder, write_folder


@pytest.fixture
def folder(tmp_path):
    write_folder(cifar.load("sample").train.first(200), cifar.CLASSES, tmp_path / "images")
    return tmp_path / "images"


def test_what_is_written_is_read(folder):
    source = cifar.load("sample").train.first(200)
    data, classes = load_folder(folder, size=32, held_out=0.2)
    assert (len(data.train), len(data.val)) == (160, 40) and classes == sorted(classes)
    pictures = {
        im.numpy().tobytes(): cifar.CLASSES[c] for im, c in zip(source.images, source.labels, strict=True)
    }
    for split in (data.train, data.val):
        for image, label in zip(split.images, split.labels.tolist(), strict=True):
            assert pictures[image.numpy().tobytes()] == classes[label]
    again, _ = load_folder(folder, size=32, held_out=0.2)
    assert torch.equal(data.val.images, again.val.images)
    images, _ = next(cifar.batches(data.val, 6))
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    torch.testing.assert_close(images[0] * std + mean, data.val.images[0] / 255, rtol=1e-4, atol=1e-5)


def test_other_shapes_are_scaled_and_cut(folder):
    Image.new("L", (90, 50), 200).save(folder / "cat" / "wide.png")
    data, _ = load_folder(folder, size=40)
    assert data.train.images.shape[1:] == (3, 40, 40)
    grey = [im for s in (data.train, data.val) for im in s.images if (im == 200).all()]
    assert len(grey) == 1


def test_parts_are_not_taken_for_classes(folder, tmp_path):
    whole = tmp_path / "parts"
    shutil.copytree(folder, whole / "train")
    shutil.copytree(folder, whole / "val")
    with pytest.raises(UsageError, match=r"parts holds train and val, .* such as \S*parts/train: a part"):
        load_folder(whole, 32)
    assert load_folder(whole / "train", 32)[1] == load_folder(folder, 32)[1]
    # Classes may have such names, and folders inside, but not both.
    direct, inside = tmp_path / "direct", tmp_path / "inside"
    for name, of in (("train", "cat"), ("test", "dog")):
        shutil.copytree(folder / of, direct / name)
        shutil.copytree(folder / of, inside / of / "2026")
    assert load_folder(direct, 32)[1] == ["test", "train"]
    assert load_folder(inside, 32)[1] == ["cat", "dog"]


def test_bad_folders_are_named(folder, tmp_path):
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        load_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty holds no images in subfolders"):
        load_folder(tmp_path / "empty")
    (folder / "cat" / "broken.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"broken\.png cannot be read as an image"):
        load_folder(folder, 32)
    one = tmp_path / "one"
    (folder / "dog").rename(one.parent / "dog")
    one.mkdir()
    (one.parent / "dog").rename(one / "dog")
    with pytest.raises(UsageError, match="holds the one class 'dog'"):
        load_folder(one, 32)
    with pytest.raises(UsageError, match="held_out is 1"):
        load_folder(folder, 32, held_out=1)
