"""``env``: what a bug report needs, whatever the machine lacks."""

from __future__ import annotations

import json
import os

import pytest
import torch

import ssprop_patch as ssp
from ssprop_patch.cli import env


@pytest.fixture(autouse=True)
def counter(monkeypatch):
    monkeypatch.setattr(env, "find_counter", lambda: (None, "no counter in this test"))


def lines_of(text):
    return dict(line.split(":", 1) for line in text.splitlines())


def test_it_says_versions_backends_and_the_reasons(printed, monkeypatch):
    monkeypatch.setenv("SSPROP_PATCH_TRITON", "0")
    text = printed("env")
    found = {name: value.strip() for name, value in lines_of(text).items()}
    assert found["ssprop_patch"].startswith(f"{ssp.__version__}, ")
    assert found["torch"].startswith(f"{torch.__version__}, ")
    assert f"{torch.get_num_threads()} thread" in found["torch"]
    assert torch.backends.cpu.get_cpu_capability() in found["processor"]
    assert found["C functions"] == ssp.kernels.backends()["C functions"]
    assert found["Triton kernels"] == "off: SSPROP_PATCH_TRITON is not 1"
    assert found["energy counters"].startswith("none: no counter in this test")
    assert "SSPROP_PATCH_TRITON=0" in found["environment"]
    assert json.loads(printed("env", "--json")) == found


def test_the_cache_and_the_compiler_are_those_in_use(printed, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSPROP_PATCH_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    found = lines_of(printed("env"))
    assert found["cache"].strip() == f"{os.path.join('~', 'own')}, 0 libraries, 0.0 MB"
    assert found["C compiler"].strip().startswith("no-such-compiler -O1: ")
    assert str(tmp_path) not in printed("env")
    monkeypatch.setenv("SSPROP_PATCH_CACHE", "0")
    assert lines_of(printed("env"))["cache"].strip() == "none: SSPROP_PATCH_CACHE is 0"


def test_what_cannot_be_found_out_does_not_keep_the_rest_back(printed, monkeypatch):
    def broken(*args):
        raise RuntimeError("driver\n  too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    found = lines_of(printed("env"))
    assert found["CUDA devices"].strip() == "unknown: RuntimeError: driver too old"
    assert found["libraries"].strip()
