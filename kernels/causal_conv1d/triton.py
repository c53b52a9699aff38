"""Causal depthwise convolution on a GPU, in Triton.

A program has a tile of steps and channels of one batch entry. The lanes are channels, so any walk loads whole rows; a step's token costs one load
from the order's table for each row. Forward reads each row w times, all but once from the caches. A program of the backward pass has the steps that
gradients flow to: it computes the w outputs that saw a step again, before their activation, which saves a workspace of the input's size. It sums
the gradients of weight and bias over its tile, and PyTorch adds the tiles' sums in a fixed order. Nothing is added atomically.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medssm.kernels.causal_conv1d.walks import begins, pack, packed_states, state
from medssm.kernels.triton import INTERPRETED, on, plain, pointers, strided
from medssm.kernels.triton_tiles import visited

TOKENS, TAPS = ("batch", "token", "channel"), ("batch", "channel", "tap")  # the names of strides
STEPS, CHANNELS = (32, 64) if INTERPRETED else (16, 32)  # of a tile: four numbers in a thread, for which the backward pass has registers


@triton.jit
def _first(begin, step, length, PAST: tl.constexpr, BEGINS: tl.constexpr):
    """The earliest step that each step sees; -PAST is the initial state's oldest token."""
    if BEGINS:
        return tl.load(begin + tl.minimum(tl.maximum(step, 0), length - 1))
    return tl.zeros_like(step) - PAST


@triton.jit
def _segment(segment, table, step, length, PACKED: tl.constexpr):
    """Of packed sequences: the first step of each step's segment, the step after its last, and the sequences that begin and end there, or -1."""
    if PACKED:
        row = table + 4 * tl.load(segment + tl.minimum(tl.maximum(step, 0), length - 1))
        return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    return step, step, step, step


@triton.jit
def _taps(
    x,
    initial,
    index,
    step,
    first,
    sequence,
    live,
    here,
    length,
    x_token,
    initial_batch,
    initial_tap,
    PAST: tl.constexpr,
    INITIAL: tl.constexpr,
    WALK: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What a kernel sees at each step (steps, channels) in float32: a token, one of the initial state's, or zero where not live.

    x and initial point to the channels of the batch entry's first token. PACKED: `first` are the steps where segments begin, before which comes the
    initial state of `sequence`, none if that is -1.
    """
    begin = first if PACKED else 0
    at = visited(index, step, length, WALK, REVERSE)[:, None] * x_token
    values = tl.load(x[None, :] + at, mask=(live & (step >= begin))[:, None] & here[None, :], other=0.0).to(tl.float32)
    if INITIAL:
        early, at = live & (step < begin), (step - begin + PAST) * initial_tap
        if PACKED:
            early, at = early & (sequence >= 0), at + sequence * initial_batch
        values += tl.load(initial[None, :] + at[:, None], mask=early[:, None] & here[None, :], other=0.0).to(tl.float32)
    return values


@triton.jit
def _before_activation(
    x,
    weight,
    bias,
    initial,
    index,
    step,
    first,
    sequence,
    live,
    here,
    length,
    x_token,
    weight_tap,
    initial_batch,
    initial_tap,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    INITIAL: tl.constexpr,
    WALK: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """bias + sum_j weight_j tap_j at each step (steps, channels). Pointers are to channels, and first and sequence are as in `_taps`; if not PACKED,
    `first` are the first steps that are seen.
    """
    sums = tl.zeros((step.shape[0], here.shape[0]), tl.float32)
    for j in tl.static_range(W):
        tap = step - (W - 1) + j
        seen = live if PACKED else live & (tap >= first)
        values = _taps(
            x, initial, index, tap, first, sequence, seen, here, length, x_token, initial_batch, initial_tap, W - 1, INITIAL, WALK, PACKED, REVERSE
        )
        sums += values * tl.load(weight + j * weight_tap, mask=here, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        sums += tl.load(bias, mask=here, other=0.0).to(tl.float32)[None, :]
    return sums


@triton.jit
def _forward(
    x,
    weight,
    bias,
    initial,
    index,
    begin,
    segment,
    table,
    out,
    length,
    channels,
    x_batch,
    x_token,
    x_channel,
    weight_channel,
    weight_tap,
    bias_channel,
    initial_batch,
    initial_channel,
    initial_tap,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    INITIAL: tl.constexpr,
    WALK: tl.constexpr,
    BEGINS: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out (b,l,d), contiguous."""
    tiles = tl.cdiv(length, STEPS)
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64)
    step = tile * STEPS + tl.arange(0, STEPS)
    d = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    live, here = step < length, d < channels
    x_at = x + b * x_batch + d * x_channel
    initial_at = initial + b * initial_batch + d * initial_channel
    weight_at, bias_at = weight + d * weight_channel, bias + d * bias_channel
    first, _, sequence, _ = _segment(segment, table, step, length, PACKED)
    if not PACKED:
        first = _first(begin, step, length, W - 1, BEGINS)
    y = _before_activation(
        x_at,
        weight_at,
        bias_at,
        initial_at,
        index,
        step,
        first,
        sequence,
        live,
        here,
        length,
        x_token,
        weight_tap,
        initial_batch,
        initial_tap,
        W,
        BIAS,
        INITIAL,
        WALK,
        PACKED,
        REVERSE,
    )
    if SILU:
        y = y / (1 + tl.exp(-y))
    at = (b * length + visited(index, step, length, WALK, REVERSE))[:, None] * channels + d[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=live[:, None] & here[None, :])


