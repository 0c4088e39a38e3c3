"""By what the gradients of norms are formed, how often, and of however few elements."""

import pytest

from ssprop_patch.ops import native
from ssprop_patch.ops.lazy_grad import graph as lazy_grad
from ssprop_patch.ops.lazy_grad.gradients import NormGradient

from .norms import Way, needs_compiler


@pytest.fixture
def however_small(monkeypatch):
    """Let gradients be lazy where it does not pay, so that small networks can be tested."""
    monkeypatch.setattr(lazy_grad, "_MIN_ELEMENTS", 0)
    monkeypatch.setattr(lazy_grad, "_MIN_RELU_ELEMENTS", 0)


@pytest.fixture(
    params=[
        pytest.param(("l1", "C"), marks=needs_compiler),
        pytest.param(("l2", "C"), marks=needs_compiler),
        ("l2", "torch"),
    ],
    ids="-".join,
)
def way(request, monkeypatch):
    selection, by = request.param
    if by == "torch":
        monkeypatch.setattr(native.tensors, "library", lambda *args: None)
    return Way(selection)


@pytest.fixture
def formed(monkeypatch):
    """How often a deferred gradient was formed whole, and how often in part."""
    counts = {"whole": 0, "part": 0, "masked": 0}

    def counted(name, original):
        def count(self, *args):
            counts[name] += 1
            return original(self, *args)

        return count

    for name, method in (("whole", "form"), ("part", "take"), ("masked", "form_masked")):
        monkeypatch.setattr(NormGradient, method, counted(name, getattr(NormGradient, method)))
    return counts
