"""What the Triton kernels refuse, and who is asked first."""

import subprocess
import sys

import pytest
import torch

from ssprop_patch.ops import triton_kernels

from .places import needs_gpu


def test_an_order_that_is_neither_1_nor_2():
    with pytest.raises(ValueError, match=r"order must be 1 .* got 3"):
        triton_kernels.channel_sums(torch.ones(2, 3), 3)


@pytest.mark.parametrize(
    "t",
    [
        torch.ones(2, 3, 4, dtype=torch.int32),
        torch.ones(3),
        torch.ones(1, 1, 1, 1, 1, 1),
        torch.ones(2, 6, 4)[:, ::2],
        torch.ones(1).expand(2, 3, 4),
        torch.ones(3, 2).t(),
    ],
)
def test_tensors_that_they_do_not_take(t):
    with pytest.raises(ValueError, match=r"^t must be"):
        triton_kernels.take_channels(t, torch.tensor([0]))


def test_arguments_that_do_not_fit():
    y, c = torch.ones(2, 3, 4), torch.ones(3)
    with pytest.raises(ValueError, match=r"dz must .* y's shape \(2, 3, 4\), got .* \(2, 3, 5\)"):
        triton_kernels.norm_sums(torch.ones(2, 3, 5), y, c, c)
    with pytest.raises(ValueError, match=r"invstd must .* shape \(3,\), got \(4,\)"):
        triton_kernels.norm_sums(y, y, c, torch.ones(4))
    with pytest.raises(ValueError, match=r"weight must .* shape \(3,\), got \(1,\)"):
        triton_kernels.norm_input_grad(y, y, torch.ones(1), c, c, c, c, torch.tensor([0]))


def test_not_available_on_the_cpu():
    assert not triton_kernels.is_available(torch.ones(2, 3, 4))


@needs_gpu
def test_available_on_a_gpu_for_what_they_take():
    t = torch.ones(2, 6, 4, device="cuda")
    assert triton_kernels.is_available(t)
    assert triton_kernels.is_available(t.movedim(-1, 1))
    assert not triton_kernels.is_available(t[:, ::2])
    assert not triton_kernels.is_available(t.int())
    t.requires_grad_()
    assert not triton_kernels.is_available(t)
    with torch.no_grad():
        assert triton_kernels.is_available(t)


def test_the_kernels_are_imported_by_the_first_call():
    code = """
import sys, torch, ssprop_patch.ops.triton_kernels as k
k.is_available(torch.ones(2, 3))
k.channel_sums(torch.ones(0, 3), 1)
assert "ssprop_patch.ops.triton_kernels.kernels" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
