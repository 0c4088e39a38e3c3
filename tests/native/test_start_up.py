"""Processes that start together compile once; nobody waits for a process that is gone."""

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from native_checks import forget, needs_compiler

import ssprop_patch as ssp
from ssprop_patch.ops import channel_ops, native
from ssprop_patch.ops.native import build, conv, lock, tensors

pytestmark = needs_compiler

# What one process does at its first sparse backward.
USE = """
import sys
from ssprop_patch.ops.native import build
print("ready", flush=True)
sys.stdin.readline()
for name in ("passes", "conv"):
    print(build.library("float", name)._name)
"""
HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def compiler(fresh_build, monkeypatch, tmp_path):
    """The real one, slowed down; the file in which each of its calls leaves a line."""
    log, script = tmp_path / "log", tmp_path / "compiler"
    real = " ".join(build.find_compiler())
    script.write_text(f"""#!/bin/sh
[ "$1" = --version ] && exec {real} --version
echo called >> {log}
sleep 0.3
exec {real} "$@"
""")
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    return log


def calls(log):
    return len(log.read_text().split()) if log.exists() else 0


@contextlib.contextmanager
def held_by_another(folder):
    """Another process holds the lock of a cache folder."""
    folder.mkdir(mode=0o700, exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(folder / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


# --- several processes --------------------------------------------------------------------------


def start_together(number, **variables):
    """Return what processes print, and say, that use the functions at the same time."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", USE],
            env={**os.environ, "LOCAL_RANK": str(rank), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:  # before any of them is waited for
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=300) for process in started]
    assert not any(process.returncode for process in started), ended
    return [out.split() for out, _ in ended], "".join(said for _, said in ended)


def test_processes_that_start_together_compile_once_and_say_so_once(compiler, fresh_build):
    printed, said = start_together(3)
    assert calls(compiler) == 2  # passes and conv
    assert all(len(names) == 2 and names == printed[0] for names in printed)
    assert all(Path(name).parent == fresh_build for name in printed[0])
    (line,) = said.splitlines()
    assert "compiles its C functions" in line and f"once; they are kept in {fresh_build}" in line

    printed, said = start_together(1)
    assert calls(compiler) == 2 and not said


def test_where_nothing_can_be_kept_one_rank_says_so(compiler):
    printed, said = start_together(2, SSPROP_PATCH_CACHE="0")
    assert calls(compiler) == 4 and all(len(names) == 2 for names in printed)
    (line,) = said.splitlines()
    assert "in every process" in line


def test_the_line_goes_where_logging_sends_it(compiler, caplog):
    with caplog.at_level(logging.ERROR, "ssprop_patch"):
        build.library("float")
    assert not caplog.records
    forget()
    with caplog.at_level(logging.WARNING):
        assert build.library("double")
        build.library("double", "conv")
    assert [record.name for record in caplog.records] == ["ssprop_patch.ops.native.build"]


# --- the lock -----------------------------------------------------------------------------------


def test_the_lock_of_a_killed_process_is_no_ones(compiler, fresh_build):
    with held_by_another(fresh_build) as other:
        threading.Timer(0.5, other.send_signal, [signal.SIGKILL]).start()
        begin = time.monotonic()
        assert build.library("float") is not None
        assert time.monotonic() - begin >= 0.5
    assert calls(compiler) == 2 and (fresh_build / "lock").exists()
    forget()
    assert build.library("float") is not None and calls(compiler) == 2


def test_a_process_that_holds_it_for_ever_is_not_waited_for(fresh_build):
    with held_by_another(fresh_build), lock.one_at_a_time(fresh_build, 0.1) as held:
        assert not held


def test_without_the_lock_it_is_compiled_all_the_same(compiler, fresh_build, monkeypatch):
    monkeypatch.setattr(build, "_PATIENCE", 0.1)
    with held_by_another(fresh_build):
        assert build.library("float") is not None
    assert calls(compiler) == 2


def test_what_is_kept_needs_no_lock(compiler, fresh_build):
    assert build.library("float") is not None
    forget()
    with held_by_another(fresh_build):
        assert build.library("float") is not None
    assert calls(compiler) == 2


def test_a_lock_is_released_though_a_forked_process_has_it_open(fresh_build):
    fresh_build.mkdir()
    with lock.one_at_a_time(fresh_build, 1) as held:
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        assert held
    try:
        with lock.one_at_a_time(fresh_build, 0) as held:
            assert held
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("step", ["open", "flock"])
def test_a_folder_in_which_nothing_can_be_locked(step, compiler, fresh_build, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("read-only file system, or no locks available")

    with monkeypatch.context() as patch:
        patch.setattr({"open": lock.os, "flock": fcntl}[step], step, refuse)
        with lock.one_at_a_time(fresh_build, 60) as held:
            assert not held


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(compiler, fresh_build):
    fresh_build.mkdir(mode=0o500)
    assert build.library("float") is not None and not list(fresh_build.iterdir())


# --- in the background --------------------------------------------------------------------------


@pytest.fixture
def background(compiler, monkeypatch):
    monkeypatch.setenv("SSPROP_PATCH_NATIVE", "background")
    yield compiler
    ssp.kernels.clear()
    for thread in build._compiling.values():
        if thread.is_alive():
            thread.join()


def test_in_the_background_torchs_operations_run_until_it_is_compiled(background):
    t = torch.randn(2, 3, 4, 4)
    assert build.library("float") is None and native.are_compiling()
    assert not native.is_available(t)
    torch.testing.assert_close(channel_ops.channel_sum(t, 1), t.abs().sum((0, 2, 3)))
    build._compiling["float", "passes"].join()
    assert build.library("float") is not None and not native.are_compiling()
    assert native.is_available(t) and calls(background) == 2


def test_what_is_kept_is_there_at_once(background):
    assert native.why_unavailable() is None  # which waits
    forget()
    assert build.library("float") is not None and calls(background) == 2


def test_who_asks_for_the_same_bits_waits(background):
    torch.use_deterministic_algorithms(True)
    try:
        assert build.library("float") is not None
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_compiler_that_fails_in_the_background_is_warned_of(background, monkeypatch):
    monkeypatch.setenv("CC", "false")
    assert build.library("float") is None
    build._compiling["float", "passes"].join()
    with pytest.warns(UserWarning, match="could not compile"):
        assert build.library("float") is None


def test_without_a_compiler_there_is_nothing_in_the_background(background, monkeypatch):
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert build.library("float") is None and not native.are_compiling()


def test_kernels_are_not_measured_before_all_are_there(background, monkeypatch):
    conv = torch.nn.Conv2d(4, 8, 3)
    x = torch.randn(2, 4, 6, 6)
    ssp.convert(conv, 0.5)
    ssp.kernels.clear()
    monkeypatch.setattr(ssp.kernels, "benchmark", True)
    assert build.library("float") is None
    conv(x).sum().backward()
    assert not ssp.kernels.choices()
    for thread in build._compiling.values():
        thread.join()
    conv(x).sum().backward()
    assert ssp.kernels.choices()


def network():
    torch.manual_seed(0)
    layers = []
    for inputs in (3, 16):  # the norm of 2**18 elements or more is lazy, and its ReLU
        layers += [torch.nn.Conv2d(inputs, 16, 3, padding=1), torch.nn.BatchNorm2d(16)]
        layers.append(torch.nn.ReLU())
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(16, 8, 3)).double()


@pytest.mark.parametrize("selection, remainder", [("l1", None), ("l2", "coarse")])
def test_the_functions_may_turn_up_anywhere_in_a_backward(selection, remainder, monkeypatch):
    assert build.library("double") and build.library("double", "conv")
    x, asked, first = torch.randn(5, 3, 64, 64).double(), 0, 0

    def library(*args):
        nonlocal asked
        asked += 1
        return build.library(*args) if asked > first else None

    for module in (tensors, conv):
        monkeypatch.setattr(module, "library", library)
    expected = None
    while asked >= first:  # until they turn up after the last time that they are asked for
        model, asked = network(), 0
        ssp.convert(model, 0.6, selection=selection, remainder=remainder)
        model(x).square().sum().backward()
        grads = [p.grad for p in model.parameters()]
        expected = expected or grads
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-9)
        first += 1
    assert first > 10
