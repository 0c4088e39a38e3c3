"""The Triton kernels themselves; what launches them is :mod:`.channel_ops`.

A kernel sees a tensor as (batches, channels, positions), the positions of a channel side by side,
or with ``CHANNELS_LAST`` as one batch of (positions, channels). It works on tiles of ``BLOCK_C``
channels by ``BLOCK_S`` positions, whose last dimension is the one that lies side by side. The
tiles of a block of channels are counted batch after batch, ``blocks`` to a batch, and shared among
``num_programs(1)`` programs: one after the other, so that those running lie near each other.
"""

import triton
import triton.language as tl

# Numbers are not specialised, so that few variants are compiled: what a compiler can use of them,
# how many elements may be read at once, is in DIVISOR, a power of 2 that divides the number that
# lie side by side, and becomes visible by `n // DIVISOR * DIVISOR`.
# No `from __future__ import annotations` here: Triton reads the annotations of constants.


@triton.jit
def _channels(BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return the channels of the program, along the tile's dimension of channels."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    return c[None, :] if CHANNELS_LAST else c[:, None]


@triton.jit
def _positions(BLOCK_S: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return the positions of a tile, from 0, along its dimension of positions."""
    s = tl.arange(0, BLOCK_S)
    return s[:, None] if CHANNELS_LAST else s[None, :]


@triton.jit
def _in_tile(c, s, channels, positions, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Return the offsets of a tile's elements from its start, in 64 bits if ``WIDE``."""
    TYPE: tl.constexpr = tl.int64 if WIDE else tl.int32
    if CHANNELS_LAST:
        return s.to(TYPE) * channels + c.to(TYPE)
    else:
        return c.to(TYPE) * positions + s


@triton.jit
def _in_chosen(c, s, channels, positions, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Return :func:`_in_tile` of channels that were read from an index."""
    if CHANNELS_LAST:
        TYPE: tl.constexpr = tl.int64 if WIDE else tl.int32
        # Triton 3.6 lays the threads of a warp along the first dimension if it knows of no order,
        # and each reads another row. That pairs of channels lie side by side is not so, but settles
        # it, and nothing else: of what is not aligned either, every element is read for itself.
        return tl.max_contiguous(s.to(TYPE) * channels + c.to(TYPE), [1, 2])
    else:
        return _in_tile(c, s, channels, positions, CHANNELS_LAST, WIDE)


@triton.jit
def _start(tile, blocks, channels, positions, BLOCK_S: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return the offset of a tile, in 64 bits: a tensor may have more than 2**31 elements."""
    first = (tile % blocks).to(tl.int64) * BLOCK_S
    if CHANNELS_LAST:
        return first * channels
    else:
        return (tile // blocks).to(tl.int64) * channels * positions + first


@triton.jit
def _left(tile, blocks, positions, BLOCK_S: tl.constexpr):
    """Return how many positions there are from the tile's first on."""
    return positions - (tile % blocks).to(tl.int64) * BLOCK_S


@triton.jit
def _load_gradient(dz, relu_out, offsets, mask, ACC: tl.constexpr):
    """Load ``dz``; after a ReLU whose output is given, with zeros where its gradient is zero."""
    value = tl.load(dz + offsets, mask=mask, other=0.0).to(ACC)
    if relu_out is not None:
        passed = tl.load(relu_out + offsets, mask=mask, other=0.0)
        # Not "what is above 0 passes": as in torch, the gradient passes a nan.
        value = tl.where(passed <= 0.0, 0.0, value)
    return value


@triton.jit(do_not_specialize=["channels", "positions", "blocks", "tiles"])
def channel_sums(
    t,
    partial,
    channels,
    positions,
    blocks,
    tiles,
    ORDER: tl.constexpr,
    DIVISOR: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Store the sums over the program's tiles in its row of ``partial``, (programs, channels)."""
    ACC: tl.constexpr = partial.dtype.element_ty
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    if CHANNELS_LAST:
        channels = channels // DIVISOR * DIVISOR
    else:
        positions = positions // DIVISOR * DIVISOR
    c = _channels(BLOCK_C, CHANNELS_LAST)
    s = _positions(BLOCK_S, CHANNELS_LAST)
    in_tile = _in_tile(c, s, channels, positions, CHANNELS_LAST, WIDE)
    total = tl.zeros([BLOCK_S, BLOCK_C] if CHANNELS_LAST else [BLOCK_C, BLOCK_S], ACC)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        offsets = _start(tile, blocks, channels, positions, BLOCK_S, CHANNELS_LAST) + in_tile
        mask = (c < channels) & (s < _left(tile, blocks, positions, BLOCK_S))
        value = tl.load(t + offsets, mask=mask, other=0.0).to(ACC)
        total += tl.abs(value) if ORDER == 1 else value * value
    # The channels lie side by side in a row of the partial sums, however they lie in the tile.
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(partial + tl.program_id(1) * channels + c, tl.sum(total, AXIS), mask=c < channels)


@triton.jit(do_not_specialize=["channels", "positions", "blocks", "tiles"])
def norm_sums(
    dz,
    relu_out,
    y,
    mean,
    invstd,
    partial,
    channels,
    positions,
    blocks,
    tiles,
    DIVISOR: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Store the sums of dz, dz * xhat and dz * dz as :func:`channel_sums` does, (3, ...)."""
    ACC: tl.constexpr = partial.dtype.element_ty
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    if CHANNELS_LAST:
        channels = channels // DIVISOR * DIVISOR
    else:
        positions = positions // DIVISOR * DIVISOR
    c = _channels(BLOCK_C, CHANNELS_LAST)
    s = _positions(BLOCK_S, CHANNELS_LAST)
    in_tile = _in_tile(c, s, channels, positions, CHANNELS_LAST, WIDE)
    center = tl.load(mean + c, mask=c < channels, other=0.0).to(ACC)
    total = tl.zeros([BLOCK_S, BLOCK_C] if CHANNELS_LAST else [BLOCK_C, BLOCK_S], ACC)
    total_y = tl.zeros([BLOCK_S, BLOCK_C] if CHANNELS_LAST else [BLOCK_C, BLOCK_S], ACC)
    total_2 = tl.zeros([BLOCK_S, BLOCK_C] if CHANNELS_LAST else [BLOCK_C, BLOCK_S], ACC)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        offsets = _start(tile, blocks, channels, positions, BLOCK_S, CHANNELS_LAST) + in_tile
        mask = (c < channels) & (s < _left(tile, blocks, positions, BLOCK_S))
        gradient = _load_gradient(dz, relu_out, offsets, mask, ACC)
        centered = tl.load(y + offsets, mask=mask, other=0.0).to(ACC) - center
        total += gradient
        total_y += gradient * centered
        total_2 += gradient * gradient
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < channels
    scale = tl.load(invstd + c, mask=mask, other=0.0).to(ACC)
    row = partial + tl.program_id(1) * channels + c
    rows = tl.num_programs(1)
    tl.store(row, tl.sum(total, AXIS), mask=mask)
    tl.store(row + rows * channels, tl.sum(total_y, AXIS) * scale, mask=mask)
    tl.store(row + 2 * rows * channels, tl.sum(total_2, AXIS), mask=mask)


@triton.jit(do_not_specialize=["channels", "positions", "blocks", "tiles", "count"])
def norm_grad_sums(
    dz,
    relu_out,
    y,
    mean,
    invstd,
    sum_dz,
    sum_dz_xhat,
    partial,
    channels,
    positions,
    blocks,
    tiles,
    count,
    DIVISOR: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Store the sums of ``|dy|`` as :func:`channel_sums` does, of a norm without weight."""
    ACC: tl.constexpr = partial.dtype.element_ty
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    if CHANNELS_LAST:
        channels = channels // DIVISOR * DIVISOR
    else:
        positions = positions // DIVISOR * DIVISOR
    c = _channels(BLOCK_C, CHANNELS_LAST)
    s = _positions(BLOCK_S, CHANNELS_LAST)
    in_tile = _in_tile(c, s, channels, positions, CHANNELS_LAST, WIDE)
    n = count.to(ACC)
    real = c < channels
    scale = tl.load(invstd + c, mask=real, other=0.0).to(ACC)
    center = tl.load(mean + c, mask=real, other=0.0).to(ACC)
    shift = tl.load(sum_dz + c, mask=real, other=0.0).to(ACC) / n
    slope = tl.load(sum_dz_xhat + c, mask=real, other=0.0).to(ACC) / n * scale
    total = tl.zeros([BLOCK_S, BLOCK_C] if CHANNELS_LAST else [BLOCK_C, BLOCK_S], ACC)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        offsets = _start(tile, blocks, channels, positions, BLOCK_S, CHANNELS_LAST) + in_tile
        mask = real & (s < _left(tile, blocks, positions, BLOCK_S))
        gradient = _load_gradient(dz, relu_out, offsets, mask, ACC)
        centered = tl.load(y + offsets, mask=mask, other=0.0).to(ACC) - center
        # Outside of the tensor the loads give zeros, of which this is not zero.
        total += tl.where(mask, tl.abs(gradient - shift - centered * slope), 0.0)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < channels
    scale = tl.load(invstd + c, mask=mask, other=0.0).to(ACC)
    row = partial + tl.program_id(1) * channels + c
    tl.store(row, tl.sum(total, AXIS) * scale, mask=mask)


# That kept is a multiple of 16 is not to be known: in channels_last, stores of several channels a
# thread would spread the reads of a warp, of which there are more, over many times the cache lines.
@triton.jit(do_not_specialize=["channels", "kept", "positions", "blocks", "tiles"])
def take_channels(
    t,
    index,
    out,
    channels,
    kept,
    positions,
    blocks,
    tiles,
    DIVISOR: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Copy the program's tiles of the channels ``index``."""
    if CHANNELS_LAST:
        channels = channels // DIVISOR * DIVISOR
    else:
        positions = positions // DIVISOR * DIVISOR
    to = _channels(BLOCK_C, CHANNELS_LAST)
    s = _positions(BLOCK_S, CHANNELS_LAST)
    c = tl.load(index + to, mask=to < kept, other=0)
    in_read = _in_chosen(c, s, channels, positions, CHANNELS_LAST, WIDE)
    in_written = _in_tile(to, s, kept, positions, CHANNELS_LAST, WIDE)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        read = _start(tile, blocks, channels, positions, BLOCK_S, CHANNELS_LAST) + in_read
        written = _start(tile, blocks, kept, positions, BLOCK_S, CHANNELS_LAST) + in_written
        mask = (to < kept) & (s < _left(tile, blocks, positions, BLOCK_S))
        tl.store(out + written, tl.load(t + read, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["channels", "kept", "positions", "blocks", "tiles", "count"])
def norm_input_grad(
    dz,
    relu_out,
    y,
    weight,
    mean,
    invstd,
    sum_dz,
    sum_dz_xhat,
    index,
    out,
    channels,
    kept,
    positions,
    blocks,
    tiles,
    count,
    DOUBLE: tl.constexpr,
    DIVISOR: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Compute the program's tiles of the gradient of the channels ``index``, of ``count`` each."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    if CHANNELS_LAST:
        channels = channels // DIVISOR * DIVISOR
    else:
        positions = positions // DIVISOR * DIVISOR
    to = _channels(BLOCK_C, CHANNELS_LAST)
    s = _positions(BLOCK_S, CHANNELS_LAST)
    chosen = to < kept
    c = tl.load(index + to, mask=chosen, other=0)
    in_read = _in_chosen(c, s, channels, positions, CHANNELS_LAST, WIDE)
    in_written = _in_tile(to, s, kept, positions, CHANNELS_LAST, WIDE)

    n = count.to(ACC)
    scale = tl.load(invstd + c, mask=chosen, other=0.0).to(ACC)
    center = tl.load(mean + c, mask=chosen, other=0.0).to(ACC)
    shift = tl.load(sum_dz + c, mask=chosen, other=0.0).to(ACC) / n
    slope = tl.load(sum_dz_xhat + c, mask=chosen, other=0.0).to(ACC) / n * scale
    if weight is not None:
        scale *= tl.load(weight + c, mask=chosen, other=0.0).to(ACC)

    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        read = _start(tile, blocks, channels, positions, BLOCK_S, CHANNELS_LAST) + in_read
        written = _start(tile, blocks, kept, positions, BLOCK_S, CHANNELS_LAST) + in_written
        mask = chosen & (s < _left(tile, blocks, positions, BLOCK_S))
        gradient = _load_gradient(dz, relu_out, read, mask, ACC)
        centered = tl.load(y + read, mask=mask, other=0.0).to(ACC) - center
        result = (gradient - shift - centered * slope) * scale
        tl.store(out + written, result.to(out.dtype.element_ty), mask=mask)
