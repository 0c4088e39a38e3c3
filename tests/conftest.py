"""What all tests share: one thread, one seed, the same examples every time, no downloads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks for pretrained weights fails here
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import pytest
import torch
from hypothesis import settings

# Tensors here are small: a second thread, waiting for work, makes them several times slower.
torch.set_num_threads(1)

# The same examples in every run: what fails in one place fails in all.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