@triton.jit
def _backward(
    dout,
    dstate,
    x,
    weight,
    bias,
    initial,
    index,
    begin,
    segment,
    table,
    dx,
    dinitial,
    sums,
    length,
    early,
    channels,
    dout_batch,
    dout_token,
    dout_channel,
    dstate_batch,
    dstate_channel,
    dstate_tap,
    x_batch,
    x_token,
    x_channel,
    weight_channel,
    weight_tap,
    bias_channel,
    initial_batch,
    initial_channel,
    initial_tap,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    INITIAL: tl.constexpr,
    STATE: tl.constexpr,
    WALK: tl.constexpr,
    BEGINS: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dx (b,l,d), dinitial (b,d,w-1), and sums (b * tiles, w + 1, d): a tile's part of the gradients of weight and, last, bias.

    Steps are those of the walk and, `early` of them, the initial states' tokens.
    """
    tiles = tl.cdiv(length + early, STEPS)
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64)
    place = tile * STEPS + tl.arange(0, STEPS)
    live = place < length + early
    if PACKED:  # after the walk's last step come w - 1 steps of each segment's
        past: tl.constexpr = W - 1 if W > 1 else 1
        row = tl.load(segment + place, mask=place < length, other=0)
        row = table + 4 * tl.where(place < length, row, (place - length) // past)
        start, end = tl.load(row, mask=live, other=0), tl.load(row + 1, mask=live, other=0)
        sequence, closing = tl.load(row + 2, mask=live, other=-1), tl.load(row + 3, mask=live, other=-1)
        step = tl.where(place < length, place, start - past + (place - length) % past)
        live = live & ((step >= start) | (sequence >= 0))
    else:
        step = place - (W - 1)  # from the initial state's oldest token on
        start, end, sequence, closing = 0, length, b, b
    d = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    here = d < channels
    x_at = x + b * x_batch + d * x_channel
    initial_at = initial + b * initial_batch + d * initial_channel
    weight_at, bias_at = weight + d * weight_channel, bias + d * bias_channel
    dout_at = dout + b * dout_batch + d * dout_channel
    seen = _taps(
        x_at, initial_at, index, step, start, sequence, live, here, length, x_token, initial_batch, initial_tap, W - 1, INITIAL, WALK, PACKED, REVERSE
    )
    rows = (b * tiles + tile) * (W + 1)
    total = tl.zeros((STEPS, CHANNELS), tl.float32)
    for k in tl.static_range(W):
        later = step + k  # an output that saw this step, through tap W - 1 - k
        sees = live & (later >= start) & (later < end)
        if PACKED:
            first = start
        else:
            first = _first(begin, later, length, W - 1, BEGINS)
            sees = sees & (first <= step)
        at = visited(index, later, length, WALK, REVERSE)[:, None] * dout_token
        g = tl.load(dout_at[None, :] + at, mask=sees[:, None] & here[None, :], other=0.0).to(tl.float32)
        if SILU:
            y = _before_activation(
                x_at,
                weight_at,
                bias_at,
                initial_at,
                index,
                later,
                first,
                sequence,
                sees,
                here,
                length,
                x_token,
                weight_tap,
                initial_batch,
                initial_tap,
                W,
                BIAS,
                INITIAL,
                WALK,
                PACKED,
                REVERSE,
            )
            s = 1 / (1 + tl.exp(-y))
            g = g * s * (1 + y * (1 - s))
        total += g * tl.load(weight_at + (W - 1 - k) * weight_tap, mask=here, other=0.0).to(tl.float32)[None, :]
        tl.store(sums + (rows + W - 1 - k) * channels + d, tl.sum(g * seen, 0), mask=here)
        if k == 0:
            tl.store(sums + (rows + W) * channels + d, tl.sum(g, 0), mask=here)
    if STATE:
        tap = step - (end - (W - 1))
        kept = live & (tap >= 0)
        if BEGINS:
            kept = kept & (step >= tl.load(begin + length - 1))
        at = tap * dstate_tap + closing * dstate_batch
        if PACKED:
            kept = kept & (closing >= 0)
        at = at[:, None] + d[None, :] * dstate_channel
        total += tl.load(dstate + at, mask=kept[:, None] & here[None, :], other=0.0).to(tl.float32)
    at = (b * length + visited(index, step, length, WALK, REVERSE))[:, None] * channels + d[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=(live & (step >= start))[:, None] & here[None, :])
    if INITIAL:
        at = d[None, :] * (W - 1) + (sequence * channels * (W - 1) + step - start + W - 1)[:, None]
        tl.store(dinitial + at, total.to(dinitial.dtype.element_ty), mask=(live & (step < start))[:, None] & here[None, :])


def forward(x, weight, bias, activation, index, starts, reverse, initial_state, final, sequences=None):
    """Arguments as in `reference.causal_conv1d`; final: whether the final state is wanted.

    Returns (out (b,l,d) contiguous, state (b,d,w-1) or None).
    """
    x, weight, bias, initial_state = plain(x, weight, bias, initial_state)
    batch, length, channels = x.shape
    width = weight.shape[1]
    out = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    begin, packed = _begins(starts, sequences, length, width, reverse)
    if out.numel():
        with on(x):
            _forward[_grid(batch, length, channels)](
                **_inputs(x, weight, bias, initial_state, index, begin, packed, reverse), out=out, SILU=activation == "silu"
            )
    if not final:
        return out, None
    if packed is not None:
        return out, packed_states(x, width, index, packed, reverse, initial_state)
    return out, state(x, width, index, begin, reverse, initial_state)


def backward(dout, dstate, x, weight, bias, activation, index, starts, reverse, initial_state, sequences=None):
    """Gradients of x, weight, bias and initial_state (None where that input is), each in its input's dtype and contiguous."""
    dout, dstate, x, weight, bias, initial_state = plain(dout, dstate, x, weight, bias, initial_state)
    batch, length, channels = x.shape
    width = weight.shape[1]
    dx, dinitial = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    if initial_state is not None:
        dinitial = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x.device)
        if not x.numel() or sequences is not None:  # an empty sequence's final state is its initial one
            dinitial.zero_() if dstate is None else dinitial.copy_(dstate)
    if not x.numel():
        return dx, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias), dinitial
    begin, packed = _begins(starts, sequences, length, width, reverse)
    early = (width - 1) * (1 if packed is None else len(packed.table))
    grid = _grid(batch, length + early, channels)
    sums = torch.empty((grid[0], width + 1, channels), dtype=torch.float32, device=x.device)
    with on(x):
        _backward[grid](
            **_inputs(x, weight, bias, initial_state, index, begin, packed, reverse),
            **strided(TOKENS, x, dout=dout),
            **strided(TAPS, x, dstate=dstate),
            **pointers(x, dx=dx, dinitial=dinitial, sums=sums),
            early=early,
            SILU=activation == "silu",
            STATE=dstate is not None,
        )
    total = sums.sum(0)
    dbias = None if bias is None else total[width].to(bias.dtype)
    return dx, total[:width].t().to(weight.dtype).contiguous(), dbias, dinitial


