"""Bytes that ``compress`` saves: as the kernel counts what two and four processes send."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compressed_bytes.py")

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="the system does not count what a process writes"
)


@pytest.mark.parametrize("processes", [2, 4])
def test_what_is_sent_shrinks_as_the_gradient_does(processes, tmp_path):
    command = [sys.executable, str(SCRIPT), str(processes), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == processes
    for written_whole, written_small, sent, whole, same in found:
        assert same  # the gradients, to rounding
        assert sent < 0.25 * whole
        assert written_small / written_whole == pytest.approx(sent / whole, rel=0.05)
    # A ring: each process sends every byte but its own share twice.
    total = sum(each[0] for each in found) / processes
    assert total == pytest.approx(2 * (processes - 1) / processes * found[0][3], rel=0.05)
