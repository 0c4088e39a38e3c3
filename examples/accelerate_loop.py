"""Accelerate: convert after ``prepare``, and register the controller for checkpoints.

python examples/accelerate_loop.py        (or: accelerate launch examples/accelerate_loop.py)
"""

import math
import tempfile

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ssprop_patch as ssp


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = TensorDataset(torch.randn(64, 3, 16, 16), torch.randint(4, (64,)))
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, 16))

    # Only now is it known how many batches each process gets.
    steps = math.ceil(len(loader) / accelerator.gradient_accumulation_steps)
    ssp.convert(model, ssp.BarSchedule(0.8, period=2), steps_per_epoch=steps)
    controller = ssp.get_controller(model)
    accelerator.register_for_checkpointing(controller)

    for epoch in range(4):
        rate = controller.drop_rate
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: drop rate {rate:g}, loss {loss.item():.3f}")

    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        accelerator.load_state(folder)
    accelerator.print(f"resumed at epoch {controller.t}")


if __name__ == "__main__":
    main()
