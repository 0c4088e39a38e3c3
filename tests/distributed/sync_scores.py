"""``sync_selection`` on single layers whose gradient is known: which channels all ranks keep."""

import contextlib
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import ssprop_patch as ssp
from distributed import by_hand
from distributed.launch import Checks

check = Checks()
SYNC = {"sync_selection": True}


@contextlib.contextmanager
def watched():
    """Yield the calls of each collective that the package may make."""
    names = ("all_reduce", "broadcast", "new_group", "barrier", "all_gather")
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                mock.patch.object(dist, name, wraps=getattr(dist, name))
            ).mock_calls
            for name in names
        }


def rows(grad):
    return by_hand.full(grad).flatten(1).any(1).nonzero().flatten().tolist()


def gradient(rank, seed):
    """dy of one rank, (N, C, H, W); channels differ in size and in how it is spread."""
    generator = torch.Generator().manual_seed(10 * seed + rank)
    dy = torch.randn(3, 8, 4, 4, generator=generator, dtype=torch.float64)
    sizes = torch.rand(8, 1, 1, generator=generator, dtype=torch.float64) + 0.5
    return dy.pow(5) * sizes


def kept(layer, seed, rank=None):
    """The channels that a backward with the known gradient keeps."""
    layer.bias.grad = None
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    dy = gradient(dist.get_rank() if rank is None else rank, seed)
    if isinstance(layer, nn.Linear):
        x, dy = x.movedim(1, -1), dy.movedim(1, -1)
    layer(x).backward(dy)
    return layer.bias.grad.nonzero().flatten().tolist()


def probe(**options):
    torch.manual_seed(0)
    return ssp.convert(nn.Conv2d(2, 8, 1).double(), 0.75, **options)


def two_largest(scores):
    return sorted(sorted(range(8), key=lambda c: float(scores[c]), reverse=True)[:2])


def per_channel(dy):
    return dy.transpose(0, 1).flatten(1)


SCORES = {
    "l1": lambda both: per_channel(torch.cat(both)).abs().mean(1),
    "l2": lambda both: per_channel(torch.cat(both)).square().sum(1).sqrt(),
    "callable": lambda both: sum(per_channel(dy).amax(1) for dy in both) / 2,
}


def largest(dy):
    return dy.amax((0, 2, 3))


SELECTIONS = {"l1": "l1", "l2": "l2", "callable": largest}


@check
def scores_are_those_of_the_whole_batch_or_the_mean_of_those_of_the_ranks():
    for name, selection in SELECTIONS.items():
        synced, alone = probe(selection=selection, **SYNC), probe(selection=selection)
        differs_from_rank = set()
        for seed in range(8):
            both = [gradient(rank, seed) for rank in range(2)]
            want = two_largest(SCORES[name](both))
            assert kept(synced, seed) == want, (name, seed)
            for rank in range(2):
                if kept(alone, seed, rank) != want:
                    differs_from_rank.add(rank)
        assert differs_from_rank == {0, 1}, "no seed tells the two apart"
    by_l1 = [two_largest(SCORES["l1"]([gradient(r, s) for r in range(2)])) for s in range(8)]
    by_l2 = [two_largest(SCORES["l2"]([gradient(r, s) for r in range(2)])) for s in range(8)]
    assert by_l1 != by_l2


@check
def linear_layers_and_transposed_convolutions_agree_as_well():
    for layer in (nn.Linear(2, 8), nn.ConvTranspose2d(2, 8, 1)):
        ssp.convert(layer.double(), 0.75, types=type(layer), **SYNC)
        for seed in range(4):
            both = [gradient(rank, seed) for rank in range(2)]
            assert kept(layer, seed) == two_largest(SCORES["l1"](both))


@check
def ranks_count_the_same_whatever_their_batch_sizes():
    conv = probe(**SYNC)
    parts = [gradient(0, 1), gradient(1, 1)[:1]]
    mine = parts[dist.get_rank()]
    conv(torch.ones(len(mine), 2, 4, 4, dtype=torch.float64)).backward(mine)
    assert rows(conv.weight.grad) == two_largest(sum(per_channel(p).abs().sum(1) for p in parts))


@check
def a_function_may_return_scores_of_any_type_and_keep_them():
    mine = torch.arange(8) if dist.get_rank() else torch.tensor([9, 0, 0, 0, 8, 0, 0, 0])
    types = (torch.int64, torch.int8, torch.float16, torch.bfloat16, torch.float64)
    for scores in (mine > 8, *(mine.to(dtype) for dtype in types)):
        before = scores.clone()
        conv = probe(selection=lambda dy, scores=scores: scores, **SYNC)
        want = [0, 4] if scores.dtype != torch.bool else None
        for seed in range(2):
            found = kept(conv, seed)
            assert 0 in found if want is None else found == want
            assert torch.equal(scores, before)


@check
def scores_of_the_wrong_shape_are_an_error_as_ever():
    for wrong in (lambda dy: dy.sum(), lambda dy: [1.0] * 8):
        try:
            kept(probe(selection=wrong, **SYNC), 0)
        except ValueError as error:
            assert "one score per output channel" in str(error)
        else:
            raise AssertionError("no error")


@check
def half_precision_gradients_are_summed_in_single_precision():
    # Larger together than float16 can hold, and apart by less than it can tell.
    for dtype in (torch.float16, torch.bfloat16):
        conv = probe(**SYNC).to(dtype)
        sums = torch.tensor([60000.0, 60001, 60002, 60003, 60004, 60005, 60006, 60007])
        dy = torch.zeros(1, 8, 8, 1)
        dy[0, :, 0, 0] = 59904.0  # exact in both types
        dy[0, :, 1, 0] = sums - 59904.0 if dist.get_rank() else (sums - 59904.0).flip(0) / 2
        conv(torch.zeros(1, 2, 8, 1, dtype=dtype)).backward(dy.to(dtype))
        assert conv.bias.grad.nonzero().flatten().tolist() == [6, 7]


# --- random -------------------------------------------------------------------------------------


@check
def random_channels_are_the_same_whatever_each_rank_was_seeded_with():
    torch.manual_seed(dist.get_rank())
    controller = ssp.SparsityController(0.75)
    controller.random_scores.draws = 3 * dist.get_rank()
    first, second = nn.Conv2d(2, 8, 1).double(), nn.Conv2d(2, 8, 1).double()
    for conv in (first, second):
        ssp.convert(conv, controller=controller, selection="random", **SYNC)
    with watched() as calls:
        mine = [kept(conv, seed) for seed in range(4) for conv in (first, second)]
    assert not calls["all_reduce"]
    assert len(calls["broadcast"]) == 2  # the seed, once for each conversion, and nothing after it
    everyones = [None, None]
    dist.all_gather_object(everyones, (mine, controller.state_dict()))
    assert everyones[0] == everyones[1]
    assert len({tuple(channels) for channels in mine}) > 1
    alone = ssp.SparsityController(0.75, seed=0)  # the first rank's
    conv = ssp.convert(nn.Conv2d(2, 8, 1).double(), controller=alone, selection="random")
    assert [kept(conv, 0) for _ in mine] == mine


@check
def random_channels_go_on_where_a_checkpoint_was_taken():
    torch.manual_seed(dist.get_rank())
    conv = probe(selection="random", **SYNC)
    for seed in range(3):
        kept(conv, seed)
    state = ssp.get_controller(conv).state_dict()
    after = [kept(conv, 0) for _ in range(4)]
    resumed = probe(selection="random", **SYNC)
    ssp.get_controller(resumed).load_state_dict(state)
    assert [kept(resumed, 0) for _ in range(4)] == after
