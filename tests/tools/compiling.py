"""The compiler that users run, where it can be run."""

import os
import shutil
import sysconfig
from pathlib import Path

# Inductor writes C++ and needs what compiles it; aot_eager traces all the same.
CAN_BUILD = (
    shutil.which(os.environ.get("CXX", "g++"))
    and Path(sysconfig.get_path("include"), "Python.h").exists()
)
INDUCTOR = "inductor" if CAN_BUILD else "aot_eager"
