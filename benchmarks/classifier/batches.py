"""From stored images to what a model is fed: order, crops, flips, normalisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from classifier.images import Data, Files, Images


class Batches:
    """Batches as the model takes them: on the device, cropped, normalised.

    What is random comes from the seed and the epoch alone, through a generator on the CPU: all
    methods see the same crops in the same order, on any device, and a resumed run goes on with
    those it would have seen.
    """

    def __init__(
        self,
        data: Data,
        *,
        batch_size: int,
        device: torch.device,
        channels: int,
        augment: bool,
        channels_last: bool,
        resize_to: int = 0,
    ) -> None:
        self.train_set, self.test_set = data.train.to(device), data.test.to(device)
        self.data = data
        self.batch_size = batch_size
        self.device = device
        self.channels = channels  # of the model; grey images are repeated where it wants three
        self.augment = augment
        self.resize_to = resize_to  # pixels, after cropping; 0: as they are
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.mean = torch.tensor(data.mean, device=device).view(-1, 1, 1) * 255
        self.std = torch.tensor(data.std, device=device).view(-1, 1, 1) * 255

    @property
    def steps_per_epoch(self) -> int:
        """Full batches only, so that all steps cost the same FLOPs."""
        return len(self.train_set) // self.batch_size

    def train(self, seed: int, epoch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the first ``steps`` training batches of an epoch."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train_set), generator=generator)
        for images, labels in self.train_set.batches(
            order[: steps * self.batch_size], self.batch_size
        ):
            yield self._ready(images, generator if self.augment else None), self._moved(labels)

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all test images."""
        return self.plain(self.test_set)

    def plain(self, images_of: Images | Files) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images of a set in its order, the middle of each."""
        for images, labels in images_of.batches(torch.arange(len(images_of)), 2 * self.batch_size):
            yield self._ready(images, None), self._moved(labels)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _ready(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        images = self._moved(images)
        if generator is None:
            edge = (images.shape[-1] - self.data.size) // 2
            images = images[..., edge : edge + self.data.size, edge : edge + self.data.size]
        else:
            images = self._cropped_and_flipped(images, generator)
        images = ((images - self.mean) / self.std).expand(-1, self.channels, -1, -1)
        if self.resize_to:
            images = F.interpolate(images, size=self.resize_to, mode="bilinear")
        return images.contiguous(memory_format=self.memory_format)

    def _cropped_and_flipped(self, images: Tensor, generator: torch.Generator) -> Tensor:
        images = F.pad(images, [self.data.pad] * 4)
        count, size = len(images), self.data.size
        room = images.shape[-1] - size
        corners = torch.randint(room + 1, (2, count, 1), generator=generator)
        rows, columns = self._moved(corners + torch.arange(size))
        if self.data.flip:
            mirrored = self._moved(torch.rand(count, 1, generator=generator) < 0.5)
            columns = torch.where(mirrored, columns.flip(1), columns)
        # One gather for the whole batch: image i, its rows, its columns.
        which = torch.arange(count, device=self.device)[:, None, None]
        images = images.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
        return images.permute(0, 3, 1, 2)
