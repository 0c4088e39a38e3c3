"""LightningCLI: the callback's arguments in a YAML file."""

import pytest
from integrations import by_hand
from integrations.in_lightning import Module, loader
from torch import nn

import ssprop_patch as ssp
from ssprop_patch.integrations.lightning import SsPropCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # LightningCLI and jsonargparse of each other
pytest.importorskip("jsonargparse", reason='pip install "jsonargparse[signatures]"')

TRAINER = """
trainer:
  accelerator: cpu
  max_epochs: 4
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: ssprop_patch.integrations.lightning.SsPropCallback
      init_args: {%s}
"""


def cli(folder, arguments):
    """Return what a configuration file with these arguments makes."""
    from lightning.pytorch.cli import LightningCLI

    file = folder / "config.yaml"
    file.write_text(TRAINER % arguments)
    return LightningCLI(Module, args=["--config", str(file)], run=False, save_config_callback=None)


def narrow(module, name):
    return name != "net.stem"


@pytest.mark.parametrize(
    "schedule",
    [
        '"BarSchedule(0.6, period=2)"',
        "{class_path: ssprop_patch.BarSchedule, init_args: {drop_rate: 0.6}}",
    ],
    ids=["text", "class"],
)
def test_a_schedule_in_yaml(schedule, tmp_path):
    made = cli(tmp_path, f"schedule: {schedule}")
    seen = by_hand.watch(made.model.net)
    made.trainer.fit(made.model, loader())
    assert seen == by_hand.rates(by_hand.BAR, 4, 5)


def test_every_argument_in_yaml(tmp_path):
    """But a controller, which is an object to share."""
    made = cli(
        tmp_path,
        "schedule: 0.5, steps_per_epoch: 5, types: [torch.nn.Conv2d, torch.nn.Linear], "
        "exclude: ['^net.head$'], overrides: {net.last: 0.25}, align: 2, "
        "filter_fn: compatibility.test_lightning_cli.narrow, "
        "selection: {class_path: ssprop_patch.Principal, init_args: {refresh_interval: 3}}, "
        "remainder: {class_path: ssprop_patch.Coarse, init_args: {block_size: 2}}, "
        "sync_selection: true, strict: false, log: false, meter: true, revert_at_end: true",
    )
    (callback,) = (c for c in made.trainer.callbacks if isinstance(c, SsPropCallback))
    expected = SsPropCallback(
        0.5,
        steps_per_epoch=5,
        types=[nn.Conv2d, nn.Linear],
        exclude=["^net.head$"],
        overrides={"net.last": 0.25},
        align=2,
        filter_fn=narrow,
        selection=ssp.Principal(refresh_interval=3),
        remainder=ssp.Coarse(block_size=2),
        sync_selection=True,
        strict=False,
        log=False,
        meter=True,
        revert_at_end=True,
    )
    found, wanted = vars(callback._run), vars(expected._run)
    assert {n: v for n, v in found.items() if v != wanted[n]} == {}
    made.trainer.fit(made.model, loader())
    assert callback.report.steps == 20 and not ssp.is_converted(made.model)
    assert [r.name for r in callback.report.layers if r.totals.sparse] == [
        "net.depthwise",
        "net.last",
    ]


def test_a_model_that_is_converted_already(tmp_path):
    """The defaults that a file spells out ask for no conversion."""
    made = cli(tmp_path, "exclude: [], selection: l1")
    with pytest.raises(ValueError, match="is not converted: give the callback a schedule"):
        made.trainer.fit(made.model, loader())
