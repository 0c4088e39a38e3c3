"""ssProp (arXiv 2408.12561) for the convolutional network you already have.

``convert(model)`` gives its convolutions a sparse backward, ``revert(model)`` takes it off again.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public is what stands in __all__, here and in the modules that it names. Everything else, every
# other module included, may change at any time.

__all__ = [
    "Ahead",
    "BarSchedule",
    "Coarse",
    "ConstantSchedule",
    "CosineSchedule",
    "LambdaSchedule",
    "LinearSchedule",
    "Meter",
    "MeterReport",
    "Plan",
    "Principal",
    "Schedule",
    "SequentialSchedule",
    "SparsityController",
    "Status",
    "StepSchedule",
    "Subspace",
    "Summary",
    "convert",
    "converted",
    "dense",
    "functional",
    "get_controller",
    "integrations",
    "is_converted",
    "kernels",
    "metering",
    "parse_schedule",
    "paused",
    "plan",
    "plots",
    "presets",
    "revert",
    "reverted_copy",
    "sparsity",
    "status",
    "summary",
    "timing",
]

#: Where each of these is defined; they are imported when they are first used.
_NAMES = {
    "core.ahead": ("Ahead",),
    "core.coarse": ("Coarse",),
    "core.principal": ("Principal", "Subspace"),
    "flops.count": ("summary",),
    "flops.summary": ("Summary",),
    "metering.meter": ("Meter",),
    "metering.meter_report": ("MeterReport",),
    "patching.convert": ("convert", "converted", "is_converted", "revert"),
    "patching.copies": ("reverted_copy",),
    "patching.plan": ("Plan",),
    "patching.status": ("Status", "status"),
    "schedule.contexts": ("dense", "paused", "sparsity"),
    "schedule.controller": ("SparsityController", "get_controller"),
    "schedule.parse": ("parse_schedule",),
    "schedule.schedules": (
        "BarSchedule",
        "ConstantSchedule",
        "CosineSchedule",
        "LambdaSchedule",
        "LinearSchedule",
        "Schedule",
        "SequentialSchedule",
        "StepSchedule",
    ),
    "timing.measured_plan": ("plan",),
}
_MODULES = {
    "functional": "functional",
    "integrations": "integrations",
    "kernels": "ops.autotune",
    "metering": "metering",
    "plots": "plots",
    "presets": "schedule.presets",
    "timing": "timing",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
for _name in _HOME:  # this module is reloaded: what it once looked up may be older than it is
    globals().pop(_name, None)
del _name


def _module(path: str) -> Any:
    # The package may have been taken out of sys.modules and imported again; what this import of it
    # has loaded is found among its own attributes.
    found: Any = globals()
    for part in path.split("."):
        if part not in found:
            return import_module(f"{__name__}.{path}")
        module, found = found[part], vars(found[part])
    return module


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


if not TYPE_CHECKING:  # to which this would make every name, misspelt ones too, an Any

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            found: Any = _module(_MODULES[name])
        elif name in _HOME:
            found = getattr(_module(_HOME[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found

else:
    from . import functional, integrations, metering, plots, timing
    from .core.ahead import Ahead
    from .core.coarse import Coarse
    from .core.principal import Principal, Subspace
    from .flops.count import summary
    from .flops.summary import Summary
    from .metering.meter import Meter
    from .metering.meter_report import MeterReport
    from .ops import autotune as kernels
    from .patching.convert import convert, converted, is_converted, revert
    from .patching.copies import reverted_copy
    from .patching.plan import Plan
    from .patching.status import Status, status
    from .schedule import presets
    from .schedule.contexts import dense, paused, sparsity
    from .schedule.controller import SparsityController, get_controller
    from .schedule.parse import parse_schedule
    from .schedule.schedules import (
        BarSchedule,
        ConstantSchedule,
        CosineSchedule,
        LambdaSchedule,
        LinearSchedule,
        Schedule,
        SequentialSchedule,
        StepSchedule,
    )
    from .timing.measured_plan import plan
