"""benchmarks/classifier: images from torchvision's files and from folders, and batches of them."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from classifier import data
from classifier.batches import Batches
from classifier.images import Images
from classifier.options import Options, UserError, parse
from PIL import Image
from torch.nn import functional as F


def test_digits_are_scikit_learns():
    found = data.load(parse([]))
    assert (len(found.train), len(found.test), found.classes) == (1347, 450, 10)
    assert found.train.images.shape == (1347, 1, 8, 8)
    assert found.train.images.max() == 255
    assert data.load(parse(["--image-size", "16"])).train.images.shape[-1] == 16


@pytest.mark.parametrize("name", ["mnist", "fashionmnist"])
def test_mnist_files(name, tmp_path):
    folder = tmp_path / {"mnist": "MNIST", "fashionmnist": "FashionMNIST"}[name] / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        images = os.urandom(count * 28 * 28)
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images)
        labels = bytes(i % 10 for i in range(count))
        head = struct.pack(">II", 2049, count)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + labels)
    found = data.load(parse(["--data", name, "--data-dir", str(tmp_path), "--batch-size", "4"]))
    assert found.train.images.shape == (20, 1, 28, 28) and found.test.images.shape[0] == 10
    assert found.classes == 10 and found.channels == 1
    assert found.flip == (name == "fashionmnist")


def test_cifar_files(tmp_path, monkeypatch):
    # torchvision compares the files with the hashes of the real ones.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.full((4, 3072), number, np.uint8)
        pixels[:, :1024] += 100  # the red channel comes first
        content = {"data": pixels, "labels": [0, 3, 9, 1]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    arguments = ["--data", "cifar10", "--data-dir", str(tmp_path), "--batch-size", "4"]
    found = data.load(parse(arguments))
    assert found.train.images.shape == (20, 3, 32, 32) and found.classes == 10 and found.flip
    assert found.train.images[0, :, 0, 0].tolist() == [100, 0, 0]
    assert found.test.images[0, :, 31, 31].tolist() == [105, 5, 5]
    assert found.mean[1] == pytest.approx(2 / 255)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of 2 classes with 6 images to train and 4 to test on."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 6), ("val", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(count // 2):
                pixels = torch.randint(0, 256, (30, 40, 3), generator=generator)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return tmp_path / "photos"


def folder_options(folder: Path, *more: str) -> Options:
    arguments = ["--data", "imagefolder", "--data-dir", str(folder), "--image-size", "16"]
    return parse([*arguments, "--batch-size", "2", "--workers", "0", *more])


def batches(found: data.Data, channels: int = 3, augment: bool = True) -> Batches:
    return Batches(
        found,
        batch_size=2,
        device=torch.device("cpu"),
        channels=channels,
        augment=augment,
        channels_last=False,
    )


def test_image_folder_streams_what_it_would_keep_in_memory(photos):
    kept = data.load(folder_options(photos))
    streamed = data.load(folder_options(photos, "--stream"))
    assert isinstance(kept.train, Images) and not isinstance(streamed.train, Images)
    assert (len(kept.train), len(kept.test), kept.classes) == (6, 4, 2)
    for a, b in zip(batches(kept).train(0, 0, 3), batches(streamed).train(0, 0, 3), strict=True):
        assert a[0].shape == (2, 3, 16, 16)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    for a, b in zip(batches(kept).test(), batches(streamed).test(), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_image_folder_without_parts_holds_out_a_fifth(photos):
    found = data.load(folder_options(photos / "train"))
    assert (len(found.train), len(found.test), found.classes) == (5, 1, 2)


def test_image_folder_with_a_broken_image_or_other_classes(photos):
    broken = photos / "train" / "cat" / "0.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"cannot read the image .*0\.png"):
        data.load(folder_options(photos))
    (photos / "val" / "cat").rename(photos / "val" / "cow")
    with pytest.raises(UserError, match=r"differ in the classes \['cat', 'cow'\]"):
        data.load(folder_options(photos))


def test_batches_are_crops_of_the_padded_images_and_repeat_with_seed_and_epoch():
    found = data.load(parse(["--train-images", "64"]))
    ready = batches(found, channels=1)
    (images, labels), *_ = ready.train(3, 5, 1)
    again, other = next(ready.train(3, 5, 1)), next(ready.train(3, 6, 1))
    assert torch.equal(images, again[0]) and not torch.equal(images, other[0])
    padded = F.pad(found.train.images, [1] * 4)
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)[:, 0].reshape(-1, 8, 8).float()
    back = images[:, 0] * ready.std + ready.mean
    for image, label in zip(back, labels, strict=True):
        which = int((windows - image).abs().amax((1, 2)).argmin())
        assert torch.allclose(windows[which], image, atol=1e-3)
        assert found.train.labels[which // 9] == label
    plain = torch.cat([b[0] for b in batches(found, channels=1, augment=False).train(0, 0, 32)])
    assert abs(plain.mean()) < 1e-3 and abs(plain.std() - 1) < 1e-2
    # torchvision's models take colour
    assert next(batches(found, channels=3).train(0, 0, 1))[0].shape == (2, 3, 8, 8)
