"""Real images, decoded once into one uint8 tensor where memory allows it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import default_loader
from torchvision.transforms import functional as TF

from classifier.images import Data, Files, Images
from classifier.options import Options, UserError


def load(options: Options) -> Data:
    """Return the data that the options name.

    Raises:
        UserError: If a folder or file is missing or broken.
    """
    folder = Path(options.data_dir or "data").expanduser()
    if options.data == "imagefolder":
        data = _image_folder(folder, options)
    elif options.data == "digits":
        data = _in_memory("digits", *digits(), flip=False, options=options)
    else:
        train, test = from_torchvision(options.data, folder, options.download)
        flip = options.data != "mnist"
        data = _in_memory(options.data, train, test, flip=flip, options=options)
    if len(data.train) < options.batch_size:
        raise UserError(
            f"--batch-size {options.batch_size} is more than the {len(data.train)} training images"
        )
    return data


Labelled = tuple[Tensor, Tensor]  # uint8 (N, C, H, W), int64 (N,)


def digits() -> tuple[Labelled, Labelled]:
    """Return scikit-learn's scans; the last quarter is for testing.

    In the order of the file, not shuffled: neighbours there come from the same hand, and a
    shuffle would put the same writer on both sides.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    cut = len(images) * 3 // 4
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


TORCHVISION: dict[str, tuple[Callable, str]] = {
    "mnist": (datasets.MNIST, "MNIST/raw"),
    "fashionmnist": (datasets.FashionMNIST, "FashionMNIST/raw"),
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
    "cifar100": (datasets.CIFAR100, "cifar-100-python"),
}


def from_torchvision(name: str, folder: Path, download: bool) -> tuple[Labelled, Labelled]:
    make, holds = TORCHVISION[name]
    try:
        parts = [make(folder, train=train, download=download) for train in (True, False)]
    except Exception as error:
        # torchvision and the unpicklers below it raise many kinds, all for a bad folder.
        if download:
            raise UserError(f"--download of {name} into {folder}: {_first_line(error)}") from error
        raise UserError(
            f"no {name} in {folder}: pass --data-dir with the folder that holds {holds}, "
            f"or --download ({_first_line(error)})"
        ) from error
    out = []
    for part in parts:
        images = torch.as_tensor(part.data)
        # (N, H, W) or (N, H, W, C) to (N, C, H, W)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        out.append((images.contiguous(), torch.as_tensor(part.targets).long()))
    return out[0], out[1]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _in_memory(name: str, train: Labelled, test: Labelled, flip: bool, options: Options) -> Data:
    if options.train_images is not None:
        chosen = _some(len(train[0]), options.train_images)
        train = (train[0][chosen], train[1][chosen])
    return in_memory(name, train, test, flip, options.image_size or train[0].shape[-1])


def in_memory(name: str, train: Labelled, test: Labelled, flip: bool, size: int) -> Data:
    """Return these images, resized to squares of ``size``, as data to train on."""
    sets = []
    for images, labels in (train, test):
        if images.shape[-1] != size:
            # In parts: as float32, which resizing goes through, all of them may be gigabytes.
            parts = [TF.resize(part, [size, size], antialias=True) for part in images.split(4096)]
            images = torch.cat(parts)
        sets.append(Images(images, labels))
    # Chunks, since 50 000 images as doubles would take gigabytes.
    pixels = sets[0].images.flatten(2)
    count = pixels.shape[0] * pixels.shape[2]
    mean = sum(c.double().sum((0, 2)) for c in pixels.split(1000)) / count / 255
    square = sum(c.double().square().sum((0, 2)) for c in pixels.split(1000)) / count / 255**2
    std = (square - mean**2).clamp(min=1e-6).sqrt()
    classes = int(torch.cat([train[1], test[1]]).max()) + 1
    pad = size // 8  # 4 pixels at 32, as usual for CIFAR
    return Data(name, classes, *sets, size, pad, flip, tuple(mean.tolist()), tuple(std.tolist()))


def _some(total: int, wanted: int) -> Tensor:
    """Return ``wanted`` of ``total`` indices, the same ones each time."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:wanted]


def _image_folder(folder: Path, options: Options) -> Data:
    size = options.image_size or 224
    stored = round(size * 8 / 7)  # 256 for 224: room for random crops
    train, test, classes = _find_files(folder)
    if options.train_images is not None:
        train = [train[i] for i in _some(len(train), options.train_images)]
    need = (len(train) + len(test)) * 3 * stored**2
    if options.stream or need > _free_memory() / 2:
        sets = [Files(part, Decode(stored), options.workers) for part in (train, test)]
    else:
        # Decoded by the same code that would stream them, so that both give the same pixels.
        sets = [_decoded(Files(part, Decode(stored), options.workers)) for part in (train, test)]
    # ImageNet's numbers: measuring them would be another pass over images that may not fit.
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Data("imagefolder", classes, *sets, size, 0, True, mean, std)


def _find_files(folder: Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]], int]:
    """Return (path, class) of the training and of the test images, and the number of classes."""
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}: pass --data-dir with a folder that holds train/CLASS/* and "
            f"val/CLASS/*, or CLASS/* alone"
        )
    held_out = next((n for n in ("val", "valid", "test") if (folder / n).is_dir()), None)
    try:
        if (folder / "train").is_dir() and held_out:
            train = datasets.ImageFolder(folder / "train")
            test = datasets.ImageFolder(folder / held_out)
            if train.classes != test.classes:
                odd = sorted(set(train.classes) ^ set(test.classes))
                raise UserError(f"{folder}: train and {held_out} differ in the classes {odd}")
            return train.samples, test.samples, len(train.classes)
        whole = datasets.ImageFolder(folder)
    except (FileNotFoundError, OSError) as error:
        raise UserError(f"--data-dir {folder}: {_first_line(error)}") from error
    shuffled = [whole.samples[i] for i in _some(len(whole), len(whole))]
    return shuffled[len(whole) // 5 :], shuffled[: len(whole) // 5], len(whole.classes)


class Decode:
    """An image file as uint8 of shape (3, size, size), the middle of its shorter side."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, path: str) -> Tensor:
        try:
            image = default_loader(path)
        except OSError as error:
            raise UserError(f"cannot read the image {path}: {_first_line(error)}") from error
        image = TF.center_crop(TF.resize(image, self.size, antialias=True), self.size)
        return TF.pil_to_tensor(image)


def _decoded(files: Files) -> Images:
    batches = list(files.batches(torch.arange(len(files)), 64))
    return Images(torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))


def _free_memory() -> float:
    """Return the bytes that can be had without swapping; a cautious guess where none can tell."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return 4e9
