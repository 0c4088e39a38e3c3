"""Random channels: they repeat by seed, differ without, and disturb no other generator."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import functional
from ssprop_patch.core.selection import RandomScores
from ssprop_patch.ops.channel_scores import select_channels

DY = torch.zeros(2, 10, 3)


def draws(scores, n=5):
    return [scores(DY).tolist() for _ in range(n)]


def test_random_scores_repeat_with_the_seed_and_differ_without():
    assert draws(RandomScores(1)) == draws(RandomScores(1))
    assert draws(RandomScores(1)) != draws(RandomScores(2))
    first = draws(RandomScores(3), 50)
    assert len(set(map(tuple, first))) == 50
    neighbours = {tuple(s) for seed in range(50) for s in draws(RandomScores(seed), 10)}
    assert len(neighbours) == 500


def test_random_scores_start_from_torchs_seed():
    torch.manual_seed(7)
    one = draws(RandomScores())
    torch.rand(100)  # how much was drawn since does not matter
    assert draws(RandomScores()) == one
    torch.manual_seed(8)
    assert draws(RandomScores()) != one


def test_random_scores_go_on_from_two_integers():
    scores = RandomScores(5)
    draws(scores, 3)
    assert (scores.seed, scores.draws) == (5, 3)
    other = RandomScores(0)
    other.seed, other.draws = scores.seed, scores.draws
    assert draws(other) == draws(scores)


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_random_scores_survive_a_copy_and_go_their_own_way(way):
    scores = RandomScores(5)
    draws(scores, 3)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(scores))
    elif way == "deepcopy":
        other = copy.deepcopy(scores)
    else:
        torch.save(scores, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    ahead = draws(other)
    assert draws(scores) == ahead


def test_random_scores_leave_torchs_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    draws(RandomScores())
    draws(RandomScores(11))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**80, 0xFFFF_FFFF_FFFF_FFFF])
def test_any_integer_is_a_seed(seed):
    scores = RandomScores(seed)
    scores.draws = 2**40
    assert draws(scores) == draws(_at(seed, 2**40))


def _at(seed, n):
    scores = RandomScores(seed)
    scores.draws = n
    return scores


def test_random_channels_are_kept_equally_often():
    scores, kept = RandomScores(0), torch.zeros(10)
    for _ in range(2000):
        kept[select_channels(DY, 3, 1, scores)] += 1
    # Binomial(2000, 0.3): mean 600, standard deviation 20.5.
    assert (kept - 600).abs().max() < 5 * 20.5


def test_random_draws_of_the_functional_form_follow_torchs_seed():
    x, w = torch.randn(2, 3, 6, 6), torch.randn(12, 3, 3, 3, requires_grad=True)

    def kept():
        w.grad = None
        functional.conv2d(x, w, drop_rate=0.5, selection="random").sum().backward()
        return (w.grad.flatten(1) != 0).any(1).tolist()

    torch.manual_seed(1)
    first = [kept() for _ in range(4)]
    torch.manual_seed(1)
    assert [kept() for _ in range(4)] == first
    assert len(set(map(tuple, first))) > 1
    assert all(sum(row) == 6 for row in first)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 20, 3), nn.Conv2d(20, 20, 3)

    def forward(self, x):
        return self.two(nn.functional.dropout(self.one(x)))


def _kept(model, n=3):
    """Which channels of the two layers got a gradient, in each of n steps."""
    rows = []
    for _ in range(n):
        model.zero_grad()
        model(torch.ones(2, 3, 8, 8)).square().sum().backward()
        grads = (model.one.weight.grad, model.two.weight.grad)
        rows.append([(grad.flatten(1) != 0).any(1).tolist() for grad in grads])
    return rows


def test_random_in_a_converted_model_leaves_dropout_alone():
    kept, outputs, states = [], [], []
    for selection in ("l1", "random"):
        torch.manual_seed(0)
        model = ssp.convert(Net(), 0.5, selection=selection)
        kept.append(_kept(model, 2))
        outputs.append(model(torch.ones(1, 3, 8, 8)))
        states.append(torch.get_rng_state())
    assert kept[0] != kept[1]
    assert torch.equal(*outputs) and torch.equal(*states)


def test_random_in_a_converted_model_draws_for_each_layer_and_step():
    rows = _kept(ssp.convert(Net(), 0.5, selection="random"))
    flat = [tuple(layer) for row in rows for layer in row]
    assert all(sum(layer) == 10 for layer in flat)
    assert len(set(flat)) == len(flat)


def test_random_repeats_by_seed_and_resumes_from_a_checkpoint():
    def start():
        torch.manual_seed(4)
        return ssp.convert(Net(), 0.5, selection="random")

    model = start()
    first = _kept(model)
    assert _kept(start()) == first
    saved = ssp.get_controller(model).state_dict()
    going_on = _kept(model)

    torch.manual_seed(99)
    resumed = ssp.convert(Net(), 0.5, selection="random")
    assert _kept(resumed) != first
    ssp.get_controller(resumed).load_state_dict(saved)
    assert _kept(resumed) == going_on

    ssp.get_controller(resumed).manual_seed(4)
    assert _kept(resumed) == first
