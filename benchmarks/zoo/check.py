"""One network: is it trained as a sparse backward should train it, and is it left as it was?

Four steps on the same weights, buffers, input and random numbers: dense, dense with masked
gradients (the oracle), converted, converted at rate 0. Then it is reverted.
"""

from __future__ import annotations

import importlib.metadata
import time
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

import ssprop_patch as ssp
from ssprop_patch._text import one_line

from . import count, models, oracle
from .snapshot import Snapshot
from .step import CannotRun, Run, is_memory, put_back, said

RATE = 0.8
SEEDS = (0, 1, 2)
# Above so many parameters, only the input and some of the convolutions get gradients.
MANY_PARAMETERS, MOST_GRADIENTS = 30_000_000, 30_000_000
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
TIE = {torch.float64: 1e-9, torch.float32: 1e-4}  # a choice closer than this may go either way

FIELDS = (
    "library",
    "family",
    "name",
    "result",
    "reason",
    "parameters",
    "convolutions",
    "sparse",
    "left_dense",
    "functional",
    "backward_share",
    "step_share",
    "share_at",
    "dtype",
    "input",
    "gradients",
    "calls",
    "dropped",
    "dead",
    "gap",
    "largest_error",
    "weak",
    "rate0",
    "seconds",
    "torch",
    "version",
)
Row = dict[str, Any]


class Tie(Exception):
    """Two channels are so close that either may be kept."""


class Mismatch(Exception):
    """The package did something else than it should."""


def row(entry: models.Entry) -> Row:
    """Check one network in every way to run it, until one works; return its row of the table.

    Raises:
        MemoryError: If memory is short.
    """
    start = time.perf_counter()
    found: Row = {}
    result, reason = "not run", "no way to build it is known"
    for dtype in (torch.float64, torch.float32):
        # As the default, for what networks make themselves in their forward.
        torch.set_default_dtype(dtype)
        try:
            result, reason, found = _first_that_runs(entry, dtype)
        finally:
            torch.set_default_dtype(torch.float32)
        if result != "not run":
            break
    found |= {"library": entry.library, "family": entry.family, "name": entry.name}
    found |= {"result": result, "reason": one_line(reason, 200)}
    found["torch"] = torch.__version__
    found["version"] = importlib.metadata.version(entry.library)
    found["seconds"] = f"{time.perf_counter() - start:.1f}"
    return {field: found.get(field, "") for field in FIELDS}


def _first_that_runs(entry: models.Entry, dtype: torch.dtype) -> tuple[str, str, Row]:
    result, reason, found = "not run", "", {}
    for attempt in models.attempts(entry):
        for seed in SEEDS:
            try:
                found = {"dtype": str(dtype).removeprefix("torch."), "input": attempt.size}
                try:
                    sample = attempt.make(seed)
                except Exception as error:
                    raise CannotRun(said(error)) from error
                return *check(sample, seed, found), found
            except CannotRun as error:
                result, reason = "not run", str(error)
                break
            except Tie as error:
                result, reason = "tie", str(error)
            except Mismatch as error:
                return "MISMATCH", str(error), found
            except Exception as error:
                if is_memory(error):
                    raise MemoryError(said(error)) from error
                return "ERROR", said(error), found
        if "dtype" in reason or "scalar type" in reason:
            break  # parts of it are in float32: no size helps
    return result, reason, found


