"""A process for Triton's interpreter, one for the tests of all modules here."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from ssprop_patch.ops import triton_kernels


@pytest.fixture(scope="session")
def interpreter():
    from .places import Interpreter  # skips where there is no triton

    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("TRITON_INTERPRET", "1")
        pool.submit(int).result()  # the process starts here
        environment.undo()
        run = Interpreter(pool)
        try:
            run(triton_kernels.channel_sums, torch.ones(1, 1), 1)
        except Exception as error:
            if "only 0-dimensional arrays" not in str(error):
                raise
            pytest.skip("this triton (3.6 for one) cannot interpret loops with numpy 2.4 or later")
        yield run


@pytest.fixture
def run(request):
    from .places import Gpu

    return Gpu() if request.param == "cuda" else request.getfixturevalue("interpreter")
