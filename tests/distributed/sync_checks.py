"""``convert(..., sync_selection=True)``: all ranks keep the same channels, by all the data."""

import copy
import gc
import os
import pickle
import weakref

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import ssprop_patch as ssp
from distributed import by_hand, sync_directions
from distributed.fsdp_checks import needs_fsdp2
from distributed.sync_scores import (  # its checks run first
    SCORES,
    SYNC,
    check,
    gradient,
    kept,
    probe,
    rows,
    two_largest,
    watched,
)

assert sync_directions.check is check  # whose checks run, too

early = []  # converted before there was a process group
check.before.append(lambda: early.append(net(**SYNC)))


def net(schedule=None, **options):
    """Without batch norm, so that the parts of a batch have the gradients that the whole has."""
    return ssp.convert(by_hand.make(norm=False), schedule or by_hand.by_step(), **options)


def expected(steps=4, whole=True):
    return by_hand.train_by_hand(by_hand.make(norm=False), by_hand.RATES[:steps], whole=whole)


# --- whole networks -----------------------------------------------------------------------------


def check_same_as_one_process(module, wrapped, steps=4):
    by_hand.assert_same(by_hand.train(wrapped, module, steps), expected(steps))


@check
def before_there_is_a_process_group():
    module = early.pop()
    check_same_as_one_process(module, DDP(module))


@check
def under_ddp_the_gradients_are_those_of_one_process_with_all_the_data():
    module = net(**SYNC)
    check_same_as_one_process(module, DDP(module, bucket_cap_mb=0.001))
    module = by_hand.make(norm=False)
    ddp = DDP(module, bucket_cap_mb=0.001)
    check_same_as_one_process(module, ssp.convert(ddp, by_hand.by_step(), **SYNC))


@check
@needs_fsdp2
def under_fsdp_too():
    for when in ("before", "after"):
        module = net(**SYNC) if when == "before" else by_hand.make(norm=False)
        fully_shard(module.own)
        fully_shard(module)
        if when == "after":
            ssp.convert(module, by_hand.by_step(), **SYNC)
        check_same_as_one_process(module, module)


@check
def with_activation_checkpointing():
    module = net(**SYNC)
    names = [name for name, _ in module.named_parameters()]
    apply_activation_checkpointing(module, check_fn=lambda m: isinstance(m, nn.Conv2d))
    states = by_hand.train(DDP(module), module, 2)
    states = [
        {name.replace("_checkpoint_wrapped_module.", ""): t for name, t in state.items()}
        for state in states
    ]
    assert set(names) < set(states[0])
    by_hand.assert_same(states, expected(2))


@check
def compiled():
    torch._dynamo.reset()
    module = ssp.convert(by_hand.make_small(), by_hand.by_step(), **SYNC)
    model = torch.compile(DDP(module), backend="aot_eager")
    want = by_hand.train_by_hand(by_hand.make_small(), by_hand.RATES, whole=True)
    by_hand.assert_same(by_hand.train(model, module, 4), want)
    torch._dynamo.reset()


@check
def each_of_accumulated_gradients_has_the_channels_of_its_own_batch():
    module, plain = net(0.75, **SYNC), by_hand.make(norm=False)
    ddp = DDP(module)
    with watched() as calls:
        with ddp.no_sync():
            by_hand.loss_of(ddp, by_hand.my_batch(0)).backward()
        assert len(calls["all_reduce"]) == 5
        by_hand.loss_of(ddp, by_hand.my_batch(1)).backward()
        assert len(calls["all_reduce"]) == 10
    for step in range(2):
        by_hand.masked_backward(plain, by_hand.whole_batch(step), 0.75)
    by_hand.assert_same([by_hand.state_of(module)], [by_hand.state_of(plain)])


@check
def by_default_each_rank_keeps_its_own_channels_so_that_more_rows_are_not_zero():
    # Not the grouped one: the depthwise behind it lets the gradient of few channels through.
    layers = {"stem": 4, "depthwise": 4, "own": 3, "last": 5}
    found = {}
    for sync in (False, True):
        module = net(0.75, sync_selection=sync)
        ddp = DDP(module)  # averages as long as it lives
        by_hand.loss_of(ddp, by_hand.my_batch(0)).backward()
        grads = {layer: module.get_submodule(layer).weight.grad for layer in layers}
        found[sync] = {layer: len(rows(grad)) for layer, grad in grads.items()}
    assert found[True] == layers
    assert all(found[False][layer] > k for layer, k in layers.items()), found
    module = net(sync_selection=False)
    by_hand.assert_same(by_hand.train(DDP(module), module, 4), expected(4, whole=False))


# --- what it costs ------------------------------------------------------------------------------


