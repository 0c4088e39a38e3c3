"""One small network, trained by other libraries: unconverted, converted, and by the oracle."""

import oracle
import torch
from torch import nn

import ssprop_patch as ssp

RATE = 0.5


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).double()


def batches(number=3):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (4,), generator=generator),
        )
        for _ in range(number)
    ]


def zero_rows(weight_grad):
    return int((weight_grad.flatten(1) == 0).all(1).sum())


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def check_training(train, make=net, schedule=RATE, **convert):
    """``train(model)`` does the same to a converted model as to a plain one.

    Bit for bit at rate 0; at a rate the same as to one whose dropped channels are masked; and
    those two are not the same.
    """
    plain, at_zero, sparse, masked = make(), make(), make(), make()
    train(plain)
    train(ssp.convert(at_zero, 0.0, **convert))
    torch.testing.assert_close(state(at_zero), state(plain), rtol=0, atol=0)

    train(ssp.convert(sparse, schedule, **convert))
    with oracle.network(masked, RATE) as record:
        train(masked)
    assert record.dropped and record.gap > 1e-6
    torch.testing.assert_close(state(sparse), state(masked), rtol=1e-9, atol=1e-11)
    differ = [n for n, t in state(sparse).items() if not torch.equal(t, state(plain)[n])]
    assert differ, "the sparse training is the dense one"
    return sparse
