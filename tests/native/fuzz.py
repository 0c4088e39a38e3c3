"""Random calls of the sparse backward and of the passes over memory, each one from its number.

``python tests/native/fuzz.py 4711`` repeats case 4711, ``python tests/native/fuzz.py 0 5000`` runs
the cases 0 to 4999. What is expected is said in :mod:`fuzz_reference`, with torch's dense kernels
in float64.
"""

import random
import sys
import time
from collections import Counter
from dataclasses import dataclass

import fuzz_passes
import fuzz_reference
import torch

from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.core.rule import BackwardRule
from ssprop_patch.core.selection import l1_scores, l2_scores
from ssprop_patch.ops import algorithms, backward
from ssprop_patch.ops.channel_gradients import KeptChannels
from ssprop_patch.ops.native import tensors

DTYPES = (torch.float32, torch.float64)
LAYOUTS = (
    *["contiguous", "last", "offset", "offset last"] * 3,
    "strided",
    "turned",
    "transposed",
    "expanded",
    "overlapping",
)
VALUES = (*["normal"] * 6, "integers", "zeros", "equal", "not finite", "not finite", "all nan")


@dataclass
class Case:
    """One backward of a convolution."""

    params: ConvParams
    shapes: tuple  # of dy, x, w
    layouts: tuple
    dtype: torch.dtype
    values: str
    k: int
    selection: str
    needed: tuple
    threads: int


def draw(rng):
    """Return a case that torch's own convolution takes."""
    while True:
        case = _draw(rng)
        if case is not None:
            return case