def _begins(starts, sequences, length, width, reverse):
    """(the earliest step that each step sees, None) or (None, packed sequences)."""
    if sequences is None:
        return begins(starts, length, width, reverse), None
    return None, pack(starts, sequences, length, reverse)


def _inputs(x, weight, bias, initial, index, begin, packed, reverse) -> dict:
    """The arguments of both kernels that come from the op's inputs."""
    segment, table = (None, None) if packed is None else (packed.segment, packed.table)
    return {
        **strided(TOKENS, x, x=x),
        **strided(("channel", "tap"), x, weight=weight),
        **strided(("channel",), x, bias=bias),
        **strided(TAPS, x, initial=initial),
        **pointers(x, index=index, begin=begin),
        **pointers(x, segment=segment, table=table),
        "length": x.shape[1],
        "channels": x.shape[2],
        "W": weight.shape[1],
        "BIAS": bias is not None,
        "INITIAL": initial is not None,
        "WALK": index is not None,
        "BEGINS": begin is not None,
        "PACKED": packed is not None,
        "REVERSE": reverse,
        "STEPS": STEPS,
        "CHANNELS": CHANNELS,
    }


def _grid(batch: int, steps: int, channels: int) -> tuple[int, int]:
    return batch * triton.cdiv(steps, STEPS), triton.cdiv(channels, CHANNELS)
