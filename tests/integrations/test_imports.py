"""What is imported when, and what is said where a framework is missing."""

import importlib
import inspect
import subprocess
import sys

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch

import ssprop_patch as ssp
from ssprop_patch.integrations._adapter import Adapter

FRAMEWORKS = ["lightning", "pytorch_lightning", "transformers", "accelerate", "fastai", "ignite"]


def test_callbacks_take_all_arguments_of_convert():
    """With the same types and defaults, so that a type checker and LightningCLI see them."""
    signatures = [inspect.signature(f).parameters for f in (ssp.convert, Adapter.__init__)]
    convert, adapter = ({n: (p.default, p.annotation) for n, p in s.items()} for s in signatures)
    own = {"self", "model", "schedule", "revert_at_end", "log", "meter"}
    assert {n: p for n, p in adapter.items() if n not in own} == {
        n: p for n, p in convert.items() if n not in own
    }


def import_anew(monkeypatch, module, hidden):
    """Import an adapter as if the ``hidden`` packages were not installed."""
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)
    name = f"ssprop_patch.integrations.{module}"
    monkeypatch.setitem(sys.modules, name, None)  # so that what comes next is undone, too
    del sys.modules[name]
    return importlib.import_module(name)


def test_the_package_imports_no_framework():
    code = f"""
import sys, ssprop_patch, ssprop_patch.integrations
print([name for name in {FRAMEWORKS} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "hidden", "command"),
    [
        (
            "lightning",
            ["lightning", "lightning.pytorch", "pytorch_lightning"],
            'pip install "ssprop_patch[lightning]"',
        ),
        ("transformers", ["transformers"], 'pip install "ssprop_patch[transformers]"'),
        ("fastai", ["fastai", "fastai.callback.core"], "pip install fastai"),
        ("ignite", ["ignite", "ignite.engine"], "pip install pytorch-ignite"),
    ],
)
def test_a_missing_framework_is_an_error_that_says_what_to_install(
    module, hidden, command, monkeypatch
):
    with pytest.raises(ImportError) as caught:
        import_anew(monkeypatch, module, hidden)
    assert f"ssprop_patch.integrations.{module} needs" in str(caught.value)
    assert command in str(caught.value)


def test_what_a_framework_itself_misses_is_not_hidden(monkeypatch):
    def import_module(name, real=importlib.import_module):
        if name == "lightning.pytorch":
            raise ModuleNotFoundError("No module named 'torchmetrics'", name="torchmetrics")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.delitem(sys.modules, "lightning.pytorch", raising=False)
    with pytest.raises(ModuleNotFoundError, match="torchmetrics"):
        import_anew(monkeypatch, "lightning", ["pytorch_lightning"])


def test_a_callback_of_both_packages_of_lightning_where_both_are_in_use(monkeypatch):
    adapter = import_anew(monkeypatch, "lightning", hidden=[])
    assert issubclass(adapter.SsPropCallback, pl.Callback)
    assert issubclass(adapter.SsPropCallback, lightning.pytorch.Callback)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_the_other_package_of_lightning_where_only_that_is_in_use(monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning.pytorch", raising=False)
    adapter = import_anew(monkeypatch, "lightning", hidden=[])
    assert "lightning.pytorch" not in sys.modules

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.conv, self.rows = torch.nn.Conv2d(3, 10, 3), []

        def training_step(self, batch, batch_idx):
            return self.conv(batch).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def on_before_optimizer_step(self, optimizer):
            self.rows.append(int(self.conv.weight.grad.flatten(1).ne(0).any(1).sum()))

    model = Module()
    trainer = pl.Trainer(
        max_epochs=4,
        callbacks=adapter.SsPropCallback(ssp.BarSchedule(0.7)),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(4, 3, 8, 8), batch_size=2))
    assert model.rows == [10, 10, 3, 3] * 2
