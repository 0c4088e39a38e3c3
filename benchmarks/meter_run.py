"""Train a network with a Meter on it: the report, its scalars, and pictures of what was kept.

    python benchmarks/meter_run.py [the options of train_classifier.py]

Writes report.json, channels.json, scalars.csv and pictures of them into --output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import plot_meter
import torch
import torch.nn.functional as F
from classifier import data, models
from classifier.batches import Batches
from classifier.options import UserError, parse
from classifier.training import evaluate

import ssprop_patch as ssp
from ssprop_patch._files import write_atomically
from ssprop_patch._progress import Progress
from ssprop_patch.plots import style


def main() -> None:
    """Run the command line."""
    options = parse()
    torch.manual_seed(0)
    images = data.load(options)
    model, channels = models.build(
        options, classes=images.classes, channels=images.channels, size=images.size
    )
    device = torch.device(options.device)
    batches = Batches(
        images,
        batch_size=options.batch_size,
        device=device,
        channels=channels,
        augment=options.augment,
        channels_last=options.channels_last,
    )
    model.to(device, memory_format=batches.memory_format)
    schedule, steps = ssp.parse_schedule(options.schedule), batches.steps_per_epoch

    ssp.convert(model, schedule, steps_per_epoch=steps, selection=options.selection)
    meter = ssp.Meter(model, channels_every=steps)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    meter.log_to(folder / "scalars.csv", every=10)

    optimizer = torch.optim.SGD(
        model.parameters(), options.lr, momentum=0.9, weight_decay=options.weight_decay
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.amp == "bf16")
    with Progress("steps") as progress:
        for epoch in range(options.epochs):
            model.train()
            for x, labels in batches.train(0, epoch, steps):
                with autocast:
                    loss = F.cross_entropy(model(x), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                progress(meter.steps, options.epochs * steps, f"epoch {epoch}")
    correct, _ = evaluate(model, batches.test(), autocast)

    report = meter.report()
    print(report)
    print(f"test accuracy {100 * correct:.1f} %")
    write_atomically(folder / "report.json", report.to_json(indent=1) + "\n")
    kept = json.dumps(meter.channels.to_dict(), separators=(",", ":"))
    write_atomically(folder / "channels.json", kept.replace("]],", "]],\n") + "\n")
    plot_meter.draw(folder)
    style.write(
        ssp.plots.schedule(schedule, options.epochs, steps_per_epoch=steps), folder / "schedule.png"
    )
    print(f"wrote {folder}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"meter_run.py: {error}")
