"""Fixtures of the tests of the C functions."""

import native_checks
import pytest

from ssprop_patch.ops import native
from ssprop_patch.ops.native import conv


@pytest.fixture(params=[1, 2, 5])
def threads(request, monkeypatch):
    """Set the number of threads for tensors of any size."""
    for module in (native.channel_ops, native.batch_norm, native.rows, conv):
        monkeypatch.setattr(module, "threads_for", lambda *args: request.param)


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """Forget what this process compiled and how, before and after; the cache folder is empty."""
    monkeypatch.delenv("SSPROP_PATCH_NATIVE", raising=False)
    monkeypatch.setenv("SSPROP_PATCH_CFLAGS", "-O0")  # compiles in a moment
    monkeypatch.setenv("SSPROP_PATCH_CACHE", str(tmp_path / "cache"))
    native_checks.forget()
    yield tmp_path / "cache"
    native_checks.forget()
