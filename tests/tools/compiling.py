"""What tests under torch.compile share: a fresh compiler each, and the one that users run."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

# Inductor writes C++ and needs what compiles it; aot_eager traces all the same.
CAN_BUILD = shutil.which(os.environ.get("CXX", "g++")) and Path(
    sysconfig.get_path("include"), "Python.h"
).exists()
INDUCTOR = "inductor" if CAN_BUILD else "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler():
    """For the modules that import it: nothing compiled before counts."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
