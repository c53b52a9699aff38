"""Causal depthwise convolution on a GPU, in Triton.

A program has a tile of steps and channels of one batch entry. Channels lie in the lanes, so that any walk loads whole rows: where a step's token
lies costs one load of the order's table a row. Forward reads each row w times, from the caches but once. Backward works by the step that
a gradient flows to: it computes anew what the w outputs that saw this step were before the activation, which spares a workspace of the input's size,
and sums the gradients of weight and bias over its tile; the tiles' sums are added by PyTorch in a fixed order. Nothing is added atomically.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medssm.kernels.causal_conv1d.walks import begins, state
from medssm.kernels.triton import INTERPRETED, on, plain, present, strides

STEPS, CHANNELS = (32, 64) if INTERPRETED else (16, 32)  # of a tile: four numbers a thread, which backward has registers for


@triton.jit
def _token(index, step, length, WALK: tl.constexpr, REVERSE: tl.constexpr):
    """The token visited at each step (int64); steps out of range give token 0's place or any other in range."""
    step = tl.minimum(tl.maximum(step, 0), length - 1).to(tl.int64)
    if REVERSE:
        step = length - 1 - step
    if WALK:
        step = tl.load(index + step)
    return step


@triton.jit
def _first(begin, step, length, PAST: tl.constexpr, BEGINS: tl.constexpr):
    """The earliest step that each step sees; that of the initial state's oldest token is -PAST."""
    if BEGINS:
        return tl.load(begin + tl.minimum(tl.maximum(step, 0), length - 1))
    return tl.zeros_like(step) - PAST


