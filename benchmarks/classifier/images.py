"""Images as they are stored, in memory or in files, and the two sets that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from classifier.options import UserError


class Images:
    """uint8 images (N, C, H, W) and their labels, all in memory."""

    # Up to this size they move to the device as a whole.
    _ON_DEVICE = 4 * 2**30

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        """Return the images on ``device``, or where they are if they are many."""
        if self.images.numel() > self._ON_DEVICE:
            return self
        return Images(self.images.to(device), self.labels.to(device))

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels in that order; the last batch may be smaller."""
        for part in order.to(self.labels.device).split(batch_size):
            yield self.images[part], self.labels[part]


class Files(Dataset):
    """Image files and their labels, decoded each time they are asked for."""

    def __init__(
        self, samples: list[tuple[str, int]], decode: Callable[[str], Tensor], workers: int
    ) -> None:
        self.samples = samples
        self.decode = decode
        self.workers = workers

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.decode(path), label

    def to(self, device: torch.device) -> Files:
        """Return itself: the files stay where they are."""
        return self

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels in that order; the last batch may be smaller."""
        loader = DataLoader(
            self,
            batch_size,
            sampler=order.tolist(),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            # Without its own, the loader would draw from the generator that dropout draws from.
            generator=torch.Generator(),
        )
        try:
            yield from loader
        except UserError as error:
            # From a worker it comes wrapped into the text of its traceback; the last line is it.
            last = str(error).strip().splitlines()[-1]
            raise UserError(last.rpartition("UserError: ")[2]) from error


@dataclass(frozen=True)
class Data:
    """What a model is trained and tested on.

    Attributes:
        train, test: Images as uint8, of ``stored_size``.
        size: Side of the square that the model sees.
        pad: Black pixels added on each side before a crop of ``size`` is taken.
        flip: Whether a mirrored image is still one of its class.
        mean, std: Of each channel, in [0, 1].
    """

    name: str
    classes: int
    train: Images | Files
    test: Images | Files
    size: int
    pad: int
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Return 1 for grey and 3 for colour images."""
        return len(self.mean)
