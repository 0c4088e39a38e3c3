"""Processes that start quickly and clean, for what is shared out among several."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import unittest.mock
from multiprocessing.context import BaseContext
from pathlib import Path


@functools.cache
def context(*modules: str) -> BaseContext:
    """Return what starts processes that have imported ``modules`` and run nothing of them.

    They are forked from one that has, where the system can do that. In this process the modules
    of the first call count.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(modules))
    # It looks for them where a fresh Python would.
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    changes = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    with unittest.mock.patch.dict(os.environ, changes):
        multiprocessing.forkserver.ensure_running()
    return found
