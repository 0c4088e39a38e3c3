"""fully_shard (FSDP2) and FullyShardedDataParallel (FSDP1) with converted networks."""

import functools
import os
from pathlib import Path

import oracle
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)

import ssprop_patch as ssp
from distributed import by_hand
from distributed.launch import Checks, Unavailable

check = Checks()

#: What gets a shard group of its own: a convolution itself, one with its own forward, a part.
SHARDED = ("stem", "own", "last")


@functools.cache
def mesh():
    return init_device_mesh("cpu", (2,))


@functools.cache
def without_fsdp2():
    """Why torch cannot train a plain network under fully_shard on this machine; None if it can."""
    try:
        net = fully_shard(by_hand.make(), mesh=mesh())
        by_hand.loss_of(net, by_hand.my_batch(0)).backward()
    except Exception as error:
        return f"torch {torch.__version__} cannot fully_shard a plain network here: {error}"
    return None


def needs_fsdp2(function):
    @functools.wraps(function)
    def wrapper():
        if without_fsdp2():
            raise Unavailable(without_fsdp2())
        function()

    return wrapper


@functools.cache
def expected(steps=2):
    return by_hand.train_by_hand(by_hand.make(), by_hand.RATES[:steps])


def shard(net, parts=SHARDED, **kwargs):
    for name in parts:
        fully_shard(net.get_submodule(name), mesh=mesh(), **kwargs)
    return fully_shard(net, mesh=mesh(), **kwargs)


def sharded(when, schedule=None, **kwargs):
    """The network, sharded; converted before or after."""
    net, schedule = by_hand.make(), schedule or by_hand.by_step()
    if when == "before":
        ssp.convert(net, schedule)
    shard(net, **kwargs)
    if when == "after":
        ssp.convert(net, schedule)
    return net


@check
@needs_fsdp2
def each_rank_masks_its_gradient_and_fsdp2_averages_them():
    for when in ("before", "after"):
        for kwargs in ({}, {"reshard_after_forward": False}, {"parts": ()}):
            net = sharded(when, **kwargs)
            by_hand.assert_same(by_hand.train(net, net), expected())


@check
@needs_fsdp2
def the_optimizer_may_be_older_than_the_conversion():
    net = shard(by_hand.make())
    optimizer = by_hand.optimizer_for(net)
    ssp.convert(net, by_hand.by_step())
    for step in range(3):
        by_hand.loss_of(net, by_hand.my_batch(step)).backward()
        optimizer.step()
        rates = [None] * 2
        dist.all_gather_object(rates, ssp.get_controller(net).drop_rate)
        assert rates == [by_hand.rate_at(step + 1)] * 2


@check
@needs_fsdp2
def accumulated_gradients_are_masked_one_by_one():
    net, plain = sharded("before", 0.75), by_hand.make()
    for micro in range(2):
        net.set_requires_gradient_sync(micro == 1)
        by_hand.loss_of(net, by_hand.my_batch(micro)).backward()
        for rank in range(2):
            by_hand.masked_backward(plain, by_hand.batch(rank, micro), 0.75, share=2)
    by_hand.assert_same([by_hand.state_of(net)], [by_hand.state_of(plain)])


@check
@needs_fsdp2
def with_activation_checkpointing():
    def is_part(module):
        return isinstance(module, nn.Conv2d)

    for when in ("before", "after"):
        net = by_hand.make()
        if when == "before":
            ssp.convert(net, by_hand.by_step())
        apply_activation_checkpointing(net, check_fn=is_part)
        if when == "after":
            ssp.convert(net, by_hand.by_step())
        fully_shard(net, mesh=mesh())
        states = [
            {name.replace("_checkpoint_wrapped_module.", ""): t for name, t in state.items()}
            for state in by_hand.train(net, net)
        ]
        by_hand.assert_same(states, expected())


@check
@needs_fsdp2
def compiled():
    want = by_hand.train_by_hand(by_hand.make_small(), by_hand.RATES)
    for when, steps in (("before", len(want)), ("after", 2)):  # the third step is dense
        torch._dynamo.reset()
        net = by_hand.make_small()
        if when == "before":
            ssp.convert(net, by_hand.by_step())
        shard(net, parts="02")
        if when == "after":
            ssp.convert(net, by_hand.by_step())
        model = torch.compile(net, backend="aot_eager")
        by_hand.assert_same(by_hand.train(model, net, steps=steps), want[:steps])
    torch._dynamo.reset()


@check
@needs_fsdp2
def revert_and_convert_say_that_fsdp_has_to_come_off_first_and_change_nothing():
    net = sharded("before")
    classes = [type(m) for m in net.modules()]
    for call in (ssp.revert, functools.partial(ssp.convert, schedule=0.5)):
        try:
            call(net)
        except ValueError as error:
            message = str(error)
        else:
            raise AssertionError(f"{call} did not refuse")
        for name in SHARDED:
            assert name in message
        assert "FSDP" in message and "was put on after conversion" in message
        assert "grouped" not in message  # not sharded by itself: nothing is in its way
    assert [type(m) for m in net.modules()] == classes
    by_hand.assert_same(by_hand.train(net, net), expected())


