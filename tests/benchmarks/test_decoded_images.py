"""Images of studies: a share of each class, and folders and archives decoded once."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from classifier import decoded
from classifier.options import UserError
from PIL import Image


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999, 1.0])
def test_share_is_stratified_seeded_and_nested(share):
    labels_ = torch.tensor([0] * 40 + [1] * 200 + [2] * 3)[torch.randperm(243)]
    chosen = decoded.stratified(labels_, share, seed=1)
    counts = torch.bincount(labels_[chosen], minlength=3).tolist()
    assert counts == [max(1, round(share * n)) for n in (40, 200, 3)]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert torch.equal(chosen, decoded.stratified(labels_, share, seed=1))
    assert set(chosen.tolist()) <= set(decoded.stratified(labels_, 1.0, seed=1).tolist())
    if share < 0.9:
        assert not torch.equal(chosen, decoded.stratified(labels_, share, seed=2))
        more = decoded.stratified(labels_, share + 0.1, seed=1)
        assert set(chosen.tolist()) <= set(more.tolist())


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of train and test images of two classes, 8 x 8 pixels, and one of 12 x 10."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                size = (12, 10, 3) if (part, i) == ("test", 2) else (8, 8, 3)
                pixels = generator.integers(0, 256, size, np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return tmp_path / "pictures"


def packed(folder: Path, path: Path) -> Path:
    """Pack a folder's files in reverse order, below another folder, beside a file of no use."""
    with tarfile.open(path, "w:gz") as archive:
        for file in sorted(folder.rglob("*.jpg"), reverse=True):
            archive.add(file, Path("some") / file.relative_to(folder))
        note = tarfile.TarInfo("some/train/cat/._0.jpg")
        archive.addfile(note, io.BytesIO())
    return path


def test_archive_and_folder_hold_the_same_images_decoded_once(pictures, tmp_path, monkeypatch):
    archive = packed(pictures, tmp_path / "pictures.tar.gz")
    both = [
        decoded.load("pets", data_dir=place, cache_dir=tmp_path / "cache", size=8)
        for place in (pictures, archive)
    ]
    assert both[0].digest == both[1].digest
    images, classes = both[1].train
    assert images.shape == (12, 3, 8, 8) and images.dtype == torch.uint8
    assert classes.tolist() == [0] * 6 + [1] * 6
    want = np.asarray(Image.open(pictures / "train" / "dog" / "3.jpg"))
    assert np.array_equal(images[9].permute(1, 2, 0).numpy(), want)
    assert both[0].test[0].shape == (6, 3, 8, 8)
    assert len(both[0].data(0.5).train) == 6

    monkeypatch.setattr(decoded, "_image", None)  # decoding again would fail
    again = decoded.load("pets", data_dir=archive, cache_dir=tmp_path / "cache", size=8)
    assert torch.equal(again.train[0], images) and again.digest == both[0].digest
    monkeypatch.undo()

    Image.new("RGB", (8, 8)).save(pictures / "train" / "dog" / "3.jpg")
    changed = decoded.load("pets", data_dir=pictures, cache_dir=tmp_path / "cache", size=8)
    assert changed.digest != both[0].digest and not changed.train[0][9].any()


def test_images_that_cannot_be_used_are_refused(pictures, tmp_path):
    def load(place: Path):
        return decoded.load("pets", data_dir=place, cache_dir=tmp_path / "cache", size=8)

    with pytest.raises(UserError, match="no images of 'pets'"):
        load(tmp_path / "nowhere")
    (tmp_path / "bad.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(UserError, match="cannot be read as an archive"):
        load(tmp_path / "bad.tar.gz")
    (pictures / "train" / "dog" / "3.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"cannot read the image train/dog/3\.jpg"):
        load(pictures)
    (pictures / "train" / "dog" / "3.jpg").unlink()
    (pictures / "test" / "dog").rename(pictures / "test" / "cow")
    with pytest.raises(UserError, match=r"differ in the classes \['cow', 'dog'\]"):
        load(pictures)
