"""Trains with and without ``compress`` on some gloo processes; prints what each of them sent.

Started by test_compressed_bytes.py: ``python compressed_bytes.py PROCESSES STORE``.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import ssprop_patch as ssp
from ssprop_patch.integrations.ddp import compress

STEPS = (5, 6, 7)  # none of which refreshes directions


def written():
    """Bytes that this process has written so far, to sockets too, as the kernel counts them."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("wchar"))


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.Tanh(), nn.Conv2d(64, 96, 3), nn.Tanh()]
    return nn.Sequential(*layers, nn.Conv2d(96, 256, 1), nn.AdaptiveAvgPool2d(1)).double()


def measure(compressed):
    """Bytes written in the steps that count, those handed to all-reduces, and the gradients."""
    net = ssp.convert(network(), 0.8, selection="principal", sync_selection=True)
    ddp = DDP(net)
    state = compress(ddp) if compressed else None
    generator = torch.Generator().manual_seed(dist.get_rank())
    bytes_before = 0
    for step in range(STEPS[-1] + 1):
        if step == STEPS[0]:
            dist.barrier()
            bytes_before = written()
            if state is not None:
                state.bytes_sent = state.bytes_whole = 0
        x = torch.randn(2, 3, 9, 9, generator=generator, dtype=torch.float64)
        net.zero_grad()
        ddp(x).square().sum().backward()
    grads = [p.grad for p in net.parameters()]
    counts = None if state is None else (state.bytes_sent, state.bytes_whole)
    return written() - bytes_before, counts, grads


def main(processes, store):
    torch.set_num_threads(1)
    rank = next((rank for rank in range(1, processes) if not os.fork()), 0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    whole, _, expected = measure(False)
    small, counts, grads = measure(True)
    same = all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(grads, expected, strict=True)
    )
    found = [None] * processes
    dist.all_gather_object(found, (whole, small, *counts, same))
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
    if rank == 0:
        for _ in range(1, processes):
            os.wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
