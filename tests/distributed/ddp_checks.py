"""DistributedDataParallel around a converted network, and conversion of a wrapped one."""

import functools
import os
from pathlib import Path
from unittest import mock

import oracle
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

import ssprop_patch as ssp
from distributed import by_hand
from distributed.launch import Checks

check = Checks()

# A bucket for every few parameters, so that there are several.
SMALL_BUCKETS = {"bucket_cap_mb": 0.001}


@functools.cache
def expected(steps=2):
    return by_hand.train_by_hand(by_hand.make(), by_hand.RATES[:steps])


def wrapped(when, **kwargs):
    """The network, and DDP around it; converted before or after."""
    net = by_hand.make()
    if when == "before":
        ssp.convert(net, by_hand.by_step())
    ddp = DDP(net, **SMALL_BUCKETS, **kwargs)
    if when == "after":
        ssp.convert(ddp, by_hand.by_step())
    return net, ddp


def rates_of_all_ranks(module):
    rates = [None] * dist.get_world_size()
    dist.all_gather_object(rates, ssp.get_controller(module).drop_rate)
    return rates


def check_training(**kwargs):
    for when in ("before", "after"):
        net, ddp = wrapped(when, **kwargs)
        by_hand.assert_same(by_hand.train(ddp, net), expected())


@check
def each_rank_masks_its_gradient_and_ddp_averages_them():
    check_training()


@check
def with_gradients_as_views_of_the_buckets():
    check_training(gradient_as_bucket_view=True)


@check
def with_a_static_graph():
    check_training(static_graph=True)


@check
def with_a_search_for_unused_parameters():
    check_training(find_unused_parameters=True)


