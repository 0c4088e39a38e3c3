"""The U-Net, as diffusers builds it, and the noise that it learns to remove."""

from __future__ import annotations

import math

import torch
from classifier.options import UserError
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from ddpm.settings import Settings

TRAIN_STEPS = 1000  # of noise, from an image to nothing but noise


class Denoiser(nn.Module):
    """UNet2DModel as a function of images (N, C, H, W) and timesteps (N,) to the noise in them."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        return self.unet(images, timesteps, return_dict=False)[0]


def build(settings: Settings, colours: int) -> Denoiser:
    """Return a fresh model for images of ``colours`` channels.

    Raises:
        UserError: If the channels or the image size cannot be.
    """
    levels = len(settings.channels)
    if settings.image_size % 2 ** (levels - 1) or any(c % 8 for c in settings.channels):
        raise UserError(
            f"--channels {settings.channels} with --image-size {settings.image_size}: each must be "
            f"a multiple of 8, and the size divisible by {2 ** (levels - 1)}"
        )
    # Attention at all resolutions but the finest, as in the DDPM paper's nets for 32 pixels.
    down = ["DownBlock2D", *["AttnDownBlock2D"] * (levels - 1)]
    up = [*["AttnUpBlock2D"] * (levels - 1), "UpBlock2D"]
    return Denoiser(
        UNet2DModel(
            sample_size=settings.image_size,
            in_channels=colours,
            out_channels=colours,
            layers_per_block=settings.blocks,
            block_out_channels=settings.channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            norm_num_groups=math.gcd(32, *settings.channels),
        )
    )


def noise_schedule() -> DDPMScheduler:
    """Return DDPM with cosine betas (arXiv 2102.09672), which predicts the noise."""
    return DDPMScheduler(num_train_timesteps=TRAIN_STEPS, beta_schedule="squaredcos_cap_v2")


def inputs(settings: Settings, colours: int) -> tuple[Tensor, Tensor]:
    """Return a batch of the right shapes, for counting."""
    size = settings.image_size
    images = torch.zeros(settings.batch_size, colours, size, size)
    return images, torch.zeros(settings.batch_size, dtype=torch.long)
