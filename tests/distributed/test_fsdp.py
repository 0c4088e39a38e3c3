"""Converted networks under FSDP, on two processes; see fsdp_checks.py."""

import pytest

from distributed.fsdp_checks import check
from distributed.launch import launch


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return launch("fsdp_checks", tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("name", list(check))
def test_with_two_processes(outcomes, name):
    outcomes.assert_passed(name)


def test_both_processes_end_well(outcomes):
    outcomes.assert_ended_well()
