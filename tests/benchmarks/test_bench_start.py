"""benchmarks/bench_start.py: processes that find C functions compiled, or do not."""

from __future__ import annotations

import bench_start
import pytest
from networks import Network

from ssprop_patch.ops.native import build

NETWORK = Network.parse("test_resnet:2:64")


@pytest.mark.skipif(build.find_compiler() is None, reason="there is no C compiler")
def test_only_the_cold_process_compiles(monkeypatch, tmp_path):
    log, script = tmp_path / "log", tmp_path / "compiler"
    real = " ".join(build.find_compiler())
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo x >> {log}\nexec {real} "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("SSPROP_PATCH_CFLAGS", "-O0")
    calls = []
    measured = bench_start.extra_seconds

    def spy(network, rate, cache):
        found = measured(network, rate, cache)
        calls.append(len(log.read_text().split()) if log.exists() else 0)
        return found

    monkeypatch.setattr(bench_start, "extra_seconds", spy)
    found = bench_start.measure(NETWORK, 0.8, 1)
    assert calls == [0, 2, 2]  # dense, cold, warm
    assert all(usual > 0 for ((usual, _),) in found.values())


def test_the_table(monkeypatch, capsys):
    seconds = iter([(0.1, 0.2), (0.05, 3.0), (0.05, 0.25)])
    monkeypatch.setattr(bench_start, "extra_seconds", lambda *args: next(seconds))
    assert bench_start.main(["--iterations", "1"]) == 0
    assert "warm" in (out := capsys.readouterr().out) and "0.250" in out
