"""``integrations.ddp.compress``: what is sent is smaller, and what comes out is the same."""

import functools

import torch
import torch.distributed as dist
from patching.by_reference import TYPES, images, loss, make
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel as DDP

import ssprop_patch as ssp
from distributed.launch import Checks
from distributed.sync_scores import watched
from ssprop_patch.integrations.ddp import compress

check = Checks()
RULE = {"selection": "principal", "sync_selection": True}


def wrapped(compressed, new=make, rate=0.7, converted=None, **options):
    """DDP around a converted network, and the hook's state."""
    net = new()
    ssp.convert(net, rate, types=TYPES, **(RULE if converted is None else converted))
    ddp = DDP(net, **{"bucket_cap_mb": 0.01, **options})
    return ddp, compress(ddp) if compressed else None


def mine(seed):
    return images(2 * seed + dist.get_rank())


def backward(ddp, seed):
    loss(ddp, mine(seed)).backward()


def train(ddp, state=None, steps=7, step=backward):
    """The gradients of each step by name, and the shares of bytes that were sent."""
    optimizer, grads, shares = torch.optim.SGD(ddp.parameters(), 1e-3), [], []
    for seed in range(steps):
        optimizer.zero_grad()
        if state is not None:
            state.bytes_sent = state.bytes_whole = 0
        step(ddp, seed)
        grads.append({n: p.grad.clone() for n, p in ddp.module.named_parameters()})
        optimizer.step()
        if state is not None:
            shares.append(state.bytes_sent / state.bytes_whole)
    return grads, shares


def assert_same(found, expected):
    for ours, whole in zip(found, expected, strict=True):
        for name, grad in whole.items():
            torch.testing.assert_close(ours[name], grad, rtol=1e-10, atol=1e-12, msg=name)


def check_training(step=backward, **options):
    """Train with and without compression; the shares of bytes sent in each step."""
    expected, _ = train(wrapped(False, **options)[0], step=step)
    ddp, state = wrapped(True, **options)
    found, shares = train(ddp, state, step=step)
    assert_same(found, expected)
    return shares, state


def lying_along(state):
    return {weight.name: weight.lies_along for weight in state._weights.values()}


@check
def gradients_are_those_of_a_whole_reduction():
    shares, state = check_training()
    # The first is whole; in refreshes (1, 2, 4) the layers of the input side are.
    assert 1 <= shares[0] < 1.001
    assert max(shares[1:]) < 0.43 and max(shares[5:]) < 0.36 < shares[2]
    layers = ["stem", "expand", "grouped", "up", "head"]
    assert lying_along(state) == dict.fromkeys(layers, True)  # and not the depthwise one


@check
def all_ranks_have_the_same_gradient():
    ddp, state = wrapped(True)
    (*_, grads), _ = train(ddp, state, steps=3)
    for grad in grads.values():
        found = [torch.empty_like(grad) for _ in range(2)]
        dist.all_gather(found, grad.contiguous())
        assert torch.equal(*found)


@check
def whatever_the_buckets():
    for options in ({"bucket_cap_mb": 25}, {"gradient_as_bucket_view": True}):
        shares, _ = check_training(**options)
        assert shares[-1] < 0.36
    shares, _ = check_training(static_graph=True)
    assert shares[-1] < 0.36


@check
def weights_in_channels_last():
    shares, _ = check_training(new=lambda: make().to(memory_format=torch.channels_last))
    assert shares[-1] < 0.36


@check
def in_float32_and_under_autocast():
    def net():
        return small().float()

    def step(ddp, seed, enabled=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = ddp(mine(seed).float()).float()
        (out * torch.linspace(0.1, 1, 64)).square().sum().backward()

    for enabled, tolerance in ((False, 1e-5), (True, 2e-2)):
        run = functools.partial(step, enabled=enabled)
        expected, _ = train(wrapped(False, new=net)[0], step=run)
        ddp, state = wrapped(True, new=net)
        found, shares = train(ddp, state, step=run)
        assert all(lying_along(state).values()) and shares[-1] < 0.45
        for ours, whole in zip(found, expected, strict=True):
            for name, grad in whole.items():
                assert (ours[name] - grad).norm() <= tolerance * grad.norm(), name


@check
def the_bytes_counted_are_those_of_the_all_reduces():
    ddp, state = wrapped(True)
    train(ddp, state, steps=6)
    state.bytes_sent = state.bytes_whole = 0
    ddp.zero_grad()
    with watched() as calls:
        backward(ddp, 6)
    of_hook = [call for call in calls["all_reduce"] if call.kwargs.get("async_op")]
    assert sum(call.args[0].nbytes for call in of_hook) == state.bytes_sent
    assert state.bytes_whole == sum(p.nbytes for p in ddp.parameters())
    # k of C rows (9 of 30, 5 of 16, ...) of what lies along directions of dy.
    expand, stem = ddp.module.expand, ddp.module.stem
    grouped, up, head = ddp.module.grouped, ddp.module.up, ddp.module.head
    small = [
        5 * stem.weight[0].numel(),
        64 * 5,  # this and the last of the input side: C x r
        8 * grouped.weight[0].numel(),
        24 * 5 * 16,
        30 * 5,
    ]
    large = sum(m.weight.numel() for m in (stem, expand, grouped, up, head))
    assert state.bytes_sent == state.bytes_whole + 8 * (sum(small) - large)


def small():
    """Quick to compile; one layer of each side."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 1), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten()).double()


# --- what does not lie along one set of directions ----------------------------------------------


@check
def dense_passes_are_whole():
    schedule = ssp.LambdaSchedule(lambda t: 0.7 if t % 2 else 0.0, interval="step")
    shares, state = check_training(rate=schedule)
    assert [share < 1 for share in shares] == [False, False, False, True, False, True, False]
    # Those of the input side have had nothing but refreshes.
    sides = {"stem": True, "expand": None, "grouped": True, "up": True, "head": None}
    assert lying_along(state) == sides


@check
def what_is_accumulated_is_whole():
    def without_sync(ddp, seed):
        with ddp.no_sync():
            backward(ddp, 10 * seed)
        backward(ddp, 10 * seed + 1)

    def reduced_each_time(ddp, seed):
        backward(ddp, 10 * seed)
        backward(ddp, 10 * seed + 1)

    shares, _ = check_training(without_sync)
    assert shares == [1] * 7
    shares, state = check_training(reduced_each_time)  # the first of the two is not
    assert 0.6 < shares[-1] < 0.8 and all(lying_along(state).values())


class Twice(nn.Module):
    """A layer that is called twice, and one whose weight is in the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.twice, self.once = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 16, 3)
        self.scale = 1.0
        self.double()

    def forward(self, x):
        return self.scale * self.once(self.twice(self.twice(x).tanh()).tanh()).mean((2, 3))


