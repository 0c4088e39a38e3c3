"""A fresh compiler for each test."""

import pytest
import torch

from ssprop_patch.schedule import traced_rates


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    traced_rates._traced.clear()
    yield
    torch._dynamo.reset()
