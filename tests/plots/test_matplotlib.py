"""matplotlib is imported late, its state stays as it is, and where it is missing one says so."""

import subprocess
import sys
from unittest import mock

import pytest

from ssprop_patch import plots


def test_matplotlib_is_imported_when_asked_for_and_pyplot_never(tmp_path):
    code = (
        "import sys, ssprop_patch as ssp; from ssprop_patch import plots; "
        "assert 'matplotlib' not in sys.modules; plots.schedule(0.5, 3).savefig(sys.argv[1]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True)


def test_without_matplotlib_the_extra_is_named():
    hidden = {"matplotlib": None, "matplotlib.figure": None}
    with mock.patch.dict(sys.modules, hidden), pytest.raises(ImportError) as error:
        plots.schedule(0.5, 3)
    assert 'pip install "ssprop_patch[plot]"' in str(error.value)


def test_what_is_public():
    names = ["accuracy", "channels", "flops_per_layer", "schedule", "style"]
    assert sorted(plots.__all__) == names and set(names) <= set(dir(plots))
    assert callable(plots.schedule) and callable(plots.channels)  # no modules of that name
    assert all(hasattr(plots.style, name) for name in plots.style.__all__)
