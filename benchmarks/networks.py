"""The networks that are timed: timm's, U-Nets that segment, and that of a diffusion model."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from unet import UNet as SegmentationUNet
from unet3d import UNet3d

#: The U-Net of DDPM, by diffusers; and one in plain torch that segments.
UNET, SEGMENTATION = "unet2d_cifar10", "unet"
_UNET3D = re.compile(r"unet3d_(\d+)")  # of volumes, and its narrowest width


class Network(NamedTuple):
    """A network, and the size of its input, (batch, 3, pixels, pixels) or, in 3-D, a cube."""

    name: str
    batch: int
    pixels: int

    @classmethod
    def parse(cls, text: str) -> Network:
        """Read ``NAME:BATCH:PIXELS``.

        Raises:
            ValueError: If the text is not of that form, there is no such network, or what it needs
                is not installed.
        """
        name, *numbers = text.split(":")
        if len(numbers) != 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise ValueError(f"{text!r} is not NAME:BATCH:PIXELS, such as resnet18:16:128")
        if name == SEGMENTATION:
            if int(numbers[1]) % SegmentationUNet.DIVISOR:
                raise ValueError(f"{text!r}: takes a multiple of {SegmentationUNet.DIVISOR} pixels")
        elif name == UNET:
            if importlib.util.find_spec("diffusers") is None:
                raise ValueError(f"{UNET} needs diffusers: pip install diffusers")
            if int(numbers[1]) % 8:
                raise ValueError(f"{text!r}: {UNET} takes a multiple of 8 pixels")
        elif _UNET3D.fullmatch(name):
            if int(numbers[1]) % UNet3d.MULTIPLE:
                raise ValueError(f"{text!r}: {name} takes a multiple of {UNet3d.MULTIPLE} pixels")
        else:
            _check_name(name)
        return cls(name, *map(int, numbers))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input."""
        if self.width:
            return self.batch, 1, self.pixels, self.pixels, self.pixels
        return self.batch, 3, self.pixels, self.pixels

    @property
    def width(self) -> int:
        """Of a 3-D U-Net, channels of its first layers; 0 of another network."""
        found = _UNET3D.fullmatch(self.name)
        return int(found[1]) if found else 0

    def build(self) -> nn.Module:
        """Return the network with random weights."""
        if self.width:
            return UNet3d(self.width)
        if self.name == SEGMENTATION:
            return SegmentationUNet()
        if self.name == UNET:
            return UNet(self.pixels)
        import timm

        return timm.create_model(self.name)

    def loss(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the loss as a function of the output for the input ``x``: random targets."""
        if self.name == UNET or self.width:
            noise = torch.randn_like(x)
            return lambda out: F.mse_loss(out.float(), noise)
        if self.name == SEGMENTATION:
            of_pixels = torch.randint(2, (x.shape[0], *x.shape[2:]), device=x.device)
            return lambda out: F.cross_entropy(out, of_pixels)
        classes = torch.randint(1000, x.shape[:1], device=x.device)
        return lambda out: F.cross_entropy(out, classes)


def _check_name(name: str) -> None:
    if importlib.util.find_spec("timm") is None:
        raise ValueError(f"{name} needs timm: pip install timm")
    import timm  # takes seconds, and the U-Nets do without

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*timm.list_models(), UNET, SEGMENTATION], n=3)
        hint = f"; the nearest names are {', '.join(near)}" if near else ""
        raise ValueError(f"timm has no network {name!r}{hint}")


class UNet(nn.Module):
    """The net of DDPM for CIFAR-10 (arXiv 2006.11239, appendix B): 35.7 million parameters.

    A function of images (N, 3, H, W) alone, each with a timestep of its own.
    """

    def __init__(self, pixels: int) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        self.unet = UNet2DModel(
            sample_size=pixels,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, images: Tensor) -> Tensor:
        timesteps = torch.arange(images.shape[0], device=images.device) * 7 % 1000
        return self.unet(images, timesteps, return_dict=False)[0]


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the last layers of one of timm's networks, none of another."""
    if not hasattr(model, "get_classifier"):
        return ()
    heads = model.get_classifier()
    return heads if isinstance(heads, tuple) else (heads,)
