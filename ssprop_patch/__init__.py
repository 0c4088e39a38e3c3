"""ssProp (arXiv 2408.12561) for the convolutional network you already have.

``convert(model)`` gives its convolutions a sparse backward, ``revert(model)`` takes it off again.
"""

from . import kernels, presets
from .controller import SparsityController, get_controller
from .convert import convert, converted, is_converted, revert
from .copies import reverted_copy
from .flops import Summary, summary
from .metering import Meter, MeterReport
from .plan import Plan, plan
from .schedules import (
    BarSchedule,
    ConstantSchedule,
    CosineSchedule,
    LambdaSchedule,
    LinearSchedule,
    Schedule,
    SequentialSchedule,
    StepSchedule,
)
from .status import Status, status
from .temporary import dense, paused, sparsity

__version__ = "0.1.0"

__all__ = [
    "BarSchedule",
    "ConstantSchedule",
    "CosineSchedule",
    "LambdaSchedule",
    "LinearSchedule",
    "Meter",
    "MeterReport",
    "Plan",
    "Schedule",
    "SequentialSchedule",
    "SparsityController",
    "Status",
    "StepSchedule",
    "Summary",
    "convert",
    "converted",
    "dense",
    "get_controller",
    "is_converted",
    "kernels",
    "paused",
    "plan",
    "presets",
    "revert",
    "reverted_copy",
    "sparsity",
    "status",
    "summary",
]
