"""Trainers that need no adapter: a loop of one's own, Accelerate, Lightning Fabric."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.fabric import Fabric

import ssprop_patch as ssp

from . import by_hand
from .by_hand import BAR, Net, by_step, data

SCHEDULES = pytest.mark.parametrize("schedule", [BAR, by_step()], ids=["epochs", "steps"])


@pytest.fixture(autouse=True)
def _no_state_of_earlier_accelerators():
    """Accelerate keeps precision and accumulation of a process in singletons."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def loader():
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)


def reference(schedule, epochs=4, accumulate=1):
    groups = by_hand.steps(data(), epochs, accumulate)
    rates = by_hand.rates(schedule, epochs, len(groups) // epochs)
    return by_hand.train(Net(), groups, rates), rates


# --- plain PyTorch ------------------------------------------------------------------------------


@SCHEDULES
def test_an_unchanged_loop(schedule):
    expected, rates = reference(schedule)
    model = Net()
    optimizer = by_hand.sgd(model)
    ssp.convert(model, schedule, steps_per_epoch=5)
    seen = by_hand.watch(model)
    for _ in range(4):
        for x, y in data():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert seen == rates
    by_hand.assert_close(model, expected)


# --- Accelerate ---------------------------------------------------------------------------------


class Accelerated:
    """A training as Accelerate's guide writes it, the conversion before or after ``prepare``."""

    def __init__(self, schedule, converted="before", accumulate=1, selection="l1"):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = Net()
        optimizer, batches = by_hand.sgd(model), loader()
        steps_per_epoch = -(-len(batches) // accumulate)

        def convert(model):
            ssp.convert(model, schedule, steps_per_epoch=steps_per_epoch, selection=selection)

        if converted == "before":
            convert(model)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model, optimizer, batches
        )
        if converted == "after":
            convert(self.model)
        self.accelerator.register_for_checkpointing(ssp.get_controller(self.model))
        self.seen = by_hand.watch(self.model)

    def train(self, epochs=4, first=0, save=None, path=None):
        """Train from the ``first`` batch of all; save after so many and stop."""
        done = first
        for _ in range(first // len(self.loader), epochs):
            skip = done % len(self.loader)
            batches = self.accelerator.skip_first_batches(self.loader, skip)
            for x, y in batches if skip else self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = F.cross_entropy(self.model(x), y)
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                done += 1
                if done == save:
                    self.accelerator.save_state(str(path))
                    return self
        return self


@SCHEDULES
@pytest.mark.parametrize("converted", ["before", "after"])
def test_accelerate(converted, schedule):
    expected, rates = reference(schedule)
    run = Accelerated(schedule, converted).train()
    assert run.seen == rates
    by_hand.assert_close(run.model, expected)


@SCHEDULES
def test_accumulation_in_accelerate(schedule):
    rates = by_hand.rates(schedule, 4, 3)
    run = Accelerated(schedule, accumulate=2).train()
    passes = [2, 2, 1] * 4
    assert run.seen == [rate for rate, n in zip(rates, passes, strict=True) for _ in range(n)]
    expected = Net()
    optimizer = by_hand.sgd(expected)
    for group, rate in zip(by_hand.steps(data(), 4, 2), rates, strict=True):
        share = len(group) / 2  # Accelerate divides by 2 in an epoch's shorter last step, too

        def loss_of(x, y, share=share):
            return F.cross_entropy(expected(x), y) * share

        by_hand.train(expected, [group], [rate], optimizer, loss_of)
    by_hand.assert_close(run.model, expected)


@pytest.mark.parametrize("selection", ["l1", "random"])
@pytest.mark.parametrize("after", [5, 7, 10], ids=["dense end", "within sparse", "sparse end"])
def test_accelerate_resumes_from_its_saved_state(after, selection, tmp_path):
    whole = Accelerated(BAR, selection=selection).train()
    first = Accelerated(BAR, selection=selection).train(save=after, path=tmp_path)
    torch.manual_seed(99)  # what selection="random" draws comes from the checkpoint
    resumed = Accelerated(BAR, selection=selection)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(first=after)
    assert first.seen + resumed.seen == whole.seen == by_hand.rates(BAR, 4, 5)
    by_hand.assert_same(resumed.model, whole.model)


def rows_of(conv):
    """The number of output channels that each backward of ``conv`` has given a gradient."""
    rows = []
    conv.weight.register_post_accumulate_grad_hook(
        lambda weight: rows.append(int(weight.grad.flatten(1).ne(0).any(1).sum()))
    )
    return rows


@pytest.mark.parametrize("converted", ["before", "after"])
def test_mixed_precision_in_accelerate_is_autocast_by_hand(converted):
    def train(model, prepare, precision, backward):
        optimizer = by_hand.sgd(model)
        if converted == "before":
            ssp.convert(model, BAR, steps_per_epoch=5)
        model, optimizer = prepare(model, optimizer)
        if converted == "after":
            ssp.convert(model, BAR, steps_per_epoch=5)
        rows = rows_of(model.last)
        for x, y in data() * 2:
            optimizer.zero_grad()
            with precision():
                output = model(x.float())
            assert output.dtype is (torch.float32 if "forward" in vars(model) else torch.bfloat16)
            backward(F.cross_entropy(output.float(), y))
            optimizer.step()
        return model, rows

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    # prepare() puts a forward of its own on the instance.
    model, rows = train(
        Net().float(), accelerator.prepare, contextlib.nullcontext, accelerator.backward
    )
    expected, expected_rows = train(
        Net().float(),
        lambda *both: both,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda loss: loss.backward(),
    )
    assert rows == expected_rows == [12] * 5 + [5] * 5
    by_hand.assert_same(model, expected)


# --- Lightning Fabric ---------------------------------------------------------------------------


@SCHEDULES
def test_fabric(schedule, tmp_path):
    expected, rates = reference(schedule)
    fabric, seen = Fabric(accelerator="cpu", devices=1), []

    def train(epochs, load=False):
        model = Net()
        model, optimizer = fabric.setup(model, by_hand.sgd(model))
        ssp.convert(model, schedule, steps_per_epoch=5)
        controller = ssp.get_controller(model)
        state = {"model": model, "optimizer": optimizer, "ssprop": controller}
        if load:
            fabric.load(tmp_path / "state.ckpt", state)
        seen.append(by_hand.watch(model))
        for x, y in epochs * data():
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            optimizer.step()
        fabric.save(tmp_path / "state.ckpt", state)
        return model

    train(1)
    model = train(3, load=True)
    assert seen[0] + seen[1] == rates
    by_hand.assert_close(model.module, expected)
