"""benchmarks/plot_meter.py: the pictures of what meter_run.py counted, from its files."""

from __future__ import annotations

import shutil

import plot_meter
import pytest
from PIL import Image

from . import BENCHMARKS

COMMITTED = BENCHMARKS / "results" / "meter"


def test_the_committed_pictures_can_be_drawn_again_from_the_committed_counts(tmp_path, capsys):
    for name in ("report.json", "channels.json"):
        shutil.copy(COMMITTED / name, tmp_path)
    assert plot_meter.main([str(tmp_path)]) == 0
    for name in ("flops.png", "channels.png"):
        size = Image.open(tmp_path / name).size
        assert size[0] == 1245 and size == Image.open(COMMITTED / name).size
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        plot_meter.main([str(tmp_path)])
    assert stop.value.code == 2 and "'layers'" in capsys.readouterr().err