@triton.jit
def _taps(
    x,
    initial,
    index,
    step,
    live,
    b,
    d,
    here,
    length,
    x_batch,
    x_token,
    x_channel,
    i_batch,
    i_channel,
    i_tap,
    PAST: tl.constexpr,
    INITIAL: tl.constexpr,
    WALK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What a kernel sees at each step (steps, channels) in float32: a token, or one of the initial state, or zero where not live."""
    at = b * x_batch + _token(index, step, length, WALK, REVERSE)[:, None] * x_token + d[None, :] * x_channel
    values = tl.load(x + at, mask=(live & (step >= 0))[:, None] & here[None, :], other=0.0).to(tl.float32)
    if INITIAL:
        early = b * i_batch + (step + PAST)[:, None] * i_tap + d[None, :] * i_channel
        values += tl.load(initial + early, mask=(live & (step < 0))[:, None] & here[None, :], other=0.0).to(tl.float32)
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
    live,
    b,
    d,
    here,
    length,
    x_batch,
    x_token,
    x_channel,
    w_channel,
    w_tap,
    bias_channel,
    i_batch,
    i_channel,
    i_tap,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    INITIAL: tl.constexpr,
    WALK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """bias + sum_j weight_j tap_j at each step (steps, channels)."""
    sums = tl.zeros((step.shape[0], d.shape[0]), tl.float32)
    for j in tl.static_range(W):
        tap = step - (W - 1) + j
        values = _taps(
            x,
            initial,
            index,
            tap,
            live & (tap >= first),
            b,
            d,
            here,
            length,
            x_batch,
            x_token,
            x_channel,
            i_batch,
            i_channel,
            i_tap,
            W - 1,
            INITIAL,
            WALK,
            REVERSE,
        )
        sums += values * tl.load(weight + d * w_channel + j * w_tap, mask=here, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        sums += tl.load(bias + d * bias_channel, mask=here, other=0.0).to(tl.float32)[None, :]
    return sums


@triton.jit
def _forward(
    x,
    weight,
    bias,
    initial,
    index,
    begin,
    out,
    length,
    channels,
    x_batch,
    x_token,
    x_channel,
    w_channel,
    w_tap,
    bias_channel,
    i_batch,
    i_channel,
    i_tap,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    INITIAL: tl.constexpr,
    WALK: tl.constexpr,
    BEGINS: tl.constexpr,
    REVERSE: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(length, STEPS)
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64)
    step = tile * STEPS + tl.arange(0, STEPS)
    d = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    live, here = step < length, d < channels
    first = _first(begin, step, length, W - 1, BEGINS)
    y = _before_activation(
        x,
        weight,
        bias,
        initial,
        index,
        step,
        first,
        live,
        b,
        d,
        here,
        length,
        x_batch,
        x_token,
        x_channel,
        w_channel,
        w_tap,
        bias_channel,
        i_batch,
        i_channel,
        i_tap,
        W,
        BIAS,
        INITIAL,
        WALK,
        REVERSE,
    )
    if SILU:
        y = y / (1 + tl.exp(-y))
    at = (b * length + _token(index, step, length, WALK, REVERSE))[:, None] * channels + d[None, :]
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
    dx,
    dinitial,
    sums,
    length,
    channels,
    o_batch,
    o_token,
    o_channel,
    s_batch,
    s_channel,
    s_tap,
    x_batch,
    x_token,
    x_channel,
    w_channel,
    w_tap,
    bias_channel,
    i_batch,
    i_channel,
    i_tap,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    INITIAL: tl.constexpr,
    STATE: tl.constexpr,
    WALK: tl.constexpr,
    BEGINS: tl.constexpr,
    REVERSE: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(length + W - 1, STEPS)
    b, tile = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64)
    step = tile * STEPS + tl.arange(0, STEPS) - (W - 1)  # from the initial state's oldest token on
    d = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    live, here = step < length, d < channels
    seen = _taps(
        x, initial, index, step, live, b, d, here, length, x_batch, x_token, x_channel, i_batch, i_channel, i_tap, W - 1, INITIAL, WALK, REVERSE
    )
    rows = (b * tiles + tile) * (W + 1)
    total = tl.zeros((STEPS, CHANNELS), tl.float32)
    for k in tl.static_range(W):
        later = step + k  # an output that saw this step, through tap W - 1 - k
        first = _first(begin, later, length, W - 1, BEGINS)
        sees = (later >= 0) & (later < length) & (first <= step)
        at = b * o_batch + _token(index, later, length, WALK, REVERSE)[:, None] * o_token + d[None, :] * o_channel
        g = tl.load(dout + at, mask=sees[:, None] & here[None, :], other=0.0).to(tl.float32)
        if SILU:
            y = _before_activation(
                x,
                weight,
                bias,
                initial,
                index,
                later,
                first,
                sees,
                b,
                d,
                here,
                length,
                x_batch,
                x_token,
                x_channel,
                w_channel,
                w_tap,
                bias_channel,
                i_batch,
                i_channel,
                i_tap,
                W,
                BIAS,
                INITIAL,
                WALK,
                REVERSE,
            )
            s = 1 / (1 + tl.exp(-y))
            g = g * s * (1 + y * (1 - s))
        total += g * tl.load(weight + d * w_channel + (W - 1 - k) * w_tap, mask=here, other=0.0).to(tl.float32)[None, :]
        tl.store(sums + (rows + W - 1 - k) * channels + d, tl.sum(g * seen, 0), mask=here)
        if k == 0:
            tl.store(sums + (rows + W) * channels + d, tl.sum(g, 0), mask=here)
    if STATE:
        tap = step - (length - (W - 1))
        kept = live & (tap >= 0)
        if BEGINS:
            kept = kept & (step >= tl.load(begin + length - 1))
        total += tl.load(dstate + b * s_batch + tap[:, None] * s_tap + d[None, :] * s_channel, mask=kept[:, None] & here[None, :], other=0.0).to(
            tl.float32
        )
    at = (b * length + _token(index, step, length, WALK, REVERSE))[:, None] * channels + d[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=(live & (step >= 0))[:, None] & here[None, :])
    if INITIAL:
        at = (b * channels + d)[None, :] * (W - 1) + (step + W - 1)[:, None]
        tl.store(dinitial + at, total.to(dinitial.dtype.element_ty), mask=(live & (step < 0))[:, None] & here[None, :])


def forward(x, weight, bias, activation, index, starts, reverse, initial_state, final):
    """Arguments as in `reference.causal_conv1d`; final: whether the final state is wanted.

    Returns (out (b,l,d) contiguous, state (b,d,w-1) or None).
    """
    x, weight, bias, initial_state = plain(x, weight, bias, initial_state)
    batch, length, channels = x.shape
    width = weight.shape[1]
    out = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    begin = begins(starts, length, width, reverse)
    if out.numel():
        with on(x):
            _forward[_grid(batch, length, channels)](
                x,
                weight,
                *present(x, bias, initial_state, index, begin),
                out,
                length,
                channels,
                *x.stride(),
                *weight.stride(),
                *strides(bias, 1),
                *strides(initial_state, 3),
                W=width,
                SILU=activation == "silu",
                BIAS=bias is not None,
                INITIAL=initial_state is not None,
                WALK=index is not None,
                BEGINS=begin is not None,
                REVERSE=reverse,
                STEPS=STEPS,
                CHANNELS=CHANNELS,
            )
    return out, state(x, width, index, begin, reverse, initial_state) if final else None


def backward(dout, dstate, x, weight, bias, activation, index, starts, reverse, initial_state):
    """Gradients of x, weight, bias and initial_state (None where that input is), each in its input's dtype and contiguous."""
    dout, dstate, x, weight, bias, initial_state = plain(dout, dstate, x, weight, bias, initial_state)
    batch, length, channels = x.shape
    width = weight.shape[1]
    dx, dinitial = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    if initial_state is not None:
        dinitial = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x.device)
    if not x.numel():
        if dinitial is not None:
            dinitial.zero_() if dstate is None else dinitial.copy_(dstate)  # the empty walk's final state is its initial one
        return dx, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias), dinitial
    begin = begins(starts, length, width, reverse)
    grid = _grid(batch, length + width - 1, channels)
    sums = torch.empty((grid[0], width + 1, channels), dtype=torch.float32, device=x.device)
    with on(x):
        _backward[grid](
            dout,
            *present(x, dstate),
            x,
            weight,
            *present(x, bias, initial_state, index, begin),
            dx,
            *present(x, dinitial),
            sums,
            length,
            channels,
            *dout.stride(),
            *strides(dstate, 3),
            *x.stride(),
            *weight.stride(),
            *strides(bias, 1),
            *strides(initial_state, 3),
            W=width,
            SILU=activation == "silu",
            BIAS=bias is not None,
            INITIAL=initial_state is not None,
            STATE=dstate is not None,
            WALK=index is not None,
            BEGINS=begin is not None,
            REVERSE=reverse,
            STEPS=STEPS,
            CHANNELS=CHANNELS,
        )
    total = sums.sum(0)
    dbias = None if bias is None else total[width].to(bias.dtype)
    return dx, total[:width].t().to(weight.dtype).contiguous(), dbias, dinitial


def _grid(batch: int, steps: int, channels: int) -> tuple[int, int]:
    return batch * triton.cdiv(steps, STEPS), triton.cdiv(channels, CHANNELS)
