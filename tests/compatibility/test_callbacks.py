"""The callbacks for libraries that are not in the extra [test]; by epochs: 0, 0.8, 0, 0.8."""

import csv
import importlib.util
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import ssprop_patch as ssp

from .common import batches, net

BAR = ssp.BarSchedule(0.8)
RATES = [0.0, 0.8, 0.0, 0.8]


def tenths(t):
    return min(t, 9) / 10


def by_step():
    return ssp.LambdaSchedule(tenths, interval="step")


def watch(model):
    """Record the drop rate in force at every forward in training mode."""
    seen = []

    def note(module, _):
        if module.training:
            seen.append(ssp.get_controller(module).drop_rate)

    model.register_forward_pre_hook(note)
    return seen


def each(rates, steps=3):
    return [rate for rate in rates for _ in range(steps)]


# --- Ignite, and MONAI's engines ------------------------------------------------------------------


def ignite_trainer(handler):
    engine = pytest.importorskip("ignite.engine", reason="pip install pytorch-ignite")
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = engine.create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
    handler.attach(trainer, model)
    shown = []
    trainer.add_event_handler(
        engine.Events.ITERATION_COMPLETED, lambda e: shown.append(dict(e.state.metrics))
    )
    return trainer, model, watch(model), shown


def test_ignite(capsys):
    pytest.importorskip("ignite", reason="pip install pytorch-ignite")
    from ssprop_patch.integrations.ignite import SsPropHandler

    handler = SsPropHandler(BAR, meter=True, revert_at_end=True)
    trainer, model, seen, shown = ignite_trainer(handler)
    trainer.run(batches(), max_epochs=4)
    assert seen == [metrics["ssprop/drop_rate"] for metrics in shown] == each(RATES)
    flops = handler.report.forward_flops + handler.report.backward_flops
    assert shown[-1]["ssprop/flops"] == flops > shown[0]["ssprop/flops"] > 0
    assert not ssp.is_converted(model) and "optimizer steps      12" in capsys.readouterr().out


@pytest.mark.parametrize("schedule", [BAR, by_step()], ids=["epochs", "steps"])
def test_ignite_resumes(schedule):
    pytest.importorskip("ignite", reason="pip install pytorch-ignite")
    from ssprop_patch.integrations.ignite import SsPropHandler

    whole, _, seen, _ = ignite_trainer(SsPropHandler(schedule))
    whole.run(batches(), max_epochs=4)
    first = SsPropHandler(schedule, meter=True)
    trainer, _, before, _ = ignite_trainer(first)
    trainer.run(batches(), max_epochs=2)
    saved = trainer.state_dict(), first.state_dict()
    second = SsPropHandler(schedule, meter=True)
    trainer, _, after, _ = ignite_trainer(second)
    trainer.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    trainer.run(batches(), max_epochs=4)
    assert before + after == seen and second.report.steps == 12


def test_an_engine_that_does_not_say_what_it_trains():
    engine = pytest.importorskip("ignite.engine", reason="pip install pytorch-ignite")
    from ssprop_patch.integrations.ignite import SsPropHandler

    trainer = engine.Engine(lambda engine, batch: None)
    SsPropHandler(BAR).attach(trainer)
    with pytest.raises(ValueError, match=r"attach\(engine, model\)"):
        trainer.run(batches(), max_epochs=1)


def test_monai():
    engines = pytest.importorskip("monai.engines", reason="pip install monai")
    pytest.importorskip("ignite", reason="pip install pytorch-ignite")
    from ssprop_patch.integrations.ignite import SsPropHandler

    model = net()
    seen = watch(model)
    engines.SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=4,
        train_data_loader=[{"image": x, "label": y} for x, y in batches()],
        network=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        loss_function=nn.CrossEntropyLoss(),
        prepare_batch=lambda batch, device, non_blocking: (batch["image"], batch["label"]),
        train_handlers=[SsPropHandler(BAR)],
    ).run()
    assert seen == each(RATES)


# --- fastai ---------------------------------------------------------------------------------------


def learner(opt_func, *callbacks):
    learners = pytest.importorskip("fastai.learner", reason="pip install fastai")
    from fastai.data.core import DataLoaders

    data = torch.utils.data.TensorDataset(
        torch.cat([x for x, _ in batches()]).float(), torch.cat([y for _, y in batches()])
    )
    loaders = DataLoaders(*[torch.utils.data.DataLoader(data, batch_size=4)] * 2)
    found = learners.Learner(
        loaders,
        net().float(),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=opt_func,
        lr=0.1,
        cbs=callbacks,
    )
    found.logger = lambda row: None
    return found, watch(found.model)


