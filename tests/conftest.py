"""What all tests share: one thread, one seed, the same examples every time, no downloads."""

import atexit
import itertools
import os
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks for pretrained weights fails here
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
if "SSPROP_PATCH_CACHE" not in os.environ:  # which workers, and processes that tests start, inherit
    os.environ["SSPROP_PATCH_CACHE"] = tempfile.mkdtemp(prefix="ssprop_patch_tests_")
    atexit.register(shutil.rmtree, os.environ["SSPROP_PATCH_CACHE"], ignore_errors=True)

import pytest
import torch
from hypothesis import settings

# Tensors here are small: a second thread, waiting for work, makes them several times slower.
torch.set_num_threads(1)

# The same examples in every run: what fails in one place fails in all.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


# Helpers whose assertions are shown as those of tests are.
pytest.register_assert_rewrite(
    "oracle",
    "ops.convolutions",
    "ops.lazy_grad.norms",
    "patching.networks",
    "tools.compiled",
    "tools.kinds",
)

# What pytest -m quick runs, besides what is marked in its own file: modules and folders of whose
# tests hardly one takes a second.
QUICK = [
    "test_functional.py",
    "test_house.py",
    "core",
    "schedule",
    "ops/test_channel_choice.py",
    "ops/test_dense_or_sparse.py",
    "ops/test_higher_derivatives.py",
    "ops/test_nan_and_inf.py",
    "ops/lazy_grad/test_norm_readers.py",
    "ops/triton_kernels/test_refusals.py",
    "patching/test_choosing_layers.py",
    "patching/test_convert.py",
    "patching/test_converted.py",
    "patching/test_families.py",
    "patching/test_identity.py",
    "patching/test_plan.py",
    "patching/test_refusals.py",
    "patching/test_revert.py",
    "patching/test_types.py",
    "flops/test_summary.py",
    "metering/test_channels.py",
    "metering/test_flops.py",
    "metering/test_report.py",
    "metering/test_state.py",
    "timing/test_measured_plan.py",
    "timing/test_steps.py",
    "training/test_by_hand.py",
    "tools/test_weight_changes.py",
    "tools/test_wrapped_forward.py",
    "integrations/test_imports.py",
    "cli/test_schedule.py",
    "plots/test_drop_rate.py",
    "plots/test_runs.py",
    "training/test_memory_format.py",
]

# What a plain pytest leaves out and pytest -m slow runs: each takes ten seconds or so of processes
# or compilers, and something smaller in the same file covers the same code.
SLOW = [
    "benchmarks/test_classifier_run.py::test_interrupted_and_killed_run",
    "benchmarks/test_ddpm_run.py::test_two_processes",
    "benchmarks/test_study_whole.py::test_two_processes",
    "benchmarks/test_zoo_run.py::test_a_killed_run",
    "benchmarks/test_zoo_run.py::test_a_worker_that_dies",
    "ops/lazy_grad/test_norm.py::test_in_networks[l1-C-efficientnet_b0",
    "ops/lazy_grad/test_norm.py::test_in_networks[l2-C-densenet121",
    "ops/lazy_grad/test_norm.py::test_in_networks[l2-C-resnet18",
    "ops/lazy_grad/test_norm.py::test_in_networks[l2-torch-densenet121",
    "ops/lazy_grad/test_norm.py::test_in_networks[l2-torch-efficientnet_b0",
    "ops/lazy_grad/test_norm_training.py::test_under_compiled_autograd_the_backward_is_one_graph[l2",
    "tools/test_compile.py::test_a_schedule_makes_two_graphs_at_most_and_trains_as_eager[Cosine",
    "tools/test_compile.py::test_a_schedule_makes_two_graphs_at_most_and_trains_as_eager[Linear",
    "tools/test_compile.py::test_networks_of_timm_compile_whole[test_efficientnet]",
    "tools/test_compile.py::test_networks_of_timm_compile_whole[test_nfnet]",
    "tools/test_compile.py::test_networks_of_timm_compile_whole[tf_mobilenetv3",
    "tools/test_compile_inductor.py::test_inductor_hands_its_own_layout_to_the_backward[False",
    "tools/test_compile_many.py::test_a_loss_goes_back_after_its_context[inductor",
    "tools/test_training_steps.py::test_the_rate_advances_and_the_plain_networks_graphs_are_enough[C",
    "tools/test_training_steps.py::test_the_rate_advances_and_the_plain_networks_graphs_are_enough[F",
    "tools/test_training_steps.py::test_the_rate_advances_and_the_plain_networks_graphs_are_enough[W",
]

