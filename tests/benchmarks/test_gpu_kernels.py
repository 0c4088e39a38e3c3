"""benchmarks/gpu.py's first part: kernels, layers and networks that are wrong are seen."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import gpu
import pytest
import torch
from gpu_run import kernels

from ssprop_patch.ops import channel_ops, triton_kernels

CPU = torch.device("cpu")


def sums(t):
    return t.float().sum((0, 2, 3))


def row(v):
    return v.view(-1, 1, 1)


def xhat(y, mean, invstd):
    return (y.float() - row(mean)) * row(invstd)


def behind(dz, relu_out):
    return torch.where(relu_out > 0, dz.float(), 0)


def dy(dz, y, mean, invstd, sum_dz, sum_dz_xhat, relu_out):
    n = y.numel() // y.shape[1]
    inner = behind(dz, relu_out) - row(sum_dz / n) - xhat(y, mean, invstd) * row(sum_dz_xhat / n)
    return inner * row(invstd)


#: In plain torch, what the Triton kernels compute.
STAND_INS = {
    "channel_sums": lambda t, order: sums(t.float().abs() ** order),
    "take_channels": lambda t, index: t[:, index],
    "norm_sums": lambda dz, y, mean, invstd, out: (
        sums(behind(dz, out)),
        sums(behind(dz, out) * xhat(y, mean, invstd)),
        sums(behind(dz, out).square()),
    ),
    "norm_grad_sums": lambda *args: sums(dy(*args).abs()),
    "norm_input_grad": lambda dz, y, weight, mean, invstd, a, b, index, out: (
        dy(dz, y, mean, invstd, a, b, out) * row(weight)
    )[:, index].to(y.dtype),
}
#: Ways in which a kernel may be wrong, of its result.
WRONG = {
    "channel_sums": lambda found: found * 1.0001,
    "take_channels": lambda found: found.flip(1),
    "norm_sums": lambda found: (found[0], found[1], found[1]),
    "norm_grad_sums": lambda found: found[:-1],
    "norm_input_grad": lambda found: torch.full_like(found, float("nan")),
}


@pytest.fixture
def stand_ins(monkeypatch):
    """Kernels that run on the CPU, and nothing but kernels to compare."""
    monkeypatch.setattr(kernels, "why_not", lambda device: "")
    monkeypatch.setattr(gpu, "why_not", lambda device: "")
    monkeypatch.setattr(kernels, "_LAYERS", {})
    monkeypatch.setattr(kernels, "_network", lambda *_: 0.0)
    for name, function in STAND_INS.items():
        monkeypatch.setattr(triton_kernels, name, function)


def test_every_kernel_is_checked():
    functions = set(triton_kernels.__all__) - {"is_available", "why_unavailable"}
    assert functions == set(kernels.KERNELS) == set(STAND_INS) == set(WRONG)


@pytest.mark.usefixtures("stand_ins")
def test_right_kernels_are_right(capsys):
    assert gpu.check_kernels(CPU)
    out = capsys.readouterr().out
    assert "24 of 24 comparisons are right" in out  # with the networks
    for dtype, layout in itertools.product(
        ("float32", "bfloat16"), ("contiguous_format", "channels_last")
    ):
        assert f"norm_input_grad, {dtype}, {layout}" in out


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_wrong_kernel_makes_the_exit_status_1(name, monkeypatch, capsys):
    right = STAND_INS[name]
    monkeypatch.setattr(triton_kernels, name, lambda *args: WRONG[name](right(*args)))
    asked = []

    def run(args, seconds, kernels):
        asked.append(kernels)
        return SimpleNamespace(measure=lambda: True, rows=[], failed=[])

    monkeypatch.setattr(gpu, "Run", run)
    assert gpu.main(["--device", "cpu", "--network", "unet:1:32"]) == 1
    out = capsys.readouterr().out
    assert f"WRONG  {name}, float32, channels_last" in out
    assert f"WRONG  {name}, bfloat16, contiguous_format" in out
    assert "20 of 24 comparisons are right" in out
    assert asked == [False]  # the others are timed without the kernels


@pytest.mark.usefixtures("stand_ins")
def test_a_kernel_that_raises_is_wrong_and_the_others_are_checked(monkeypatch, capsys):
    monkeypatch.setattr(triton_kernels, "norm_sums", lambda *_: 1 / 0)
    assert not gpu.check_kernels(CPU)
    assert "20 of 24 comparisons are right" in capsys.readouterr().out


def test_layers_and_a_network_are_compared(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "DTYPES", (torch.float32,))
    assert gpu.check_kernels(CPU)
    out = capsys.readouterr().out
    assert "not checked, no CUDA device" in out or "triton is not installed" in out
    assert "14 of 14 comparisons are right" in out

    right = kernels.reference.sparse_backward

    def one_channel_more(dy, x, w, params, k):
        return right(dy, x, w, params, k + 1)

    monkeypatch.setattr(kernels.reference, "sparse_backward", one_channel_more)
    assert not gpu.check_kernels(CPU)
    out = capsys.readouterr().out
    assert "2 of 14 comparisons are right" in out and "WRONG  depthwise" in out


def test_kernels_are_used_within_and_not_after():
    before = channel_ops._TRITON
    with kernels.triton(True):
        assert channel_ops._TRITON is True
        with kernels.triton(False):
            assert channel_ops._TRITON is False
    assert channel_ops._TRITON is before
