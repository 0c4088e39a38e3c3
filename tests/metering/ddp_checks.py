"""A meter under DistributedDataParallel: run by distributed/test_two_processes.py."""

import torch
import torch.distributed as dist
from distributed.launch import Checks
from torch.nn.parallel import DistributedDataParallel

import ssprop_patch as ssp
from metering import by_hand
from metering.by_hand import RATES, by_step, counted, quiet_meter

check = Checks()


def train(model, call, steps):
    """Ranks train on batches of their own, the second on larger ones."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for i in range(steps):
        by_hand.loss_of(call(batch_of(dist.get_rank(), i))).backward()
        optimizer.step()
        optimizer.zero_grad()


def batch_of(rank, i):
    return by_hand.batch(10 * rank + i, n=2 + rank)


def expected_of(rank):
    return by_hand.by_summary(by_hand.net(), batch_of(rank, 0), RATES)


@check
def each_rank_counts_its_own_work_and_the_sum_is_that_of_both():
    model = ssp.convert(by_hand.net(), by_step())
    ddp = DistributedDataParallel(model)
    with quiet_meter(ddp) as meter:
        train(model, ddp, len(RATES))
        assert counted(meter) == expected_of(dist.get_rank())
        own, both = meter.report(), meter.report(all_ranks=True)
    assert own.ranks == 1 and both.ranks == 2
    assert [row.name for row in both.layers] == ["0", "2", "4"]
    sums = tuple(map(sum, zip(expected_of(0), expected_of(1), strict=True)))
    assert (both.forward_flops, both.dense_backward_flops, both.backward_flops) == sums
    assert both.steps == meter.steps == len(RATES)
    assert both.seconds.keys() == {"forward", "backward", "optimizer"}
    assert all(both.seconds[phase] >= own.seconds[phase] for phase in own.seconds)
    reports = [None, None]
    dist.all_gather_object(reports, both.to_json())
    assert reports[0] == reports[1]


@check
def a_meter_made_before_wrapping_counts_the_same():
    model = ssp.convert(by_hand.net(), by_step())
    with quiet_meter(model) as meter:
        train(model, DistributedDataParallel(model), len(RATES))
        assert counted(meter) == expected_of(dist.get_rank())
        assert meter.report().seconds.keys() == {"forward", "backward", "optimizer"}


@check
def averaged_gradients_are_those_without_a_meter():
    def gradients(metered):
        model = ssp.convert(by_hand.net(), 0.6)
        ddp = DistributedDataParallel(model)
        with quiet_meter(ddp) if metered else torch.enable_grad():
            by_hand.loss_of(ddp(batch_of(dist.get_rank(), 0))).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = gradients(False)
    torch.testing.assert_close(gradients(True), expected, rtol=0, atol=0)


@check
def the_state_of_a_wrapped_model_is_that_of_the_model():
    model = ssp.convert(by_hand.net(), by_step())
    ddp = DistributedDataParallel(model)
    with quiet_meter(ddp) as meter:
        train(model, ddp, 2)
        state, before = meter.state_dict(), counted(meter)
    with quiet_meter(model) as meter:
        meter.load_state_dict(state)
        assert counted(meter) == before


@check
def accumulation_without_synchronising_counts_every_pass():
    model = ssp.convert(by_hand.net(), 0.5)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with quiet_meter(ddp) as meter:
        with ddp.no_sync():
            by_hand.loss_of(ddp(batch_of(0, 0))).backward()
        by_hand.loss_of(ddp(batch_of(0, 1))).backward()
        optimizer.step()
        assert {row.totals.backwards for row in meter.report().layers} == {2}
        assert meter.steps == 1