@check
@needs_fsdp2
def revert_takes_off_what_was_converted_after_sharding():
    plain = shard(by_hand.make())
    states = by_hand.train(plain, plain)
    # Where only modules around the convolutions are sharded the order does not matter.
    for when, parts in (("after", SHARDED), ("before", ())):
        net = sharded(when, parts=parts)
        ssp.revert(net)
        assert not ssp.is_converted(net)
        assert type(net.stem).__name__ == ("FSDPConv2d" if parts else "Conv2d")
        by_hand.assert_same(by_hand.train(net, net), states)


@check
@needs_fsdp2
def mixed_precision_computes_in_bfloat16_and_keeps_as_many_channels():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    class Small(nn.Sequential):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__(
                nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 5)
            )

    images, labels = by_hand.my_batch(0, torch.float32)
    for when in ("before", "after"):
        net, plain, seen = Small(), shard(Small(), parts="02", mp_policy=policy), []
        if when == "before":
            ssp.convert(net, 0.75)
        shard(net, parts="02", mp_policy=policy)
        if when == "after":
            ssp.convert(net, 0.75)
        net[2].register_full_backward_hook(lambda m, dx, dy, seen=seen: seen.append(dy[0].dtype))
        by_hand.loss_of(net, (images, labels)).backward()
        with oracle.network(plain, 0.75):
            loss = by_hand.loss_of(plain, (images, labels))
        loss.backward()
        assert seen == [torch.bfloat16]
        for name in ("2.weight", "2.bias", "4.weight"):
            grad = by_hand.full(net.get_parameter(name).grad)
            want = by_hand.full(plain.get_parameter(name).grad)
            assert grad.dtype == torch.float32
            assert torch.equal(grad.ne(0), want.ne(0))
            # Each rank rounds its gradient to bfloat16 once, and here alone the two may differ.
            torch.testing.assert_close(grad, want, rtol=2**-7, atol=2**-8 * float(want.abs().max()))


def bar_training(sync_selection):
    """Two steps an epoch; dense, sparse, dense, ... epochs."""
    net = by_hand.make()
    schedule = ssp.BarSchedule(0.75, period=2)
    shard(ssp.convert(net, schedule, steps_per_epoch=2, sync_selection=sync_selection))
    return net, by_hand.optimizer_for(net)


def run(net, optimizer, steps):
    states = []
    for step in steps:
        optimizer.zero_grad()
        by_hand.loss_of(net, by_hand.my_batch(step)).backward()
        optimizer.step()
        states.append(by_hand.state_of(net))
    return states


class AppState:
    """What a training saves: torch's own recipe, and the controller beside it."""

    def __init__(self, net, optimizer):
        self.net, self.optimizer = net, optimizer

    def state_dict(self):
        model, optimizer = get_state_dict(self.net, self.optimizer)
        ssprop = ssp.get_controller(self.net).state_dict()
        return {"model": model, "optimizer": optimizer, "ssprop": ssprop}

    def load_state_dict(self, state):
        set_state_dict(
            self.net,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        ssp.get_controller(self.net).load_state_dict(state["ssprop"])


@check
@needs_fsdp2
def a_resumed_run_is_bit_equal_to_one_that_was_not_interrupted():
    folder = Path(os.environ["OUTCOMES"])
    # In the middle of a sparse epoch (steps 2 and 3), and where it ends.
    for sync_selection, stop in ((False, 4), (True, 3)):
        net, optimizer = bar_training(sync_selection)
        run(net, optimizer, range(stop))
        saved = folder / f"checkpoint-{sync_selection}-{stop}"
        dcp.save({"app": AppState(net, optimizer)}, checkpoint_id=saved)
        uninterrupted = run(net, optimizer, range(stop, 7))
        assert ssp.get_controller(net).t == 3

        net, optimizer = bar_training(sync_selection)
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
        dcp.load({"app": AppState(net, optimizer)}, checkpoint_id=saved)
        assert ssp.get_controller(net).t == stop // 2
        by_hand.assert_bit_equal(run(net, optimizer, range(stop, 7)), uninterrupted)


@check
def fsdp1_with_original_parameters():
    for when in ("before", "after"):
        net = by_hand.make()
        if when == "before":
            ssp.convert(net, by_hand.by_step())
        fsdp = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
        if when == "after":
            ssp.convert(fsdp, by_hand.by_step())
        assert ssp.get_controller(fsdp) is ssp.get_controller(net)
        optimizer = by_hand.optimizer_for(fsdp)
        for step in range(2):
            optimizer.zero_grad()
            by_hand.loss_of(fsdp, by_hand.my_batch(step)).backward()
            optimizer.step()
            with FullyShardedDataParallel.summon_full_params(fsdp, with_grads=True):
                state = {
                    name.replace("_fsdp_wrapped_module.", ""): t
                    for name, t in by_hand.state_of(fsdp).items()
                }
            by_hand.assert_same([state], [expected()[step]])
        ssp.revert(fsdp)
        assert not ssp.is_converted(fsdp)
