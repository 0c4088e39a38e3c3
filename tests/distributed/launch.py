"""Checks that need two processes: written as functions, run at once, told apart in pytest.

A file of checks registers functions with :class:`Checks`. Two gloo processes, which are started
once, call those of all files in turn and write down how each one ended; test_two_processes.py has
one test a check. The second process is a fork of the first, so that torch is imported once.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest

RANKS = 2
TESTS = Path(__file__).parent.parent
PATIENCE = 120  # seconds that one process waits for the other, before both give up


class Unavailable(Exception):
    """Torch itself cannot do here what a check is about."""


class Checks:
    """The checks of one file, by name."""

    def __init__(self):
        self.functions = {}
        self.before = []  # called before there is a process group

    def __call__(self, function):
        """Register a check; a decorator."""
        self.functions[function.__name__] = function
        return function

    def __iter__(self):
        return iter(self.functions)


def main(names):
    """Run all checks of these modules: in this process and in a fork of it."""
    import torch

    from ssprop_patch.ops.native import build

    torch.set_num_threads(1)
    files = {name: importlib.import_module(name).check for name in names}
    for name in ("passes", "conv"):
        build.library("double", name)  # once for both
    second = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(not second))
    _run(files, int(not second))
    if second:
        _, status = os.waitpid(second, 0)
        if status:
            sys.exit(f"the second process ended with {os.waitstatus_to_exitcode(status)}")


def _run(files, rank):
    """Run all checks as one of the ranks."""
    import torch
    import torch.distributed as dist

    outcomes = Path(os.environ["OUTCOMES"])
    for check in files.values():
        for function in check.before:
            function()
    dist.init_process_group(
        "gloo",
        init_method=(outcomes.resolve() / "store").as_uri(),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=PATIENCE),
    )
    for file, check in files.items():
        for name, function in check.functions.items():
            torch.manual_seed(0)
            outcome = {"error": "", "unavailable": ""}
            try:
                function()
            except Unavailable as reason:
                outcome["unavailable"] = str(reason)
            except Exception:
                outcome["error"] = traceback.format_exc()
            _write(outcomes / f"{file}.{name}.{rank}", outcome)
            # By files, not a barrier: a process that failed half-way has left the other in the
            # middle of a collective, and the next one would be taken for its answer.
            if not _all_ended(outcomes, f"{file}.{name}"):
                sys.exit(f"{name}: the other process did not come to its end")
    dist.destroy_process_group()


def _write(path, outcome):
    unfinished = path.with_suffix(path.suffix + ".unfinished")
    unfinished.write_text(json.dumps(outcome))
    unfinished.rename(path)


def _all_ended(outcomes, name):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if all((outcomes / f"{name}.{rank}").exists() for rank in range(RANKS)):
            return True
        time.sleep(0.005)
    return False


class Outcomes:
    """How the checks ended."""

    def __init__(self, folder, returncode, output):
        self.folder, self.returncode, self.output = folder, returncode, output

    def assert_ended_well(self):
        """Fail unless both processes came to their end."""
        assert self.returncode == 0, self.output[-4000:]

    def assert_passed(self, name):
        """Fail as the check did, with what each process says."""
        outcomes = []
        for rank in range(RANKS):
            path = self.folder / f"{name}.{rank}"
            assert path.exists(), f"rank {rank} never ended {name}:\n{self.output[-4000:]}"
            outcomes.append(json.loads(path.read_text()))
            assert not outcomes[-1]["error"], f"rank {rank}:\n{outcomes[-1]['error']}"
        if all(outcome["unavailable"] for outcome in outcomes):
            pytest.skip(outcomes[0]["unavailable"])


def launch(names, folder):
    """Run the checks of these modules in two processes; return their Outcomes."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OUTCOMES": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    env["WORLD_SIZE"] = str(RANKS)
    code = "import sys; from distributed.launch import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *names]
    said = folder / "output"
    with said.open("w") as output:  # not torchrun, another process that would import torch
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=600)
        finally:
            with contextlib.suppress(ProcessLookupError):  # both have ended
                os.killpg(process.pid, signal.SIGKILL)
    return Outcomes(folder, code, said.read_text())
