"""Which tensors the C functions take; all others are torch's."""

import pytest
import torch
from native_checks import needs_compiler
from torch._subclasses import FakeTensorMode

from ssprop_patch.ops import channel_ops, native


@needs_compiler
def test_ordinary_tensors_are_taken():
    t = torch.randn(2, 3, 4, 4)
    for taken in (
        t,
        t.double(),
        t.contiguous(memory_format=torch.channels_last),
        t[:1],
        torch.nn.Parameter(t).detach(),
        t.flatten(1),
    ):
        assert native.is_available(taken)
        assert channel_ops._kernels(taken) is native


def untaken():
    t = torch.randn(2, 3, 4, 4)
    yield "half precision", t.bfloat16()
    yield "half precision", t.half()
    yield "integers", t.long()
    yield "strides", t[:, :, ::2]
    yield "strides", t[..., :1].expand_as(t)
    yield "strides", t[:, ::2]
    yield "strides", t[:, :, 0, 0]
    yield "meta", t.to("meta")
    yield "fake", FakeTensorMode().from_tensor(t)
    yield "negative view", torch.complex(t, t).conj().imag
    yield "sparse", t.to_sparse()
    yield "asked for its gradient", t.requires_grad_()


@pytest.mark.parametrize("why, t", list(untaken()), ids=lambda v: v if isinstance(v, str) else "")
def test_others_are_not(why, t):
    assert not native.is_available(t)


def test_not_inside_of_a_transform():
    def f(t):
        assert not native.is_available(t)
        return t.sum()

    t = torch.randn(2, 3, 4, 4)
    torch.func.vmap(f)(t)
    torch.func.grad(f)(t)