def _draw(rng):
    dims = rng.choice((1, 2, 2, 2, 3))
    kind = rng.choice(("ordinary", "grouped", "depthwise", "depthwise", "multiplier"))
    groups = 1 if kind == "ordinary" else rng.choice((2, 3, 4, 5, 8, 19))
    inputs = rng.choice((1, 1, 2, 3, 4, 9)) if kind != "multiplier" else 1
    inputs = 1 if kind == "depthwise" and rng.random() < 0.7 else inputs
    outputs = 1 if kind == "depthwise" else rng.choice((2, 3, 5, 9))
    if kind == "ordinary" and rng.random() < 0.1:
        inputs, outputs = rng.choice((67, 130)), rng.choice((9, 40))
    n = rng.choice((0, *[1, 2, 3] * 4, 7))
    most = (12, 7, 4)[dims - 1]
    size = [rng.choice((*[1, 2, rng.randint(1, most), most] * 5, 0)) for _ in range(dims)]
    if rng.random() < 0.25:
        size = [1] * dims
    kernel = [rng.choice((1, 1, 2, 3, 3, 4)) for _ in range(dims)]
    if rng.random() < 0.3:
        kernel = [1] * dims
    stride = [rng.choice((1, 1, 1, 2, 2, 3, 5, 11)) for _ in range(dims)]
    dilation = [rng.choice((1, 1, 1, 2, 3, 9)) for _ in range(dims)]
    far = (1000, 10**6, 2**40)
    if rng.random() < 0.04:
        stride[rng.randrange(dims)] = rng.choice(far)
    if rng.random() < 0.04:
        dilation[rng.randrange(dims)] = rng.choice(far) if max(kernel) == 1 else 40
    padding = [rng.choice((0, 0, 1, taps // 2, taps + 1)) for taps in kernel]
    out = [
        (a + 2 * pad - step * (taps - 1) - 1) // s + 1
        for a, pad, step, taps, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    if min(out) < 1:
        return None
    params = ConvParams(tuple(stride), tuple(padding), tuple(dilation), groups)
    c_out = groups * outputs
    shapes = (n, c_out, *out), (n, groups * inputs, *size), (c_out, inputs, *kernel)
    choose_from = c_out if groups in (1, c_out) else outputs
    return Case(
        params,
        shapes,
        tuple(rng.choice(LAYOUTS) for _ in shapes),
        rng.choice(DTYPES),
        rng.choice(VALUES),
        rng.choice((1, *[rng.randint(1, choose_from)] * 3, choose_from)),
        rng.choice(("l1", "l1", "l2", "function")),
        rng.choice(((True,) * 3, (True,) * 3, tuple(rng.random() < 0.5 for _ in range(3)))),
        rng.choice((1,) * 7 + (2, 3)),
    )


def lying(t, layout):
    """Return the numbers of ``t`` in another layout; expanded and overlapping ones change them."""
    if "last" in layout and t.dim() > 2:
        t = t.movedim(1, -1).contiguous().movedim(-1, 1)
    if "offset" in layout:
        memory = torch.full((t.numel() + 8,), float("nan"), dtype=t.dtype)
        return memory.as_strided(t.shape, t.stride(), 5).copy_(t)
    if layout == "strided":
        return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
    if layout == "turned":
        return t.flip(-1).contiguous().flip(-1).transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded" and t.shape[0]:
        return t[:1].expand(t.shape)
    if layout == "overlapping" and t.numel():
        memory = t.flatten()[: sum(n - 1 for n in t.shape) + 1].clone()
        return memory.as_strided(t.shape, [1] * t.dim())
    return t


def tensors_of(case, rng):
    """Return dy, x and w."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    dy, x, w = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in case.shapes
    )
    if case.values == "integers":
        dy = dy.round()
    elif case.values in ("zeros", "equal"):
        dy.fill_(0.0 if case.values == "zeros" else 0.125)
        dy.mul_(rng.choice((-1, 1)))
    elif case.values == "all nan":
        dy.fill_(float("nan"))
    elif case.values == "not finite" and dy.numel():
        for _ in range(rng.randint(1, 4)):
            at = tuple(rng.randrange(size) for size in dy.shape)
            dy[at] = rng.choice((float("inf"), -float("inf"), float("nan")))
        if rng.random() < 0.3:
            dy[:, : dy.shape[1] // 2 + 1] = float("inf")
    return (
        lying(t.to(case.dtype), layout) for t, layout in zip((dy, x, w), case.layouts, strict=True)
    )


def run_conv(case, rng):
    """Run one case in the way of the rules, in C wherever that goes, and in some other way."""
    dy, x, w = tensors_of(case, rng)
    order = {"l1": 1, "l2": 2}.get(case.selection)
    if order is None:
        numbers = (-0.0, 0.0, 1.0, rng.random(), float("nan"))
        order = torch.tensor([rng.choice(numbers) for _ in range(dy.shape[1])])
    score_fn = {1: l1_scores, 2: l2_scores}[order] if isinstance(order, int) else lambda dy: order
    try:
        expected = fuzz_reference.expect(dy, x, w, case.params, case.k, order)
    except RuntimeError:
        if x.numel():
            raise
        return "refused by torch"  # not all that has no elements is a convolution
    if expected is None:
        return "too close"
    args = case.params, case.k
    with threads(case.threads):
        got = backward.sparse_backward(dy, x, w, *args, BackwardRule(score_fn), case.needed)
        fuzz_reference.compare(got, expected, case.needed, x.dtype, "by rule")
        if len(expected.index) == dy.shape[1]:
            return "dense"
        names_x, names_w = algorithms.candidates(x, w, case.params)
        other = algorithms.Algorithms(rng.choice(names_x), rng.choice(names_w))
        for way in (
            algorithms.Algorithms("direct", "direct"),
            algorithms.Algorithms("rows", "rows"),
            other,
        ):
            kept = KeptChannels(dy, x, w, *args, score_fn)
            if rng.random() < 0.3:
                assert torch.equal(kept.index, expected.index), (kept.index, expected.index)
            got = way.run(kept, case.needed)
            assert torch.equal(kept.index, expected.index), (kept.index, expected.index)
            fuzz_reference.compare(got, expected, case.needed, x.dtype, str(way))
    return "convolution in C" if "direct" in names_x else "convolution by torch"


class threads:
    """A number of threads for tensors of any size."""

    def __init__(self, number):
        self.number = number

    def __enter__(self):
        self.before = torch.get_num_threads(), tensors._ENOUGH
        if self.number > 1:
            torch.set_num_threads(self.number)
            tensors._ENOUGH = 0

    def __exit__(self, *error):
        if self.number > 1:
            torch.set_num_threads(self.before[0])
        tensors._ENOUGH = self.before[1]


def run_case(number):
    """Run one case; return what it was."""
    rng = random.Random(number)
    case = fuzz_passes.draw(rng) if number % 3 == 2 else draw(rng)
    try:
        if isinstance(case, Case):
            return run_conv(case, rng)
        with threads(rng.choice((1,) * 7 + (2, 3))):
            return fuzz_passes.run(case, rng, lying)
    except Exception as error:
        raise AssertionError(
            f"{error}\n{case}\npython tests/native/fuzz.py {number}  # repeats it"
        ) from error


def run(first, last):
    """Run the cases from ``first`` to before ``last``; return how many of which kind."""
    return Counter(run_case(number) for number in range(first, last))


if __name__ == "__main__":
    first = int(sys.argv[1])
    start = time.perf_counter()
    counts = run(first, int(sys.argv[2]) if len(sys.argv) > 2 else first + 1)
    print(dict(counts), f"{sum(counts.values())} cases, {time.perf_counter() - start:.1f} s")