def optimizers():
    optimizer = pytest.importorskip("fastai.optimizer", reason="pip install fastai")
    return {"fastai": optimizer.SGD, "torch": TorchSGD}


def TorchSGD(*args, **kwargs):
    from fastai.optimizer import OptimWrapper

    return OptimWrapper(*args, opt=torch.optim.SGD, **kwargs)


@pytest.mark.parametrize("opt", ["fastai", "torch"])
def test_fastai(opt, capsys):
    opt_func = optimizers()[opt]
    from ssprop_patch.integrations.fastai import SsPropCallback

    callback = SsPropCallback(BAR, meter=True)
    learn, seen = learner(opt_func, callback)
    learn.fit(4)
    assert seen == each(RATES)
    assert learn.recorder.metric_names[3] == "ssprop/drop_rate"
    assert [values[2] for values in learn.recorder.values] == RATES
    assert callback.report.backward_saved > 0.3 and "saved" in capsys.readouterr().out
    before = str(ssp.get_controller(learn.model))
    assert len(learn.validate()) == 1  # no column more
    assert str(ssp.get_controller(learn.model)) == before
    learn.fit(4, start_epoch=3)  # on its own
    assert seen[12:] == each([0.8])


@pytest.mark.parametrize("opt", ["fastai", "torch"])
def test_fastai_counts_steps(opt):
    opt_func = optimizers()[opt]
    from ssprop_patch.integrations.fastai import SsPropCallback

    learn, seen = learner(opt_func)
    learn.fit(2, cbs=SsPropCallback(by_step()))
    assert seen == [tenths(t) for t in range(6)]


# --- ultralytics ----------------------------------------------------------------------------------


def pictures(folder):
    from PIL import Image

    torch.manual_seed(0)
    for part in ("train", "val", "test"):
        for label in ("a", "b"):
            (folder / part / label).mkdir(parents=True)
            for i in range(2):
                pixels = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")
    return str(folder)


def test_ultralytics(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    ultralytics = pytest.importorskip("ultralytics", reason="pip install ultralytics")
    from ssprop_patch.integrations.ultralytics import SsPropCallback

    yolo, seen = ultralytics.YOLO("yolo11n-cls.yaml", verbose=False), []
    callback = SsPropCallback(BAR, meter=True, revert_at_end=True).add_to(yolo)
    yolo.add_callback("on_train_start", lambda trainer: seen.append(watch(trainer.model)))
    arguments = {"imgsz": 32, "batch": 2, "nbs": 2, "workers": 0, "plots": False, "amp": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yolo.train(
            data=pictures(tmp_path / "data"),
            epochs=4,
            device="cpu",
            project=str(tmp_path),
            name="run",
            verbose=False,
            **arguments,
        )
    assert seen[0] == each(RATES, 2)
    with (tmp_path / "run" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ssprop/drop_rate"]) for row in rows] == RATES
    assert float(rows[-1]["ssprop/flops"]) > float(rows[0]["ssprop/flops"]) > 0
    assert callback.report.backward_saved > 0.3 and "saved" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run" / "weights" / "last.pt", weights_only=False)
    assert not ssp.is_converted(saved["ema"] or saved["model"])
    assert not ssp.is_converted(yolo.trainer.model)


# --- DeepSpeed ------------------------------------------------------------------------------------

DEEPSPEED = """
import tempfile, torch, deepspeed
import ssprop_patch as ssp
from compatibility.common import batches, net

deepspeed.ops.__compatible_ops__.clear()  # so that it builds no C++ for one process
model = net().float()
del model[1]  # the norm, whose statistics stay in float32
ssp.convert(model, ssp.BarSchedule(0.8))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
config = {"train_batch_size": 4, "zero_allow_untested_optimizer": True}
config |= {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
controller, rows = ssp.get_controller(engine.module), []
model[2].weight.register_hook(lambda g: rows.append(int((g.flatten(1) != 0).any(1).sum())))
with tempfile.TemporaryDirectory() as path:
    for epoch in range(2):
        controller.step(epoch)
        for x, y in batches(2):
            loss = torch.nn.functional.cross_entropy(engine(x.bfloat16()).float(), y)
            engine.backward(loss)
            engine.step()
    engine.save_checkpoint(path, client_state={"ssprop": controller.state_dict()})
    controller.step(0)
    controller.load_state_dict(engine.load_checkpoint(path)[1]["ssprop"])
print("found", rows, controller.t, controller.drop_rate)
"""


def test_deepspeed():
    """The two lines of docs/other-libraries.md, in a process of its own."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("pip install deepspeed")
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env = {**os.environ, **one, "MASTER_PORT": "29541", "DS_ACCELERATOR": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", DEEPSPEED], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "found [8, 8, 2, 2] 1 0.8" in done.stdout
