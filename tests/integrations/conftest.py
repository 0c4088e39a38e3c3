"""What these tests share: cheap garbage collections."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _cheap_collections():
    """The Trainer of transformers collects garbage before each training: not all the imports."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