# Of products of many parameters a plain pytest runs so many cases that each value of a parameter
# meets each value of every other one; the other cases are slow.
PAIRS = [
    "native/test_choice.py",
    "native/test_border.py",
    "native/test_native_batch_norm.py",
    "native/test_native_channel_ops.py",
    "native/test_native_conv.py",
    "native/test_native_rows.py",
    "ops/lazy_grad/test_hooks.py",
    "ops/test_dtypes.py",
    "ops/test_empty.py::test_layers_compute_what_torch_does",
    "ops/test_gradients.py",
    "ops/test_heuristics.py",
    "ops/test_higher_derivatives.py",
    "ops/test_torch_samples.py",
    "ops/triton_kernels/test_chosen_channels.py",
    "ops/triton_kernels/test_sums.py",
    "patching/test_models.py::test_a_single_layer_with_every_padding",
    "patching/test_weights.py",
    "timing/test_layers.py",
    "tools/test_compile_operators.py",
    "training/test_partial_backward.py",
]

# They take longest, most of them in few tests, and are begun first: no process is to be left alone
# with one of them at the end.
LONG = [
    "distributed/test_two_processes.py",
    "tools/test_compile_many.py",
    "tools/test_inductor.py",
    "tools/test_compile_inductor.py",
    "patching/test_models.py",
    "benchmarks/test_zoo_networks.py",
    "benchmarks/test_study_whole.py",
    "native/test_fuzz.py",
    "tools/test_training_steps.py",
    "test_torch_compat.py",
]


def pytest_ignore_collect(collection_path, config):
    """Without what some files import, which takes longer than the tests that are quick."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        tests = Path(__file__).parent
        if not any(collection_path.is_relative_to(tests / name) for name in QUICK):
            return True if "mark.quick" not in collection_path.read_text() else None
    return None


def pytest_collection_modifyitems(items):
    """Mark what is quick, and what is slow; put what takes long first."""
    tests = Path(__file__).parent
    quick = [tests / name for name in QUICK]
    files = [tests / name.partition("::")[0] for name in (*SLOW, *PAIRS, *LONG)]
    missing = [str(path) for path in (*quick, *files) if not path.exists()]
    if missing:
        raise pytest.UsageError(f"{__file__} names what is not there: {missing}")
    products = defaultdict(list)
    for item in items:
        name = f"{item.path.relative_to(tests).as_posix()}::{item.name}"
        if name.startswith(tuple(SLOW)):
            item.add_marker("slow")
        elif name.startswith(tuple(PAIRS)) and hasattr(item, "callspec"):
            products[name.partition("[")[0]].append(item)
    for product in products.values():
        for item in superfluous(product):
            item.add_marker("slow")
    for item in items:
        if any(map(item.path.is_relative_to, quick)) and not item.get_closest_marker("slow"):
            item.add_marker("quick")
    first = {tests / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


def superfluous(product):
    """Return those of a test's cases that are not needed to have every pair of parameters' values.

    Greedily: the next one that is needed is that with the most pairs that no other has yet.
    """
    values = [[(name, id(value)) for name, value in i.callspec.params.items()] for i in product]
    pairs = [set(itertools.combinations(each, 2)) for each in values]
    missing, left = set().union(*pairs), list(range(len(product)))
    while missing:
        best = max(left, key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        left.remove(best)
    return [product[i] for i in left] if any(pairs) else []


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
