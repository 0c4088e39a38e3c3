"""Principal directions: what they are, when they are refreshed, and what must not change them."""

import copy
import io
import pickle
from math import inf

import pytest
import torch

from ssprop_patch import Principal, Subspace
from ssprop_patch.core.principal import Basis, cheaper_side, projected_share

CPU = torch.device("cpu")


def sample(d, groups=1, seed=0, decay=0.7, n=200):
    """A covariance whose directions' energies fall off; of all seeds nearly the same directions."""
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(77)
    rows = torch.randn(groups, n, d, generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(groups, d, d, generator=fixed, dtype=torch.float64)).Q
    rows = rows * decay ** torch.arange(d) @ turn
    return rows.mT @ rows


def energy(vectors, covariance):
    """The share of the covariance's trace that the directions hold."""
    held = torch.einsum("gck,gcd,gdk->g", vectors, covariance, vectors)
    return held / covariance.diagonal(dim1=1, dim2=2).sum(1)


def basis_of(*samples, momentum=0.5):
    basis = Basis()
    for one in samples:
        basis.begin_pass()
        basis.add(one, momentum)
    return basis


# --- the directions ---------------------------------------------------------------------------


def test_each_group_has_its_leading_eigenvectors():
    s = sample(12, groups=3)
    basis = basis_of(s)
    basis.turn(4, None)
    u = basis.vectors
    assert u.shape == (3, 12, 4) and basis.fits(4) and not basis.fits(5)
    torch.testing.assert_close(u.mT @ u, torch.eye(4).double().expand(3, 4, 4))
    for group in range(3):
        expected = torch.linalg.eigvalsh(s[group]).flip(0)[:4]
        torch.testing.assert_close((u[group].T @ s[group] @ u[group]).diagonal(), expected)


@pytest.mark.parametrize("k", [19, 38])
def test_of_a_wide_layer_iterations_hold_nearly_the_energy_of_eigh(k):
    covariances = [sample(192, seed=n, decay=0.97, n=400) for n in range(3)]
    mixed, basis = None, Basis()
    for s in covariances:
        basis.begin_pass()
        basis.add(s, 0.5)
        basis.turn(k, None)
        trace = s.diagonal(dim1=1, dim2=2).sum()
        mixed = s / trace if mixed is None else 0.5 * mixed + 0.5 * s / trace
        torch.testing.assert_close(basis.covariance, mixed)
        best = torch.linalg.eigvalsh(mixed)[0, -k:].sum()
        assert energy(basis.vectors, mixed) > 0.97 * best
        u = basis.vectors
        torch.testing.assert_close(u.mT @ u, torch.eye(k).double()[None])


def test_iterations_on_one_covariance_reach_eigh():
    s = sample(192, decay=0.9)
    basis = basis_of(s)
    for _ in range(12):
        basis.turn(20, None, warm=True)
    best = torch.linalg.eigvalsh(s)[0, -20:].sum() / s[0].trace()
    torch.testing.assert_close(energy(basis.vectors, s)[0], best, rtol=1e-5, atol=0)


@pytest.mark.parametrize("d", [16, 192])
def test_more_or_fewer_directions_are_asked_for(d):
    s = sample(d, decay=0.9)
    basis = basis_of(s)
    for k in (4, 9, 3, d):
        basis.turn(k, None)
        assert basis.vectors.shape == (1, d, k)
        torch.testing.assert_close(basis.vectors.mT @ basis.vectors, torch.eye(k).double()[None])
        assert (
            energy(basis.vectors, s) > 0.95 * torch.linalg.eigvalsh(s)[0, -k:].sum() / s[0].trace()
        )


@pytest.mark.parametrize("d", [16, 192])
def test_a_covariance_without_content_still_has_directions(d):
    basis = basis_of(torch.zeros(1, d, d))
    basis.turn(4, None)
    torch.testing.assert_close(basis.vectors.mT @ basis.vectors, torch.eye(4)[None])


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_energy_takes_the_fewest_directions_that_hold_it(share):
    s = sample(20, decay=0.8)
    basis = basis_of(s)
    basis.turn(2, share)
    values = torch.linalg.eigvalsh(s)[0].flip(0)
    shares = values.cumsum(0) / values.sum()
    enough = next(n for n in range(1, 21) if shares[n - 1] >= share * (1 - 1e-6))
    assert basis.vectors.shape[2] == max(2, enough)
    assert basis.fits(2)  # and is not computed again for the same question


