"""No test finds what another one has compiled."""

import pytest

from ssprop_patch.schedule import call_counts as calls


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """As in a process of its own."""
    monkeypatch.setattr(calls, "_compiled", [])