@check
def it_costs_one_small_reduction_for_each_sparse_layer_and_backward():
    model = torchvision.models.resnet18(num_classes=5)
    layers = [row.module for row in ssp.plan(model).converted]
    ssp.convert(model, 0.8, **SYNC)
    images = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        with watched() as calls:
            model(images).sum().backward()
        sent = [call.args[0] for call in calls["all_reduce"]]
        assert len(sent) == len(layers) == 20
        assert sum(t.nbytes for t in sent) == 4 * sum(m.out_channels for m in layers) == 19200
        assert not calls["broadcast"] and not calls["barrier"] and not calls["all_gather"]


@check
def nothing_is_sent_at_rate_0_in_eval_or_where_nothing_is_dropped():
    conv = probe(**SYNC)
    with watched() as calls:
        with ssp.dense(conv):
            kept(conv, 0)
        kept(conv.eval(), 0)
        conv.train()
        with ssp.sparsity(conv, 0.01):  # 8 of 8 channels
            kept(conv, 0)
        assert not any(calls.values())
        kept(conv, 0)
        assert len(calls["all_reduce"]) == 1


@check
def all_models_share_one_process_group_that_is_not_the_default_one():
    with watched() as calls:
        for _ in range(2):
            kept(probe(**SYNC), 0)
    groups = [call.kwargs["group"] for call in calls["all_reduce"]]
    assert len(groups) == 2 and groups[0] is groups[1]
    assert groups[0] is not dist.group.WORLD and groups[0].size() == 2
    timeouts = [
        group._get_backend(torch.device("cpu")).options._timeout
        for group in (groups[0], dist.group.WORLD)
    ]
    assert timeouts[0] == timeouts[1]
    assert not calls["new_group"]  # made by an earlier check


# --- a process group of one's own ---------------------------------------------------------------


@check
def a_given_process_group_says_who_agrees():
    alone = [dist.new_group([rank]) for rank in range(2)]
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    mine, others = alone[dist.get_rank()], alone[1 - dist.get_rank()]
    for seed in range(8):
        by_itself = kept(probe(), seed)
        together = two_largest(SCORES["l1"]([gradient(rank, seed) for rank in range(2)]))
        assert kept(probe(sync_selection=mine), seed) == by_itself
        assert kept(probe(sync_selection=mesh.get_group("replicate")), seed) == by_itself
        assert kept(probe(sync_selection=mesh.get_group("shard")), seed) == together
        assert kept(probe(sync_selection=dist.group.WORLD), seed) == together
    try:
        probe(sync_selection=others)
    except ValueError as error:
        assert "this rank is not in" in str(error)
    else:
        raise AssertionError("no error")


@check
def copies_and_pickles_agree_too():
    want = [two_largest(SCORES["l1"]([gradient(r, seed) for r in range(2)])) for seed in range(8)]
    conv = probe(**SYNC)
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert [kept(twin, seed) for seed in range(8)] == want
    # A copy has the group that was given; a pickle cannot, and says so.
    group = dist.new_group([0, 1])
    conv = probe(sync_selection=group)
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    by_itself = [kept(probe(), seed) for seed in range(8)]
    assert by_itself != want
    for given, channels in ((group, want), (alone, by_itself)):
        twin = copy.deepcopy(probe(sync_selection=given))
        assert [kept(twin, seed) for seed in range(8)] == channels
    loaded = pickle.loads(pickle.dumps(conv))
    with ssp.dense(loaded):
        kept(loaded, 0)
    assert_gone(lambda: kept(loaded, 0))
    ssp.convert(loaded, 0.75, sync_selection=group)
    assert [kept(loaded, seed) for seed in range(8)] == want


def assert_gone(call):
    try:
        call()
    except RuntimeError as error:
        assert "convert the model again" in str(error)
    else:
        raise AssertionError("no error")


@check
def models_outlive_process_groups_without_keeping_them_and_agree_in_the_next():
    # A destroyed group that is still held makes gloo abort at the end of the process.
    ours, given = probe(**SYNC), probe(sync_selection=dist.new_group([0, 1]))
    with watched() as calls:
        for conv in (ours, given):
            want = kept(conv, 0)
        groups = [weakref.ref(call.kwargs["group"]) for call in calls["all_reduce"]]
    assert len(groups) == 2 and all(group() is not None for group in groups)
    del calls
    gc.collect()
    rank = dist.get_rank()
    dist.destroy_process_group()
    assert all(group() is None for group in groups)

    assert kept(ours, 0, rank) == two_largest(SCORES["l1"]([gradient(rank, 0)]))  # alone
    store = dist.FileStore(os.path.join(os.environ["OUTCOMES"], "second"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with watched() as calls:
        assert kept(ours, 0) == want
        assert kept(probe(**SYNC), 0) == want
    assert len(calls["new_group"]) == 1
    assert_gone(lambda: kept(given, 0))
