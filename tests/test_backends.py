"""Which backends are on, and why others are off."""

from types import SimpleNamespace

import pytest
import torch

import ssprop_patch as ssp
from ssprop_patch.ops import channel_ops, native, triton_kernels


@pytest.mark.parametrize("why", [None, "no C compiler was found"])
def test_backends_say_why_they_are_off(why, monkeypatch):
    # raising=False until native has it
    monkeypatch.setattr(native, "why_unavailable", lambda: why, raising=False)
    monkeypatch.delenv("SSPROP_PATCH_TRITON", raising=False)
    assert ssp.kernels.backends() == {
        "C functions": "on" if why is None else f"off: {why}",
        "Triton kernels": "off: SSPROP_PATCH_TRITON is not 1",
    }


@pytest.mark.parametrize(
    "asked, cuda, spec, why",
    [
        ("0", True, True, "SSPROP_PATCH_TRITON is not 1"),
        ("1", False, True, "no CUDA device"),
        ("1", True, False, "triton is not installed"),
        ("1", True, True, None),
    ],
)
def test_triton_kernels_say_why_they_are_off(asked, cuda, spec, why, monkeypatch):
    monkeypatch.setenv("SSPROP_PATCH_TRITON", asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True if spec else None)
    assert triton_kernels.why_unavailable() == why


@pytest.mark.parametrize("asked", [False, True])
def test_triton_kernels_are_used_only_where_they_are_asked_for(asked, monkeypatch):
    kernels = SimpleNamespace(is_available=lambda t: True)
    monkeypatch.setattr(channel_ops, "_TRITON", asked)
    monkeypatch.setattr(channel_ops, "_triton_kernels", lambda: kernels)
    on_a_gpu = SimpleNamespace(is_cpu=False, is_cuda=True)
    assert channel_ops._kernels(on_a_gpu) is (kernels if asked else None)
    assert channel_ops.may_split_relu("cuda") is asked
