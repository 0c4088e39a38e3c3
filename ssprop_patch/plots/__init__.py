"""Pictures of a schedule, of FLOPs, of runs, and of which channels are kept.

Each function returns a ``matplotlib.figure.Figure``, made for the width of a README: a notebook
shows it, ``figure.savefig("x.png")`` and ``"x.svg"`` write it. ``ax=`` draws into axes of your
own, in their style, and returns their figure. matplotlib comes with
``pip install "ssprop_patch[plot]"``; pyplot, and so the state of a notebook, is left alone.
"""

from __future__ import annotations

from . import style
from .drop_rate import schedule
from .kept_channels import channels
from .layer_flops import flops_per_layer
from .runs import accuracy

__all__ = ["accuracy", "channels", "flops_per_layer", "schedule", "style"]