def test_energy_of_several_groups_is_that_of_the_neediest():
    flat, steep = torch.eye(10).double()[None], sample(10, decay=0.1)
    basis = basis_of(torch.cat([flat, steep]))
    basis.turn(1, 0.75)
    assert basis.vectors.shape == (2, 10, 8)


# --- what is remembered -----------------------------------------------------------------------


def test_momentum():
    a, b = sample(6, seed=1), sample(6, seed=2)
    found = basis_of(a, b, momentum=0.25).covariance
    expected = 0.25 * a / a[0].trace() + 0.75 * b / b[0].trace()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(basis_of(a, b, momentum=0.0).covariance, b / b[0].trace())


def test_calls_of_one_pass_are_summed():
    a, b, c = (sample(6, seed=n) for n in range(3))
    basis = basis_of(a)
    basis.begin_pass()
    basis.add(b, 0.5)
    basis.add(c, 0.5)
    expected = basis_of(a, b + c)
    torch.testing.assert_close(basis.covariance, expected.covariance)


@pytest.mark.parametrize("wrong", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("first", [False, True])
def test_a_sample_that_is_not_finite_or_zero_changes_nothing(wrong, first):
    before = () if first else (sample(5, groups=2),)
    bad = sample(5, groups=2, seed=3)
    bad[1] = bad[1] * wrong
    basis = basis_of(*before, bad)
    unharmed = torch.zeros(5, 5).double() if first else basis_of(*before).covariance[1]
    assert torch.equal(basis.covariance[1], unharmed)
    torch.testing.assert_close(
        basis.covariance[0], basis_of(*before, bad[:1].repeat(2, 1, 1)).covariance[0]
    )
    basis.turn(2, None)
    assert basis.vectors.isfinite().all()


def test_one_bad_call_of_a_pass_spoils_that_pass_alone():
    a, b, bad = sample(5), sample(5, seed=1), torch.full((1, 5, 5), torch.inf).double()
    basis = basis_of(a)
    basis.begin_pass()
    basis.add(bad, 0.5)
    basis.add(b, 0.5)
    assert torch.equal(basis.covariance, basis_of(a).covariance)
    basis.begin_pass()
    basis.add(b, 0.5)
    torch.testing.assert_close(basis.covariance, basis_of(a, b).covariance)


# --- when -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "interval, expected",
    [
        (20, [0, 1, 2, 4, 8, 12, 20, 40, 60]),
        (30, [0, 1, 2, 4, 8, 12, 30, 60]),
        (1, list(range(64))),
        (5, [0, 1, 2, 4, 5, 8, 10, 12, *range(15, 64, 5)]),
    ],
)
def test_refreshes(interval, expected):
    settings = Principal(refresh_interval=interval)
    assert [n for n in range(64) if settings.refreshes_at(n)] == expected


def test_calls_outside_of_autograd_are_passes_of_their_own():
    subspace = Subspace()
    assert [subspace.begin_call() for _ in range(10)] == [n in (0, 1, 2, 4, 8) for n in range(10)]
    assert subspace.passes == 10


def test_calls_in_one_backward_are_one_pass():
    subspace, asked = Subspace(), []

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            asked.append(subspace.begin_call())
            return dy

    for _ in range(4):
        x = torch.ones(3, requires_grad=True)
        (Call.apply(x) + Call.apply(x)).sum().backward()
    assert asked == [True] * 6 + [False] * 2
    assert subspace.passes == 4


# --- state ------------------------------------------------------------------------------------


def filled():
    subspace = Subspace(Principal(refresh_interval=7, energy=0.5))
    for n in range(3):
        subspace.begin_call()
        for name in ("dx", "dw"):
            basis = subspace.basis(name, CPU, 1, 6)
            basis.add(sample(6, seed=n), 0.5)
            basis.turn(2, None)
    return subspace


