"""Any timm or torchvision classifier by its name, fitted to the data."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torchvision
from torch import nn

from classifier.options import Options, UserError

# Networks that timm can build but has no name for: what they are made from, with which arguments.
RESNET10, RESNET8_NARROW = "resnet10", "resnet8_narrow"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # One basic block in each of the four stages.
    RESNET10: ("resnet18", {"layers": (1, 1, 1, 1)}),
    # For trials on a CPU: one block in each of three narrow stages, behind a stem as narrow.
    RESNET8_NARROW: ("resnet18", {"layers": (1, 1, 1, 0), "channels": (24, 48, 96, 96)}),
    # The same with bottlenecks: most of its convolutions are 1x1.
    "resnet11_narrow": ("resnet50", {"layers": (1, 1, 1, 0), "channels": (16, 32, 64, 64)}),
    # For images of 32 pixels: patches of 2; the layers of its blocks are nn.Linear.
    "convnext_atto_small": ("convnext_atto", {"patch_size": 2, "conv_mlp": False}),
    "convnext_femto_small": ("convnext_femto", {"patch_size": 2, "conv_mlp": False}),
}
# Builders that must be told to leave out their auxiliary classifiers.
_WITH_AUXILIARY = {"googlenet", "inception_v3"}


def build(options: Options, *, classes: int, channels: int, size: int) -> tuple[nn.Module, int]:
    """Return a fresh model for ``classes`` and the number of input channels it wants.

    Raises:
        UserError: If there is no such model, or it cannot be built that way.
    """
    library, name = resolve(options.model)
    try:
        if library == "timm":
            kwargs = {"num_classes": classes, "in_chans": channels, "drop_rate": options.dropout}
            base, more = VARIANTS.get(name, (name, {}))
            model = timm.create_model(base, **kwargs, **more)
            if name == RESNET8_NARROW:
                _make_stem_narrow(model)
        else:
            # torchvision's models take colour images only.
            channels = 3
            kwargs = {"num_classes": classes}
            if name in _WITH_AUXILIARY:
                kwargs |= {"aux_logits": False, "init_weights": True}
            model = torchvision.models.get_model(name, weights=None, **kwargs)
            _set_dropout(model, options.dropout)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"--model {options.model}: {error}") from error
    if options.stem == "small" or (options.stem == "auto" and size <= 64 and _has_big_stem(model)):
        _make_stem_small(model, options.model)
    return model, channels


def resolve(name: str) -> tuple[str, str]:
    """Return ("timm" or "torchvision", name) for ``--model``'s text."""
    library, colon, bare = name.partition(":")
    if not colon:
        library, bare = "", name
    if library not in ("", "timm", "torchvision"):
        raise UserError(f"--model {name}: write timm:NAME, torchvision:NAME or NAME")
    # torchvision also lists detectors and video models; these classify images.
    vision = torchvision.models.list_models(module=torchvision.models)
    if library != "torchvision" and (bare in VARIANTS or timm.is_model(bare)):
        return "timm", bare
    if library != "timm" and bare in vision:
        return "torchvision", bare
    known = list(VARIANTS)
    known += timm.list_models() if library != "torchvision" else []
    known += vision if library != "timm" else []
    near = difflib.get_close_matches(bare, dict.fromkeys(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists the names"
    raise UserError(
        f"--model {name}: {library or 'timm and torchvision'} have no such model; {hint}"
    )


def _has_big_stem(model: nn.Module) -> bool:
    """Tell a ResNet as in the paper, in timm or torchvision: 7x7 with stride 2, then max-pool."""
    stem = getattr(model, "conv1", None)
    return (
        isinstance(stem, nn.Conv2d)
        and stem.kernel_size == (7, 7)
        and stem.stride == (2, 2)
        and isinstance(getattr(model, "maxpool", None), nn.MaxPool2d)
    )


def _make_stem_narrow(model: nn.Module) -> None:
    """Let a ResNet's stem have as many channels as its first block: timm's always has 64."""
    first = model.layer1[0]
    width, old = first.conv2.in_channels, model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, width, 7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    first.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
    first.downsample = None
    for conv in (model.conv1, first.conv1):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def _make_stem_small(model: nn.Module, name: str) -> None:
    if not _has_big_stem(model):
        raise UserError(f"--stem small: {name} has no 7x7 stem with a max-pool to replace")
    old = model.conv1
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = new, nn.Identity()


def _set_dropout(model: nn.Module, rate: float) -> None:
    """Put dropout in front of a torchvision model's last linear layer, or set what it has."""
    if rate == 0:
        return
    present = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    for module in present:
        module.p = rate
    if not present:
        name, last = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent).register_module(leaf, nn.Sequential(nn.Dropout(rate), last))
