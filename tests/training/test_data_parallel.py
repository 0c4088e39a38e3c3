"""DataParallel, which needs no GPU to be a wrapper; and what it does with several."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import ssprop_patch as ssp

from .by_hand import assert_same, batch, by_step, net, ordinary, run, run_by_hand


@pytest.mark.parametrize("when", ["before", "after"])
def test_data_parallel_without_a_gpu(when):
    """There it is a wrapper and no more; its names carry it."""
    plain = nn.DataParallel(net())
    model = copy.deepcopy(plain)
    if when == "before":
        ssp.convert(model.module, by_step())
    else:
        ssp.convert(model, by_step())
    assert list(model.state_dict()) == list(plain.state_dict())
    expected = run_by_hand(plain, ordinary)
    assert_same(run(model, ordinary), expected)
    assert ssp.get_controller(model) is ssp.get_controller(model.module)
    assert ssp.get_controller(model).t == 2


@pytest.mark.parametrize("name", ["test_efficientnet_gn", "test_nfnet"])
def test_replicas_in_threads(name):
    """What DataParallel does on several devices: shallow copies of every module, a thread each."""
    model = ssp.convert(net(name), 0.5)
    chunks = [batch(i)[0] for i in range(4)]

    def expected_of(chunk):
        return torch.autograd.grad(model(chunk).square().sum(), list(model.parameters()))

    expected = [torch.stack(g).sum(0) for g in zip(*map(expected_of, chunks), strict=True)]
    replicas = [replica_of(model) for _ in chunks]
    assert all(ssp.get_controller(r) is ssp.get_controller(model) for r in replicas)
    outputs = threaded(replicas, chunks)
    sum(y.square().sum() for y in outputs).backward()
    for p, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-10, atol=1e-12)


def replica_of(model):
    """As torch.nn.parallel.replicate makes one, but on the same device."""
    copies = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else copies[child]
        for name, p in module._parameters.items():
            if p is None:
                twin._parameters[name] = None
            else:
                setattr(twin, name, p.view_as(p))  # not a leaf: its gradient goes to the original
    return copies[model]


def threaded(replicas, chunks):
    """As torch.nn.parallel.parallel_apply, which wants devices."""
    with ThreadPoolExecutor(len(replicas)) as pool:
        return list(pool.map(lambda replica, chunk: replica(chunk), replicas, chunks))