class Sometimes(nn.Module):
    """A branch that only some ranks use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.trunk = by_hand.Net()
        self.branch = nn.Conv2d(3, 8, 3)
        self.never = nn.Conv2d(3, 8, 3)

    def forward(self, x, with_branch):
        out = self.trunk(x)
        return out + self.branch(x).tanh().mean() if with_branch else out


@check
def a_layer_that_one_rank_does_not_use_counts_as_zero_there():
    model, plain = Sometimes().double(), Sometimes().double()
    ddp = DDP(ssp.convert(model, 0.75), find_unused_parameters=True)
    images, _ = by_hand.my_batch(0)
    ddp(images, dist.get_rank() == 0).pow(2).mean().backward()
    for rank in range(2):
        images, _ = by_hand.batch(rank, 0)
        with oracle.network(plain, 0.75):
            loss = plain(images, rank == 0).pow(2).mean() / 2
        loss.backward()
    assert model.never.weight.grad is None
    assert int(model.branch.weight.grad.flatten(1).any(1).sum()) == 2
    by_hand.assert_same([by_hand.state_of(model)], [by_hand.state_of(plain)])


@check
def accumulated_gradients_are_masked_one_by_one_and_count_as_one_step():
    net, ddp = wrapped("before")
    plain = by_hand.make()
    optimizer, reference = by_hand.optimizer_for(ddp), by_hand.optimizer_for(plain)
    for step in range(2):
        rate = by_hand.rate_at(step)
        with ddp.no_sync():
            by_hand.loss_of(ddp, by_hand.my_batch(10 * step)).backward()
        by_hand.loss_of(ddp, by_hand.my_batch(10 * step + 1)).backward()
        for rank in range(2):
            for micro in range(2):
                data = by_hand.batch(rank, 10 * step + micro)
                by_hand.masked_backward(plain, data, rate, share=2)
        by_hand.assert_same([by_hand.state_of(net)], [by_hand.state_of(plain)])
        for o in (optimizer, reference):
            o.step()
            o.zero_grad()
        assert rates_of_all_ranks(ddp) == [by_hand.rate_at(step + 1)] * 2


def compiled(module):
    return torch.compile(module, backend="aot_eager")


def compiled_ddp():
    net = ssp.convert(by_hand.make_small(), by_hand.by_step())
    return net, compiled(DDP(net, **SMALL_BUCKETS))


def ddp_of_a_compiled_network():
    net = ssp.convert(by_hand.make_small(), by_hand.by_step())
    return net, DDP(compiled(net), **SMALL_BUCKETS)


def converted_when_all_is_done():
    net = by_hand.make_small()
    return net, ssp.convert(compiled(DDP(net, **SMALL_BUCKETS)), by_hand.by_step())


@check
def compiled_around_ddp_inside_it_and_converted_last():
    want = by_hand.train_by_hand(by_hand.make_small(), by_hand.RATES)
    # So small that DDP's buckets split the graph, as they do in networks of the usual size.
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000):
        # The third step is dense, another graph to compile: once is enough.
        for build, steps in (
            (compiled_ddp, len(want)),
            (ddp_of_a_compiled_network, 2),
            (converted_when_all_is_done, 2),
        ):
            torch._dynamo.reset()
            net, model = build()
            by_hand.assert_same(by_hand.train(model, net, steps=steps), want[:steps])
            assert ssp.get_controller(model) is ssp.get_controller(net)
    torch._dynamo.reset()


@check
def all_ranks_have_the_same_rate_at_every_step_and_each_counts_for_itself():
    net, ddp = wrapped("before")
    assert ssp.get_controller(ddp) is ssp.get_controller(net)
    seen = [rates_of_all_ranks(ddp)]
    optimizer = by_hand.optimizer_for(ddp)
    for step in range(5):
        by_hand.loss_of(ddp, by_hand.my_batch(step)).backward()
        # No rank hears of another's rate: an optimizer step is all that counts.
        with mock.patch.object(dist, "all_reduce", side_effect=AssertionError("communication")):
            optimizer.step()
        seen.append(rates_of_all_ranks(ddp))
    assert seen == [[by_hand.rate_at(t)] * 2 for t in range(6)]


@check
def revert_makes_a_wrapped_network_dense_again():
    for when in ("before", "after"):
        net, ddp = wrapped(when)
        by_hand.train(ddp, net, steps=1)
        ssp.revert(ddp)
        net.load_state_dict(by_hand.make().state_dict())
        plain = DDP(by_hand.make(), **SMALL_BUCKETS)
        assert [type(m) for m in ddp.modules()] == [type(m) for m in plain.modules()]
        states = by_hand.train(ddp, net)
        by_hand.assert_bit_equal(states, by_hand.train(plain, plain.module))


@check
def the_keys_of_the_state_dict_are_those_of_the_plain_network_under_ddp():
    plain = DDP(by_hand.make())
    for when in ("before", "after"):
        assert list(wrapped(when)[1].state_dict()) == list(plain.state_dict())


def sharded_sgd(model):
    return ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)


def local_sgd(model):
    averager = PeriodicModelAverager(period=1, warmup_steps=0)
    return PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), averager)


@check
def the_steps_of_torchs_distributed_optimizers_count_once():
    for make_optimizer in (sharded_sgd, local_sgd):
        net, ddp = wrapped("before")
        with mock.patch.object(by_hand, "optimizer_for", make_optimizer):
            states = by_hand.train(ddp, net, steps=3)
        by_hand.assert_same(states, expected(steps=3))
        assert ssp.get_controller(net).t == 3


@check
def hooks_on_ddps_communication_see_the_masked_gradients():
    net, ddp = wrapped("before")
    ddp.register_comm_hook(None, default_hooks.allreduce_hook)
    by_hand.assert_same(by_hand.train(ddp, net), expected())

    # Before local SGD begins its hook averages, after that each rank steps by itself.
    net, ddp = wrapped("before")
    state = post_localSGD_hook.PostLocalSGDState(None, None, start_localSGD_iter=100)
    ddp.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
    by_hand.assert_same(by_hand.train(ddp, net), expected())


def bar_training(sync_selection, selection):
    """Two steps an epoch; dense, sparse, dense, ... epochs."""
    net = by_hand.make()
    schedule = ssp.BarSchedule(0.75, period=2)
    options = {"sync_selection": sync_selection, "selection": selection}
    ddp = DDP(ssp.convert(net, schedule, steps_per_epoch=2, **options), **SMALL_BUCKETS)
    return net, ddp, by_hand.optimizer_for(ddp)


def run(ddp, net, optimizer, steps):
    states = []
    for step in steps:
        optimizer.zero_grad()
        by_hand.loss_of(ddp, by_hand.my_batch(step)).backward()
        optimizer.step()
        states.append(by_hand.state_of(net))
    return states


@check
def a_resumed_run_is_bit_equal_to_one_that_was_not_interrupted():
    folder = Path(os.environ["OUTCOMES"])
    # In the middle of a sparse epoch (step 2 and 3), and where it ends.
    cases = [((False, "l1"), 4), ((True, "l1"), 3), ((True, "random"), 3)]
    for number, (case, stop) in enumerate(cases):
        net, ddp, optimizer = bar_training(*case)
        controller = ssp.get_controller(ddp)
        run(ddp, net, optimizer, range(stop))
        saved = folder / f"checkpoint-{number}"
        model_state, optimizer_state = get_state_dict(ddp, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.save({**state, "ssprop": controller.state_dict()}, checkpoint_id=saved)
        uninterrupted = run(ddp, net, optimizer, range(stop, 7))
        assert controller.t == 3

        torch.manual_seed(100 + dist.get_rank())  # a new process has another seed
        net, ddp, optimizer = bar_training(*case)
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
        controller = ssp.get_controller(ddp)
        model_state, optimizer_state = get_state_dict(ddp, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        state["ssprop"] = controller.state_dict()
        dcp.load(state, checkpoint_id=saved)
        set_state_dict(
            ddp, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        controller.load_state_dict(state["ssprop"])
        assert controller.t == stop // 2
        by_hand.assert_bit_equal(run(ddp, net, optimizer, range(stop, 7)), uninterrupted)
