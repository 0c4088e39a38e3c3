"""ultralytics: its trainer builds the network itself, so that a callback converts it."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import ssprop_patch as ssp

from . import compare


def checks() -> Iterator[tuple[str, str]]:
    """Yield what was compared, and how it came out."""
    with tempfile.TemporaryDirectory() as folder:
        data = pictures(Path(folder) / "data")
        for what, result in compare.in_all(partial(train, data=data, folder=folder), steps=4):
            yield f"yolo11n-cls: {what}", result
        yield "the gradients of yolo11n-cls at 0.5 against masked ones, float64", gradients()
        same = str(same_model(data, folder))
        yield "the model that YOLO holds before train() is the one trained", same
        yield "best.pt after a sparse training", checkpoint(data, folder)


def pictures(data: Path) -> str:
    """Write a folder of small pictures of two classes."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for label in ("a", "b"):
            (data / part / label).mkdir(parents=True)
            for i in range(4):
                pixels = draw.integers(0, 255, (32, 32, 3), dtype="uint8")
                Image.fromarray(pixels).save(data / part / label / f"{i}.png")
    return str(data)


def run(prepare: Callable[[nn.Module], object], data: str, folder: str):
    """Train YOLO's smallest classifier for two epochs of two batches; return it."""
    os.environ.setdefault("YOLO_OFFLINE", "true")
    from ultralytics import YOLO

    yolo, trained = YOLO("yolo11n-cls.yaml", verbose=False), []

    def begin(trainer) -> None:
        trained.append(trainer.model)
        prepare(trainer.model)

    yolo.add_callback("on_pretrain_routine_end", begin)
    before = yolo.model
    yolo.train(
        data=data,
        epochs=2,
        imgsz=32,
        batch=4,
        nbs=4,
        device="cpu",
        workers=0,
        plots=False,
        amp=False,
        optimizer="SGD",
        lr0=0.001,
        warmup_epochs=0,
        seed=0,
        project=folder,
        name="run",
        exist_ok=True,
        verbose=False,
    )
    return yolo, before, trained[0]


def train(prepare: Callable[[nn.Module], object], data: str, folder: str) -> dict[str, Tensor]:
    """Return the final state of the network that was trained."""
    _, _, model = run(prepare, data, folder)
    return {name: t.clone() for name, t in model.state_dict().items()}


def gradients() -> str:
    """Compare one backward; over several steps in float32 channels that nearly tie part ways."""
    from ultralytics.nn.tasks import ClassificationModel
    from zoo import oracle

    def backward(model: nn.Module) -> Tensor:
        torch.manual_seed(0)  # of dropout
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64)
        model.predict(x).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.manual_seed(0)
    plain = ClassificationModel("yolo11n-cls.yaml", nc=2, verbose=False).double().train()
    sparse = ssp.convert(copy.deepcopy(plain), compare.RATE)
    with oracle.network(plain, compare.RATE):
        expected = backward(plain)
    return f"relative difference {(backward(sparse) - expected).norm() / expected.norm():.0e}"


def same_model(data: str, folder: str) -> bool:
    """Return whether converting before ``train`` would convert what is trained."""
    _, before, model = run(lambda model: None, data, folder)
    return before is model


def checkpoint(data: str, folder: str) -> str:
    """Return what the checkpoint of a sparse training holds."""
    run(lambda model: ssp.convert(model, compare.RATE), data, folder)
    found = torch.load(Path(folder) / "run/weights/best.pt", weights_only=False)
    model = found["ema"] or found["model"]
    return "converted" if ssp.is_converted(model) else "a plain model"
