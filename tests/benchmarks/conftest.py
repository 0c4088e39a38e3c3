"""Fixtures of several tests of the benchmarks."""

from importlib.util import find_spec

import pytest
import torch

if not all(map(find_spec, ("diffusers", "torchmetrics", "scipy"))):
    collect_ignore_glob = ["test_ddpm_*.py"]


@pytest.fixture
def double():
    """Everything in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
