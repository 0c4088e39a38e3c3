"""A meter under DistributedDataParallel, on two processes; see ddp_checks.py."""

import os
import subprocess
import sys

import pytest
from distributed.launch import RANKS, TESTS, Outcomes

from metering.ddp_checks import check


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OUTCOMES": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS), "-m", "metering.ddp_checks"]
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    return Outcomes(folder, done.returncode, done.stdout)


@pytest.mark.parametrize("name", list(check))
def test_with_two_processes(outcomes, name):
    outcomes.assert_passed(name)


def test_both_processes_end_well(outcomes):
    outcomes.assert_ended_well()