def check(sample: models.Sample, seed: int, found: Row) -> tuple[str, str]:
    """Check one network on one input; note in ``found`` what is seen; return result and reason.

    Raises:
        CannotRun, Tie, Mismatch: See there.
    """
    model, inputs = sample.model, sample.inputs
    plan = ssp.plan(model)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["convolutions"], found["sparse"] = len(plan), len(plan.converted)
    why = Counter(r.reason.split(":")[0] for r in (*plan.skipped, *plan.refused))
    found["left_dense"] = "; ".join(f"{reason}: {n}" for reason, n in why.items())
    if not plan.converted:
        return _nothing_to_convert(model, found)
    many = found["parameters"] > MANY_PARAMETERS
    buffers = [b.clone() for b in model.buffers()]
    untouched = Snapshot(model)
    dense = Run(sample, buffers, seed, backward=not many, watch=True)
    if any(b.shape != v.shape for b, v in zip(model.buffers(), buffers, strict=True)):
        # A first forward adapts them to the input's size: what comes after is what repeats.
        buffers = dense.buffers
        dense = Run(sample, buffers, seed, backward=not many, watch=True)
    _note_shares(dense.shares, found)
    found["gradients"] = _need_fewer_gradients(model, plan) if many else "all"
    volatile = untouched.differences(model)  # what the network itself replaces in a forward
    before = Snapshot(model)
    with oracle.network(model, RATE) as record:
        expected = Run(sample, buffers, seed)
    found |= {"calls": record.calls, "dropped": record.dropped, "dead": record.dead}
    found |= {"gap": f"{record.gap:.1e}", "functional": record.outside}
    if many:  # attention may choose another kernel where less of it is trained
        dense.outputs, dense.buffers = expected.outputs, expected.buffers
    _same_forward(expected, dense, "the oracle's")
    if not all(g.isfinite().all() for g in expected.grads.values() if g is not None):
        raise CannotRun("gradients that are not finite")
    if not record.dropped:
        raise CannotRun("no gradient of a convolution was dropped")
    if Snapshot(model).differences(model):
        raise AssertionError("the oracle left traces")

    ssp.convert(model, schedule=RATE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparse = Run(sample, buffers, seed)
    for warning in caught:
        if "stays dense" in str(warning.message):
            raise Mismatch(str(warning.message))
    _same_forward(sparse, dense, "the converted network's")
    found["largest_error"], found["weak"] = _compare(sparse, expected, model, record.gap)
    if dense.grads and not any(_differ(sparse.grads[n], g) for n, g in dense.grads.items()):
        raise Mismatch("the gradients are the dense ones")
    del expected, sparse

    if not many:
        found["rate0"] = _dense_at_rate_0(sample, dense, buffers, seed)
    del dense

    model.zero_grad(set_to_none=True)
    put_back(model, buffers)
    ssp.revert(model)
    different = before.differences(model) - volatile
    if different:
        raise Mismatch(f"after revert differs: {', '.join(sorted(different)[:3])}")
    if sample.native and float(found["backward_share"]) < 0.97:
        # Linear layers that see one position count for more in a small image than in a large one.
        inputs = (torch.empty(sample.native),)
        model.requires_grad_(True)
        _note_shares(count.shares(model, inputs), found)
    return "ok", ""


def _dense_at_rate_0(sample: models.Sample, dense: Run, buffers: list[Tensor], seed: int) -> str:
    ssp.get_controller(sample.model).drop_rate = 0
    zero = Run(sample, buffers, seed, learn_input=False)
    _same_forward(zero, dense, "at rate 0 the")
    for name, grad in dense.grads.items():
        if _differ(grad, zero.grads[name]):
            raise Mismatch(f"at rate 0 the gradient of {name} is not the dense one")
    return "equal"


def _nothing_to_convert(model: nn.Module, found: Row) -> tuple[str, str]:
    before = Snapshot(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ssp.convert(model, schedule=RATE, strict=False)
    if not any("nothing to convert" in str(w.message) for w in caught):
        raise Mismatch("nothing to convert, and not a word about it")
    if before.differences(model):
        raise Mismatch("nothing to convert, and yet something changed")
    return "nothing to convert", found["left_dense"] or "no convolution"


def _need_fewer_gradients(model: nn.Module, plan: ssp.Plan) -> str:
    """Freeze all but the input and the smaller convolutions; return what is left, in words."""
    model.requires_grad_(False)
    modules = sorted((r.module for r in plan.converted), key=_size)
    left, chosen = MOST_GRADIENTS, 0
    for module in modules:
        left -= _size(module)
        if left < 0 and chosen:
            break
        module.requires_grad_(True)
        chosen += 1
    return f"input and {chosen} of {len(modules)} convolutions"


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _note_shares(share: count.Shares, found: Row) -> None:
    found["backward_share"], found["step_share"] = f"{share.backward:.4f}", f"{share.step:.4f}"
    found["share_at"] = share.shape


# --- comparing ---------------------------------------------------------------------------------


def _same_forward(one: Run, two: Run, whose: str) -> None:
    for what in ("outputs", "buffers"):
        ones, twos = getattr(one, what), getattr(two, what)
        if len(ones) != len(twos) or any(map(_differ, ones, twos)):
            if whose == "the oracle's":
                raise CannotRun("two runs of the dense network differ")
            raise Mismatch(f"{whose} {what} are not the dense ones")


def _differ(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is not two
    return not torch.equal(one, two)


def _compare(got: Run, want: Run, model: nn.Module, gap: float) -> tuple[str, str]:
    """Compare all gradients; return the largest error and how many gradients are too small.

    The error is relative to the largest element of the parameters of the same module, and has to
    be below ``TOLERANCE``. What is that much smaller than the largest gradient of the network
    that rounding alone may exceed it (a bias in front of a batch norm has no gradient at all, but
    for rounding) is judged by the rounding, and counts as weak.
    """
    dtype = got.outputs[0].dtype
    tolerance = TOLERANCE[dtype]
    sizes: dict[str, float] = {}
    own = {n: g.abs().max().item() for n, g in want.grads.items() if g is not None and g.numel()}
    for name, size in own.items():
        module = name.rpartition(".")[0] or name
        sizes[module] = max(sizes.get(module, 0.0), size)
    rounding = 16 * torch.finfo(dtype).eps * max(own.values())
    largest, weak, worst = 0.0, 0, ""
    for name, grad in got.grads.items():
        expected = want.grads[name]
        if (grad is None) != (expected is None):
            raise Mismatch(f"gradient of {name}: one is None")
        if name not in own:
            continue
        size = sizes[name.rpartition(".")[0] or name]
        error = (grad - expected).abs().max().item()
        if size * tolerance <= rounding:
            weak += 1
            bad = not error <= rounding + size * tolerance
        else:
            bad = not error <= size * tolerance
            largest = max(largest, error / size)
        if bad and not worst:
            worst = f"gradient of {name}: off by {error:.2g} of {size:.2g}, gap {gap:.1e}"
    if worst:
        raise Tie(worst) if gap < TIE[dtype] else Mismatch(worst)
    return f"{largest:.1e}", f"{weak}/{len(own)}"
