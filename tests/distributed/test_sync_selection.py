"""``sync_selection`` in a single process, where it changes nothing; on two, see sync_checks.py."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist

import ssprop_patch as ssp
from distributed import by_hand
from ssprop_patch.core import selection


@pytest.fixture
def world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def states(model, selection, **options):
    ssp.convert(model, by_hand.by_step(), selection=selection, **options)
    torch.manual_seed(1)
    ssp.get_controller(model).manual_seed(1)
    optimizer, found = by_hand.optimizer_for(model), []
    for step in range(2):
        by_hand.loss_of(model, by_hand.batch(0, step)).backward()
        optimizer.step()
        found.append(by_hand.state_of(model))
    return found


def largest(dy):
    return dy.amax((0, 2, 3))


@pytest.mark.parametrize("selection", ["l1", "l2", "random", largest])
def test_a_single_process_computes_as_without_it(selection):
    expected = states(by_hand.make(), selection)
    by_hand.assert_bit_equal(states(by_hand.make(), selection, sync_selection=True), expected)


@pytest.mark.parametrize("selection", ["l1", "random"])
def test_so_does_a_process_group_of_one_without_sending_anything(
    selection, world_of_one, monkeypatch
):
    expected = states(by_hand.make(), selection)

    def refuse(*args, **kwargs):
        raise AssertionError("communication")

    for name in ("all_reduce", "broadcast", "new_group", "barrier"):
        monkeypatch.setattr(dist, name, refuse)
    for sync in (True, dist.group.WORLD):
        by_hand.assert_bit_equal(states(by_hand.make(), selection, sync_selection=sync), expected)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("group", [False, True], ids=["all ranks", "group"])
def test_copies_and_pickles_work_in_a_single_process(make_copy, group, world_of_one):
    sync = dist.group.WORLD if group else True
    model = ssp.convert(by_hand.make(), 0.75, sync_selection=sync)
    twin = make_copy(model)
    for m in (model, twin):
        by_hand.loss_of(m, by_hand.batch(0, 0)).backward()
    by_hand.assert_bit_equal([by_hand.state_of(twin)], [by_hand.state_of(model)])


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_draws_random_channels_by_its_own_controller(make_copy):
    model = ssp.convert(by_hand.make(), 0.75, selection="random", sync_selection=True)
    twin = make_copy(model)
    ssp.get_controller(twin).manual_seed(5)
    by_hand.loss_of(twin, by_hand.batch(0, 0)).backward()
    assert ssp.get_controller(twin).state_dict()["draws"] == 5
    assert ssp.get_controller(model).state_dict()["draws"] == 0


@pytest.mark.parametrize("wrong", [1, 0, None, "yes", [0, 1]])
def test_anything_but_a_bool_or_a_process_group_is_a_type_error(wrong):
    model = by_hand.make()
    with pytest.raises(TypeError, match=r"sync_selection must be True, False or .*ProcessGroup"):
        ssp.convert(model, sync_selection=wrong)
    assert not ssp.is_converted(model)


def test_a_device_mesh_is_answered_with_how_to_get_its_group(world_of_one):
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    with pytest.raises(TypeError, match=r"mesh\.get_group"):
        ssp.convert(by_hand.make(), sync_selection=mesh)


def test_converting_again_without_it_takes_it_off():
    model = ssp.convert(by_hand.make(), 0.75, sync_selection=True)
    ssp.convert(model, 0.75)
    assert model.stem._ssprop_policy.rule.score_fn is selection.l1_scores
