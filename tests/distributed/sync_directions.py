"""``sync_selection`` and directions: those of the whole batch, the same on all ranks."""

import copy

import torch
import torch.distributed as dist
from patching.by_reference import TYPES, images, loss, make, subspaces
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import ssprop_patch as ssp
from distributed import by_hand
from distributed.fsdp_checks import needs_fsdp2
from distributed.sync_scores import SYNC, check, gradient, watched


def bases(model):
    return {
        (name, key): basis for name, s in subspaces(model).items() for key, basis in s.bases.items()
    }


def of_ranks(t):
    """The tensor of each rank."""
    found = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(found, t.contiguous())
    return found


@check
def covariances_are_those_of_the_whole_batch():
    for rule in ({}, {"remainder": "coarse"}):
        conv = nn.Conv2d(2, 8, 3, padding=1).double()
        ssp.convert(conv, 0.75, selection="principal", **rule, **SYNC)
        expected = None
        for seed in range(3):
            conv(torch.ones(3, 2, 4, 4).double()).backward(gradient(dist.get_rank(), seed))
            both = torch.cat([gradient(rank, seed) for rank in range(2)])
            s = torch.einsum("nchw,ndhw->cd", both, both)
            s = s / s.trace()
            expected = s if expected is None else 0.5 * expected + 0.5 * s
        torch.testing.assert_close(subspaces(conv)[""].bases["dy"].covariance[0], expected)


@check
def all_ranks_have_the_same_directions():
    for sync in (True, False):
        torch.manual_seed(0)
        net = make()
        net.norm = nn.GroupNorm(4, 16).double()
        ssp.convert(net, 0.7, types=TYPES, selection="principal", remainder="coarse", **SYNC)
        if not sync:
            ssp.convert(net, 0.7, types=TYPES, selection="principal", remainder="coarse")
        model = DDP(net)
        for seed in range(4):
            model.zero_grad()
            loss(model, images(2 * seed + dist.get_rank())).backward()
        found = bases(net)
        assert len(found) == 7
        same = [
            all(torch.equal(of_ranks(t)[0], of_ranks(t)[1]) for t in (b.covariance, b.vectors))
            for b in found.values()
        ]
        assert all(same) if sync else not any(same), same
        for p in net.parameters():
            first, second = of_ranks(p.grad)
            assert torch.equal(first, second)


@check
def all_ranks_choose_the_same_channels_ahead():
    for sync in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3))
        options = SYNC if sync else {}
        ssp.convert(net.double(), 0.7, selection="ahead", remainder="coarse", **options)
        model = DDP(net)
        for step in range(6):
            # One rank has nothing in one of the steps, and still takes part in its choice.
            number = 0 if (sync, step, dist.get_rank()) == (True, 2, 1) else 2
            seed = 2 * step + dist.get_rank()
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(number, 3, 8, 8, generator=generator, dtype=torch.float64)
            model(x).square().sum().backward()
        for layer in (net[0], net[2]):
            scores = layer._ssprop_policy.rule.ahead
            first, second = of_ranks(scores.mean)
            assert torch.equal(first, second) == sync
            assert scores.passes == 6


@check
def only_refreshes_of_directions_are_sent():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3).double()
    ssp.convert(conv, 0.75, selection="principal", **SYNC)
    sent = []
    for seed in range(6):
        with watched() as calls:
            conv(images(seed)).pow(2).sum().backward()
        sent.append([call.args[0].numel() for call in calls["all_reduce"]])
    assert sent == [[64], [64], [64], [], [64], []]
    twin = copy.deepcopy(conv)
    with watched() as calls:
        for _ in range(3):
            twin(images()).pow(2).sum().backward()
    assert len(calls["all_reduce"]) == 1  # the ninth pass


@check
def what_is_not_finite_on_one_rank_refreshes_nothing_on_any():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3).double()
    ssp.convert(conv, 0.75, selection="principal", **SYNC)
    conv(images()).pow(2).sum().backward()
    before = subspaces(conv)[""].bases["dy"].covariance.clone()
    scale = torch.inf if dist.get_rank() else 1.0
    (conv(images(1)).pow(2).sum() * scale).backward()
    assert torch.equal(subspaces(conv)[""].bases["dy"].covariance, before)


@check
def a_rank_with_fewer_samples_or_none_takes_part_in_whatever_the_other_does():
    for selection, remainder in (("l1", "coarse"), ("principal", None), ("principal", "coarse")):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 1)).double()
        ssp.convert(net, 0.6, selection=selection, remainder=remainder, **SYNC)
        for number in range(6):  # refreshes, and two passes without one
            # One sample: of so few positions turning the weight of one process would not pay.
            samples = 4 if dist.get_rank() == 0 else (1, 0, 0, 1, 0, 1)[number]
            net(torch.randn(samples, 3, 6, 6).double()).square().sum().backward()
        for basis in bases(net).values():
            first, second = of_ranks(basis.vectors)
            assert torch.equal(first, second)


def trained(wrap, steps=4):
    """The gradients of each step, and the directions after them."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 64, 1)).double()
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    model, found = wrap(net), []
    for seed in range(steps):
        model.zero_grad()
        out = model(images(2 * seed + dist.get_rank()))
        (out * torch.linspace(0.1, 1, 64).view(-1, 1, 1)).square().sum().backward()
        found.append([by_hand.full(p.grad).clone() for p in net.parameters()])
    return found, bases(net)


@check
@needs_fsdp2
def directions_are_the_same_under_fsdp2_and_compiled():
    def converted(net):
        return ssp.convert(net, 0.7, selection="principal", **SYNC)

    def sharded(net):
        for part in (net[0], net):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        return net

    def compiled(model):
        return torch.compile(model, backend="aot_eager")

    expected, expected_bases = trained(lambda net: DDP(converted(net)))
    assert len(expected_bases) == 3  # of dy, and of dX and dW of the expanding one
    for wrap in (
        lambda net: sharded(converted(net)),
        lambda net: converted(sharded(net)),
        lambda net: compiled(DDP(converted(net))),
        lambda net: DDP(compiled(converted(net))),
        lambda net: compiled(sharded(converted(net))),
    ):
        torch._dynamo.reset()
        found, found_bases = trained(wrap)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        for key, basis in expected_bases.items():
            name = next(k for k in found_bases if k[0].endswith(key[0]) and k[1] == key[1])
            found_basis = found_bases[name]
            torch.testing.assert_close(found_basis.covariance, basis.covariance)
            assert torch.equal(*of_ranks(found_basis.vectors))
    torch._dynamo.reset()
