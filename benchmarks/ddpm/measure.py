"""What is measured of a trained denoiser: the loss on held-out images, and what it generates."""

from __future__ import annotations

from pathlib import Path

import torch
from classifier.batches import Batches
from classifier.images import Images
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid

from ddpm.model import TRAIN_STEPS, noise_schedule
from ddpm.settings import Settings
from ddpm.training import autocast
from ssprop_patch._files import replacing


@torch.no_grad()
def held_out_loss(model: nn.Module, settings: Settings, batches: Batches) -> float:
    """Return the mean squared error of the noise predicted in test images.

    Which images, their noise and their timesteps (all parts of the noise schedule alike) are the
    same in every run, on any device.
    """
    model.eval()
    count = min(settings.held_out, len(batches.test_set))
    # Evenly through the set, which may be in the order of its classes.
    chosen = torch.linspace(0, len(batches.test_set) - 1, count).round().long()
    chosen = chosen.to(batches.test_set.labels.device)
    part = Images(batches.test_set.images[chosen], batches.test_set.labels[chosen])
    generator = torch.Generator().manual_seed(0)
    times = torch.arange(count) * TRAIN_STEPS // count
    times = times[torch.randperm(count, generator=generator)]
    noises, done = noise_schedule(), 0
    total = torch.zeros((), dtype=torch.float64, device=batches.device)
    for images, _ in batches.plain(part):
        noise = torch.randn(images.shape, generator=generator).to(batches.device)
        at = times[done : done + len(images)].to(batches.device)
        with autocast(settings, batches.device):
            predicted = model(noises.add_noise(images, noise, at), at)
        total += F.mse_loss(predicted.float(), noise, reduction="sum").double()
        done += len(images)
    return total.item() / (count * images[0].numel())


@torch.no_grad()
def generate(model: nn.Module, settings: Settings, device: torch.device, colours: int) -> Tensor:
    """Return generated images, uint8 (samples, C, H, W) on the CPU; from the run's seed."""
    model.eval()
    noises = noise_schedule()
    noises.set_timesteps(settings.sample_steps)
    generator = torch.Generator(device).manual_seed(settings.seed)
    size, out = settings.image_size, []
    for first in range(0, settings.samples, 4 * settings.batch_size):
        count = min(4 * settings.batch_size, settings.samples - first)
        images = torch.randn(count, colours, size, size, generator=generator, device=device)
        for time in noises.timesteps.tolist():
            at = torch.full((count,), time, device=device)
            with autocast(settings, device):
                predicted = model(images, at)
            images = noises.step(predicted.float(), time, images, generator=generator).prev_sample
        out.append(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(out)


def write_grid(path: Path, images: Tensor) -> None:
    """Write the first 64 images, eight a row, as a PNG."""
    grid = make_grid(images[:64], nrow=8, padding=1)
    with replacing(path) as temporary:
        TF.to_pil_image(grid).save(temporary, format="png")