def assert_goes_on_alike(a, b):
    assert b.passes == a.passes and set(b.bases) == set(a.bases)
    for subspace in (a, b):
        subspace.begin_call()
        subspace.basis("dx", CPU, 1, 6).add(sample(6, seed=9), 0.5)
    for name, basis in a.bases.items():
        assert torch.equal(basis.covariance, b.bases[name].covariance)
        assert torch.equal(basis.vectors, b.bases[name].vectors)
        assert b.bases[name].fits(2)


def test_directions_of_another_size_begin_anew():
    subspace = filled()
    dw = subspace.bases["dw"]
    assert subspace.basis("dx", CPU, 1, 5).covariance is None
    assert subspace.basis("dw", CPU, 2, 6) is not dw
    assert subspace.basis("dw", CPU, 2, 6).covariance is None


def through_a_file(subspace):
    file = io.BytesIO()
    torch.save(subspace.state_dict(), file)
    file.seek(0)
    other = Subspace(subspace.settings)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize(
    "again",
    [through_a_file, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))],
    ids=["file", "deepcopy", "pickle"],
)
def test_state_goes_round(again):
    subspace = filled()
    other = again(subspace)
    assert other.settings == subspace.settings
    assert_goes_on_alike(subspace, other)


def test_a_copy_and_a_state_share_nothing():
    subspace = filled()
    other = copy.deepcopy(subspace)
    loaded = Subspace()
    loaded.load_state_dict(subspace.state_dict())
    for basis in subspace.bases.values():
        basis.covariance.zero_()
        basis.vectors.zero_()
    for twin in (other, loaded):
        assert all(b.covariance.any() and b.vectors.any() for b in twin.bases.values())


# --- settings and costs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"refresh_interval": 0},
        {"refresh_interval": 2.5},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"momentum": float("nan")},
        {"momentum": "0.5"},
        {"energy": 0.0},
        {"energy": 1.1},
        {"energy": float("nan")},
        {"energy": "much"},
    ],
    ids=str,
)
def test_settings_that_are_not_valid(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        Principal(**wrong)


def test_costs_of_the_sides():
    # Of many positions.
    # A 3x3 of 64 to 64: U'dy costs C k at each position, the two products 2 n k instead of 2 n C.
    assert projected_share(64, 576, "output", 0.25, inf) == pytest.approx(0.25 * (1 + 64 / 1152))
    # A 1x1 of 16 to 96: of each product its share, and back from there r n for n C.
    assert projected_share(96, 16, "input", 0.25, inf) == pytest.approx(0.25 * (1 + 16 / 96))
    for c_out, n in [(64, 576), (96, 16), (10, 7), (20, 14), (7, 10)]:
        cheaper = min(("output", "input"), key=lambda s: projected_share(c_out, n, s, 0.5, inf))
        assert cheaper_side(c_out, n) == cheaper
        assert cheaper_side(c_out, n, transposed=True) == "output"
    # Of few, turning the weight costs k n C twice, as much as the products of C positions.
    assert projected_share(64, 576, "output", 0.25, 128) == pytest.approx(0.25 * (1.5 + 64 / 1152))
    assert projected_share(96, 16, "input", 0.25, 32) == pytest.approx(0.25 * (1.5 + 16 / 96))


def test_a_gradient_that_is_zero_at_first_costs_no_later_directions():
    torch.manual_seed(0)
    root = torch.randn(192, 192) * torch.logspace(0, -2, 192)
    s, subspace, k = (root @ root.t()).unsqueeze(0), Subspace(), 38
    for number in range(2):
        subspace.begin_call()
        basis = subspace.basis("dy", CPU, 1, 192)
        basis.add(s * number, 0.5)
        basis.turn(k, None, subspace.is_warm)
    u = basis.vectors[0]
    most = torch.linalg.eigvalsh(s[0])[-k:].sum()
    assert (u.t() @ s[0] @ u).trace() > 0.98 * most
