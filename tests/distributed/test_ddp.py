"""Converted networks before DistributedDataParallel is put around them; see ddp_checks.py."""

from torch import nn

import ssprop_patch as ssp
from distributed import by_hand


def test_synchronised_batch_norm_may_be_put_in_after_conversion():
    net, plain = ssp.convert(by_hand.make(), by_hand.by_step()), by_hand.make()
    assert nn.SyncBatchNorm.convert_sync_batchnorm(net) is net
    assert isinstance(net.norm, nn.SyncBatchNorm)
    for model in (net, plain):
        model.norm.eval()  # it trains on accelerators only; evaluated it is an ordinary norm
    optimizer = by_hand.optimizer_for(net)
    by_hand.loss_of(net, by_hand.batch(0, 0)).backward()
    by_hand.masked_backward(plain, by_hand.batch(0, 0), by_hand.rate_at(0))
    by_hand.assert_same([by_hand.state_of(net)], [by_hand.state_of(plain)])
    optimizer.step()
    assert ssp.get_controller(net).drop_rate == by_hand.rate_at(1)
