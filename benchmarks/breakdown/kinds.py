"""Sorts what a profile of one training step holds into kinds of work.

Every moment of a step belongs to exactly one event, the innermost one, so the kinds add up to the
step. An event's kind is, in this order, that of the innermost mark around it (see ``marks``), of
the outermost operation around it that has a kind of its own, and that of its own name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

FORWARD = "convolutions"
WEIGHT, INPUT = "weight gradients", "input gradients"
ROWS = "both gradients of single positions"
NORM, ACTIVATION, ADDITION, POOLING = "norm", "activation", "addition", "pooling"
LINEAR, CONCATENATION, LOSS = "linear layers", "concatenation", "loss"
CHOOSING, GATHERING = "choosing channels", "gathering and scattering"
PROJECTING, DIRECTIONS, COARSE = "projecting", "refreshing directions", "coarse remainder"
ELEMENTWISE, COPIES, MEMORY = "other elementwise", "copies", "allocating and filling"
OPTIMIZER = "optimizer and zero_grad"
PYTHON = "Python and dispatch"
UNATTRIBUTED = "unattributed"

#: In the order of the tables.
KINDS = (
    FORWARD,
    WEIGHT,
    INPUT,
    ROWS,
    NORM,
    ACTIVATION,
    ADDITION,
    POOLING,
    LINEAR,
    CONCATENATION,
    LOSS,
    CHOOSING,
    GATHERING,
    PROJECTING,
    DIRECTIONS,
    COARSE,
    ELEMENTWISE,
    COPIES,
    MEMORY,
    OPTIMIZER,
    PYTHON,
    UNATTRIBUTED,
)

#: What marks are called begins with this, and goes on with a kind.
MARK = "where: "
#: The C function that does several kinds of work in one call, and what its stamps are of.
WHOLE = f"{MARK}conv_backward"
STAMPED = (CHOOSING, GATHERING, WEIGHT, INPUT, ROWS)
#: The parts of a step, which are marked ``where: part NAME``; the step itself is "between".
PART, BETWEEN = f"{MARK}part ", "between"

# Of the sparse layers' own backward: a product or convolution that no mark is around projects.
_SPARSE_NODES = ("_SparseConvBackward", "_SparseLinearBackward")


def _named(kind: str, names: str) -> dict[str, str]:
    return {f"aten::{name}": kind for name in names.split()}


# Operations with what they call: a copy inside a convolution is the convolution's.
_WHOLES = {
    **_named(
        FORWARD,
        "conv1d conv2d conv3d conv_transpose2d convolution _convolution mkldnn_convolution "
        "_slow_conv2d_forward thnn_conv2d",
    ),
    **_named(
        NORM,
        "batch_norm _batch_norm_impl_index native_batch_norm native_batch_norm_backward "
        "layer_norm native_layer_norm native_layer_norm_backward group_norm native_group_norm "
        "native_group_norm_backward linalg_vector_norm norm",
    ),
    **_named(
        ACTIVATION,
        "relu relu_ threshold_backward clamp_min clamp_min_ gelu gelu_ gelu_backward silu silu_ "
        "silu_backward hardswish hardswish_ hardswish_backward hardsigmoid hardsigmoid_ "
        "hardsigmoid_backward hardtanh hardtanh_ hardtanh_backward sigmoid sigmoid_ "
        "sigmoid_backward leaky_relu leaky_relu_ leaky_relu_backward tanh tanh_backward mish "
        "mish_backward elu elu_backward",
    ),
    **_named(
        POOLING,
        "max_pool2d max_pool2d_with_indices max_pool2d_with_indices_backward avg_pool2d "
        "avg_pool2d_backward adaptive_avg_pool2d _adaptive_avg_pool2d "
        "_adaptive_avg_pool2d_backward upsample_nearest2d upsample_nearest2d_backward mean",
    ),
    **_named(
        LINEAR,
        "linear addmm mm bmm baddbmm matmul scaled_dot_product_attention softmax _softmax "
        "_softmax_backward_data _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    **_named(
        CONCATENATION, "cat stack split split_with_sizes chunk slice_backward select_backward"
    ),
    **_named(
        LOSS,
        "cross_entropy_loss log_softmax _log_softmax _log_softmax_backward_data nll_loss "
        "nll_loss_nd nll_loss_forward nll_loss_backward mse_loss mse_loss_backward",
    ),
}
# By their own names, where nothing around them says more.
_SINGLE = {
    **_named(ADDITION, "add add_"),
    # Channels of the weight; nothing else in a step indexes.
    **_named(GATHERING, "index_select index_copy_ gather scatter_"),
    **_named(
        ELEMENTWISE,
        "mul mul_ div div_ sub sub_ neg neg_ sum pow square sqrt rsqrt exp abs where lt gt eq ne "
        "bernoulli_ addcmul addcmul_ constant_pad_nd pad rand normal_ uniform_ logical_not "
        "logical_not_ result_type index index_put_ sin cos",
    ),
    **_named(COPIES, "copy_ clone contiguous to _to_copy"),
    **_named(
        MEMORY,
        "empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros "
        "fill_ zero_ full full_like ones ones_like resize_ new_full arange",
    ),
    **_named(
        PYTHON,
        "convolution_backward view reshape flatten unflatten permute transpose t expand "
        "as_strided as_strided_ _reshape_alias _unsafe_view unsqueeze squeeze select slice narrow "
        "movedim detach detach_ alias item _local_scalar_dense unbind expand_as view_as set_ "
        "is_nonzero dropout lift_fresh mT",
    ),
}
_NODES = ("autograd::", "torch::autograd::")


class Slot(NamedTuple):
    """A part of the step, and a kind of work in it."""

    part: str
    kind: str


class _Place(NamedTuple):
    """What is around an event, itself included."""

    part: str = BETWEEN
    mark: str | None = None
    whole: str | None = None
    sparse: bool = False


def split(
    events: Iterable[Any],
    stamps: Sequence[Sequence[int]] = (),
    unknown: dict[str, float] | None = None,
) -> dict[Slot, float]:
    """Return the seconds of each kind of work in each part of a step.

    Args:
        events: Of the step and what is inside it, in the order of their starts: with ``name``,
            ``cpu_parent`` and ``self_cpu_time_total`` in microseconds, as torch's profiler has
            them.
        stamps: For each event named ``WHOLE``, the nanoseconds of ``STAMPED``; may be empty, where
            the C functions were compiled without them.
        unknown: Gets the seconds of each operation that has no kind.

    Raises:
        ValueError: If there are stamps, but not as many as such events.
    """
    found: dict[Slot, float] = {}
    places: dict[int, _Place] = {}
    rest = iter(stamps)

    def add(part: str, kind: str, seconds: float) -> None:
        # All of the optimizer's part is one thing: its additions are none of the network's.
        slot = Slot(part, OPTIMIZER if part == "optimizer" else kind)
        found[slot] = found.get(slot, 0.0) + seconds

    for event in events:
        before = event.cpu_parent
        place = _enter(places.get(id(before), _Place()), event.name)
        places[id(event)] = place
        seconds = event.self_cpu_time_total / 1e6
        if event.name == WHOLE and stamps:
            taken = next(rest, None)
            if taken is None:
                raise ValueError(f"there are more calls of conv_backward than the {len(stamps)}")
            for kind, ns in zip(STAMPED, taken, strict=True):
                add(place.part, kind, ns / 1e9)
            add(place.part, PYTHON, seconds - sum(taken) / 1e9)
            continue
        kind = _kind(event.name, place)
        add(place.part, kind, seconds)
        if kind == UNATTRIBUTED and unknown is not None:
            unknown[event.name] = unknown.get(event.name, 0.0) + seconds
    if next(rest, None) is not None:
        raise ValueError(f"there are fewer calls of conv_backward than the {len(stamps)}")
    return found


def _enter(around: _Place, name: str) -> _Place:
    if name.startswith(PART):
        return around._replace(part=name.removeprefix(PART))
    if name == WHOLE:
        return around._replace(mark=ROWS)
    if name.startswith(MARK):
        return around._replace(mark=name.removeprefix(MARK))
    if name in _SPARSE_NODES:
        return around._replace(sparse=True)
    if name in _WHOLES and around.whole is None:
        kind = _WHOLES[name]
        if around.sparse and kind in (FORWARD, LINEAR):
            kind = PROJECTING
        return around._replace(whole=kind)
    return around


def _kind(name: str, place: _Place) -> str:
    if name.startswith(PART):
        return PYTHON
    if place.mark is not None:
        return place.mark
    if place.whole is not None:
        return place.whole
    if "::" not in name or name.startswith(_NODES):
        return PYTHON  # autograd's nodes, and Python functions: what they call has its own events
    return _SINGLE.get(name, UNATTRIBUTED)
