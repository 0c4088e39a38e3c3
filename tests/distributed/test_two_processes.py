"""DistributedDataParallel, FSDP, sync_selection and meters on two processes; see *_checks.py."""

import pytest
from metering import ddp_checks as meter_checks

from distributed import compress_checks, ddp_checks, fsdp_checks, sync_checks
from distributed.launch import launch

# The last one of sync_checks ends the process group.
FILES = (ddp_checks, compress_checks, fsdp_checks, meter_checks, sync_checks)
NAMES = [f"{file.__name__}.{name}" for file in FILES for name in file.check]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return launch([file.__name__ for file in FILES], tmp_path_factory.mktemp("outcomes"))


@pytest.mark.parametrize("name", NAMES)
def test_with_two_processes(outcomes, name):
    outcomes.assert_passed(name)


def test_both_processes_end_well(outcomes):
    outcomes.assert_ended_well()
