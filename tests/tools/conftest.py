"""A fresh compiler for each test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
