"""DeepSpeed on one CPU process: without ZeRO, with its stages, and with fp32 master copies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from . import compare

STEPS = 4


def checks() -> Iterator[tuple[str, str]]:
    """Yield what was compared, and how it came out."""
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29533",
        DS_SKIP_CUDA_CHECK="1",
    )
    settings = {"float32": (0, False), "ZeRO 1, bfloat16": (1, True), "ZeRO 2, bfloat16": (2, True)}
    for name, (stage, half) in settings.items():
        training = partial(train, stage=stage, half=half)
        for what, result in compare.in_all(training, steps=STEPS):
            yield f"{name}: {what}", result


def network() -> nn.Module:
    """Return the same network each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def train(prepare: Callable[[nn.Module], object], stage: int, half: bool) -> dict[str, Tensor]:
    """Train for some steps; return the network's final state."""
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()  # so that it builds no C++ for one process
    model = network()
    prepare(model)
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": half},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), config=config
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        y = torch.randint(0, 4, (4,), generator=generator)
        out = engine(x.bfloat16() if half else x)
        engine.backward(nn.functional.cross_entropy(out.float(), y))
        engine.step()
    return {name: t.clone() for name, t in engine.module.state_dict().items()}