@check
def a_layer_that_is_called_twice_is_whole():
    shares, state = check_training(new=Twice)
    assert lying_along(state) == {"twice": None, "once": True} and shares[-1] < 0.6


def penalised(ddp, seed, after=0):
    penalty = ddp.module.once.weight.square().sum() if seed >= after else 0.0
    (loss(ddp, mine(seed)) + 1e-3 * penalty).backward()


@check
def a_weight_with_a_penalty_is_whole():
    shares, state = check_training(penalised, new=Twice)
    assert lying_along(state)["once"] is False and shares[-1] == 1


@check
def a_penalty_that_comes_later_is_an_error():
    ddp, state = wrapped(True, new=Twice)
    try:
        train(ddp, state, step=lambda ddp, seed: penalised(ddp, seed, after=4))
    except RuntimeError as error:
        assert "the gradient of once.weight no longer lies along" in str(error)
    else:
        raise AssertionError("not noticed")


@check
def a_gradient_that_begins_as_zero_decides_nothing():
    ddp, state = wrapped(True, new=Twice)
    ddp.module.scale = 0.0
    backward(ddp, 0)
    assert lying_along(state)["once"] is None
    ddp.module.scale = 1.0
    ddp.zero_grad()
    backward(ddp, 1)
    assert lying_along(state)["once"] is True


@check
def after_another_conversion_it_goes_by_that():
    ddp, state = wrapped(True)
    train(ddp, state, steps=2)
    for rule in ({}, {**RULE, "remainder": "coarse"}, {"selection": "principal"}):
        ssp.convert(ddp, 0.7, types=TYPES, **rule)
        assert train(ddp, state, steps=2)[1] == [1, 1]
    ssp.convert(ddp, 0.7, types=TYPES, **RULE)
    assert train(ddp, state, steps=2)[1][-1] < 0.43
    ssp.revert(ddp)
    assert train(ddp, state, steps=2)[1] == [1, 1]


@check
def a_rank_without_samples():
    def step(ddp, seed):
        samples = 3 if dist.get_rank() == 0 else (1, 0, 0, 1, 0, 0, 1)[seed]
        loss(ddp, mine(seed)[:samples]).backward()

    shares, _ = check_training(step, new=small)
    assert shares[-1] < 0.45


@check
def compiled():
    torch._dynamo.reset()
    expected, _ = train(wrapped(False, new=small)[0])
    for outside in (True, False):
        net = ssp.convert(small(), 0.7, **RULE)
        if outside:
            model = torch.compile(DDP(net), backend="aot_eager")
        else:
            model = DDP(torch.compile(net, backend="aot_eager"))
        state, optimizer = compress(model), torch.optim.SGD(net.parameters(), 1e-3)
        for seed in range(7):
            optimizer.zero_grad()
            state.bytes_sent = state.bytes_whole = 0
            backward(model, seed)
            assert_same([{n: p.grad for n, p in net.named_parameters()}], expected[seed : seed + 1])
            optimizer.step()
        assert state.bytes_sent < 0.45 * state.bytes_whole
    torch._dynamo.reset()


# --- what is refused ----------------------------------------------------------------------------


def message(call):
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("not refused")


@check
def what_it_cannot_do_is_an_error():
    assert "TypeError: compress takes a DistributedData" in message(lambda: compress(make()))
    nothing = "ValueError: no layer has directions that all ranks"
    for rule in (
        {},
        {"selection": "principal"},
        {**RULE, "remainder": "coarse"},
        {"sync_selection": True},
    ):
        ddp, _ = wrapped(False, converted=rule)
        assert nothing in message(lambda ddp=ddp: compress(ddp))
    assert nothing in message(lambda: compress(DDP(make())))
    groups = [dist.new_group([rank]) for rank in range(2)]
    ddp, _ = wrapped(False, converted={**RULE, "sync_selection": groups[dist.get_rank()]})
    assert nothing in message(lambda: compress(ddp))
    ddp, _ = wrapped(False, find_unused_parameters=True)
    assert "find_unused_parameters" in message(lambda: compress(ddp))
    ddp, _ = wrapped(False)
    ddp.register_comm_hook(None, default_hooks.allreduce_hook)
    assert "can only be called once" in message(lambda: compress(ddp))
