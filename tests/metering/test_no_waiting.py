"""A meter in its default form reads nothing from the device while a model trains."""

import contextlib
from unittest import mock

import pytest
import torch

import ssprop_patch as ssp
from metering import by_hand
from metering.by_hand import by_step, counted, quiet_meter
from ssprop_patch.metering import stopwatch

WAITS = ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")


class Waited(Exception):
    pass


def wait(*args, **kwargs):
    raise Waited


def to(self, *args, _to=torch.Tensor.to, **kwargs):
    device, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None:
        raise Waited
    return _to(self, *args, **kwargs)


@contextlib.contextmanager
def no_waiting():
    """Whatever reads a value of a tensor raises."""
    with contextlib.ExitStack() as stack:
        for name in WAITS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, wait))
        stack.enter_context(mock.patch.object(torch.Tensor, "to", to))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", wait))
        yield


@pytest.mark.parametrize("channels_every", [None, 2])
def test_training_steps_read_no_value(channels_every):
    model = ssp.convert(by_hand.net(), by_step(), exclude="^0$")
    model[4].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1, foreach=False)
    batches = [by_hand.batch(i) for i in range(4)]
    with quiet_meter(model, channels_every=channels_every) as meter:
        scalars = []
        meter.log_to(lambda found, step: scalars.append(found))
        with no_waiting():
            for x in batches:
                by_hand.loss_of(model(x)).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert meter.steps == len(scalars) == 4 and counted(meter)[2] > 0


@pytest.mark.parametrize(
    "read",
    [
        bool,
        float,
        lambda t: t.item(),
        lambda t: t.cpu(),
        lambda t: t.tolist(),
        lambda t: t.to("cpu"),
        lambda t: [0][t.long()],
    ],
)
def test_such_a_reading_would_be_noticed(read):
    with no_waiting(), pytest.raises(Waited):
        read(torch.zeros(()))


class FakeEvent:
    """Of a device that is ever so far behind; in units of one call."""

    made, waited, now = 0, 0, 0

    def __init__(self, enable_timing=False):
        assert enable_timing
        FakeEvent.made += 1

    def record(self, stream=None):
        assert stream == "the model's stream"
        FakeEvent.now += 1
        self.at = FakeEvent.now

    def query(self):
        return FakeEvent.done >= self.at

    def synchronize(self):
        FakeEvent.waited += FakeEvent.done < self.at
        FakeEvent.done = max(FakeEvent.done, self.at)

    def elapsed_time(self, end):
        assert FakeEvent.done >= end.at, "read before it was there"
        return 1000.0 * (end.at - self.at)


@pytest.fixture
def fake_cuda():
    FakeEvent.made = FakeEvent.waited = FakeEvent.now = 0
    FakeEvent.done = 0
    streams = {torch.device("cuda:1"): "the model's stream"}
    with (
        mock.patch.object(torch.cuda, "Event", FakeEvent),
        mock.patch.object(torch.cuda, "current_stream", streams.get),
    ):
        yield stopwatch.Stopwatch.on(torch.device("cuda:1"))


def test_events_are_read_once_the_device_has_passed_them_and_no_sooner(fake_cuda):
    watch = fake_cuda
    for _ in range(200):
        watch.start("forward")
        watch.stop("forward")
    assert FakeEvent.waited == 0
    assert len(watch._waiting) == 200  # the device is behind: nothing can be read
    FakeEvent.done = FakeEvent.now
    watch.start("forward")
    watch.stop("forward")
    assert FakeEvent.waited == 0 and len(watch._waiting) <= watch._ENOUGH
    assert watch.seconds() == {"forward": 201.0}


def test_asking_waits_for_the_device(fake_cuda):
    fake_cuda.start("backward")
    fake_cuda.stop("backward")
    assert fake_cuda.seconds() == {"backward": 1.0}
    assert FakeEvent.waited == 1


def test_other_devices_have_no_seconds():
    watch = stopwatch.Stopwatch.on(torch.device("xpu"))
    watch.start("forward")
    watch.stop("forward")
    assert watch.seconds() == {}
