"""What runs are called in tables, plots and on the terminal."""

from __future__ import annotations

import dataclasses

from study.settings import Settings

#: What belongs to a method; all other settings but the seed are the conditions it works under.
OF_A_METHOD = (
    "method",
    "schedule",
    "selection",
    "types",
    "exclude",
    "overrides",
    "dropout",
    "weight_decay",
    "label_smoothing",
    "remainder",
    "steps_share",
    "frozen",
)
REGULARISERS = ("dropout", "weight_decay", "label_smoothing")
_DEFAULT = Settings()


def run(settings: Settings) -> str:
    """Return the label of one run."""
    return f"{method(settings)} | {condition(settings)}, seed {settings.seed}"


def method(settings: Settings, base: Settings = _DEFAULT) -> str:
    """Return the label of a method: a row of a table.

    Args:
        settings: Of any of its runs.
        base: Regularisers that are as here go without saying.
    """
    parts = [
        {
            "dense": "dense",
            "dense-equal-compute": f"dense, compute of {settings.schedule}",
            "ssprop": f"ssProp {settings.schedule}",
        }[settings.method]
    ]
    if settings.steps_share != 1:
        parts[0] += f", {settings.steps_share:g} of the steps"
    if settings.selection not in ("", "l1"):
        what = "directions" if settings.selection == "principal" else "channels"
        parts.append(f"{settings.selection} {what}")
    if settings.remainder != "none":
        parts.append(f"{settings.remainder} remainder")
    if settings.frozen:
        parts.append(f"frozen {' '.join(settings.frozen)}")
    if settings.method != "dense" and settings.types != _DEFAULT.types:
        parts.append("+".join(settings.types))
    if settings.exclude:
        parts.append(f"without {' '.join(settings.exclude)}")
    parts += [f"{pattern} at {rate:g}" for pattern, rate in settings.overrides]
    parts += regularisers(settings, base)
    return ", ".join(parts)


def regularisers(settings: Settings, base: Settings = _DEFAULT) -> list[str]:
    """Return what works against over-fitting beside the method, where it is not as in ``base``."""
    return [
        f"{name.replace('_', ' ')} {getattr(settings, name):g}"
        for name in REGULARISERS
        if getattr(settings, name) != getattr(base, name)
    ]


def condition(settings: Settings) -> str:
    """Return the label of the conditions: the title of a table."""
    how = [settings.network, f"{settings.data} at {settings.image_size}x{settings.image_size}"]
    if settings.resize_to:
        how[-1] += f" enlarged to {settings.resize_to}x{settings.resize_to}"
    if settings.pretrained:
        how[0] += " from ImageNet weights"
    how.append(f"{100 * settings.share:g} % of the training images")
    if settings.test_share != 1:
        how[-1] += f", {100 * settings.test_share:g} % of the test images"
    how.append("augmented" if settings.augment else "not augmented")
    how.append(f"{settings.epochs} epochs, batch {settings.batch_size}")
    how.append(f"{settings.optimizer} lr {settings.lr:g} {settings.lr_schedule}")
    how += [settings.amp] if settings.amp != "off" else []
    how += [name for name in ("channels_last", "compile") if getattr(settings, name)]
    return ", ".join(how)


def key_of_condition(settings: Settings) -> Settings:
    """Return the same for all runs under the same conditions."""
    return dataclasses.replace(
        settings, seed=0, **{name: getattr(_DEFAULT, name) for name in OF_A_METHOD}
    )
