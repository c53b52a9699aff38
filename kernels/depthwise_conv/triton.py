"""Depthwise convolution on a GPU, in Triton.

A program has a tile of positions and channels of one batch entry. The lanes are channels: every offset of the kernel loads whole rows, and
neighbouring programs find them in the caches. The gradient of x is the same convolution with its offsets mirrored, of the gradient before the
activation. That gradient is computed first and stored in float32; without an activation it is dout itself. For the gradient of the weight there is a
program for each few offsets and share of the positions, and PyTorch adds the shares in a fixed order. Nothing is added atomically.

The caller has checked shapes and dtypes. Images and sequences are volumes with leading axes of size 1.
"""

# ruff: noqa: RUF005 (Triton does not compile starred tuples)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from medssm.kernels.triton import INTERPRETED, on, plain, pointers, strided
from medssm.kernels.triton_tiles import where_live

POSITIONS, CHANNELS = (256, 64) if INTERPRETED else (128, 32)  # of a tile
TAPS = 3  # at most, along x, of a program of the weights' gradient
SHARE = 2048  # positions that one program sums the gradient of a weight over


@triton.jit
def _axis(position, size_y, size_x):
    """(z, y, x) of flat positions, in their type: 32 bits where the volume has no more voxels, since a GPU divides 64 bits slowly."""
    row = position // size_x
    return row // size_y, row % size_y, position % size_x


@triton.jit
def _offset(z, y, x, step_z, step_y, step_x):
    """Of a place in a tensor, in 64 bits."""
    return tl.cast(z, tl.int64) * step_z + tl.cast(y, tl.int64) * step_y + tl.cast(x, tl.int64) * step_x


@triton.jit
def _conv(
    x,
    weight,
    bias,
    dout,
    out,
    size,
    size_z,
    size_y,
    size_x,
    channels,
    x_batch,
    x_z,
    x_y,
    x_x,
    x_channel,
    weight_channel,
    weight_z,
    weight_y,
    weight_x,
    bias_channel,
    dout_batch,
    dout_z,
    dout_y,
    dout_x,
    dout_channel,
    KZ: tl.constexpr,
    KY: tl.constexpr,
    KX: tl.constexpr,
    MIRROR: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BEFORE: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = act(bias + sum_o weight_o x_{p+o}); MIRROR: of x_{p-o}. BEFORE: instead, out is dout times the activation's derivative at that sum."""
    tiles = tl.cdiv(size, POSITIONS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * POSITIONS + tl.arange(0, POSITIONS)
    d = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    live, here = (p >= 0) & (p < size), d < channels
    pz, py, px = _axis(p, size_y, size_x)
    centre = x + b * x_batch + _offset(pz, py, px, x_z, x_y, x_x)[:, None] + (d * x_channel)[None, :]
    y = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for o in range(KZ * KY * KX):
        oz, oy, ox = o // (KY * KX) - KZ // 2, o // KX % KY - KY // 2, o % KX - KX // 2
        w = tl.load(
            weight + d * weight_channel + (oz + KZ // 2) * weight_z + (oy + KY // 2) * weight_y + (ox + KX // 2) * weight_x, mask=here, other=0.0
        )
        if MIRROR:
            oz, oy, ox = -oz, -oy, -ox
        z, yy, xx = pz + oz, py + oy, px + ox
        inside = live & (z >= 0) & (z < size_z) & (yy >= 0) & (yy < size_y) & (xx >= 0) & (xx < size_x)
        seen = tl.load(centre + _offset(oz, oy, ox, x_z, x_y, x_x), mask=inside[:, None] & here[None, :], other=0.0).to(tl.float32)
        y += seen * w.to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(bias + d * bias_channel, mask=here, other=0.0).to(tl.float32)[None, :]
    keep = live[:, None] & here[None, :]
    if BEFORE:
        s = 1 / (1 + tl.exp(-y))
        at = (b * dout_batch + _offset(pz, py, px, dout_z, dout_y, dout_x))[:, None] + (d * dout_channel)[None, :]
        y = tl.load(dout + at, mask=keep, other=0.0).to(tl.float32) * s * (1 + y * (1 - s))
    elif SILU:
        y = y / (1 + tl.exp(-y))
    tl.store(out + (b * size + p)[:, None] * channels + d[None, :], y.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _weights(
    g,
    x,
    sums,
    size,
    size_z,
    size_y,
    size_x,
    channels,
    g_batch,
    g_z,
    g_y,
    g_x,
    g_channel,
    x_batch,
    x_z,
    x_y,
    x_x,
    x_channel,
    KZ: tl.constexpr,
    KY: tl.constexpr,
    KX: tl.constexpr,
    TAPS: tl.constexpr,
    SHARE: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """sums (batch * shares, offsets + 1, channels): of g_p x_{p+o} over a share of the positions; after the offsets, of g_p alone.

    A program has TAPS neighbouring offsets along x, for which it reads g once.
    """
    d = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    here = d < channels
    parts: tl.constexpr = (KX + TAPS - 1) // TAPS
    row, first = tl.program_id(2) // parts, tl.program_id(2) % parts * TAPS
    oz, oy, ox = row // KY - KZ // 2, row % KY - KY // 2, first - KX // 2
    shares = tl.cdiv(size, SHARE)
    b, share = (tl.program_id(0) // shares).to(tl.int64), tl.program_id(0) % shares
    g += b * g_batch + d[None, :] * g_channel
    x += b * x_batch + d[None, :] * x_channel
    none = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    alone, totals = none, ()
    for _ in tl.static_range(TAPS):
        totals = totals + (none,)
    for step in range(tl.cdiv(tl.minimum(size - share * SHARE, SHARE), POSITIONS)):
        p = share * SHARE + step * POSITIONS + tl.arange(0, POSITIONS)
        live = (p >= 0) & (p < size)
        pz, py, px = _axis(p, size_y, size_x)
        before = tl.load(g + _offset(pz, py, px, g_z, g_y, g_x)[:, None], mask=live[:, None] & here[None, :], other=0.0).to(tl.float32)
        alone += before
        z, y = pz + oz, py + oy
        live = live & (z >= 0) & (z < size_z) & (y >= 0) & (y < size_y)
        centre = x + _offset(z, y, px + ox, x_z, x_y, x_x)[:, None]
        sums_so_far = ()
        for k in tl.static_range(TAPS):
            at = px + ox + k
            inside = live & (at >= 0) & (at < size_x)
            seen = tl.load(centre + _offset(0, 0, k, x_z, x_y, x_x), mask=inside[:, None] & here[None, :], other=0.0).to(tl.float32)
            sums_so_far = sums_so_far + (totals[k] + before * seen,)
        totals = sums_so_far
    offsets = KZ * KY * KX
    sums += (b * shares + share) * (offsets + 1) * channels + d
    for k in tl.static_range(TAPS):
        tl.store(sums + (row * KX + first + k) * channels, tl.sum(totals[k], 0), mask=where_live(here, first + k < KX))
    tl.store(sums + offsets * channels, tl.sum(alone, 0), mask=where_live(here, tl.program_id(2) == 0))


def forward(x, weight, bias, activation):
    """Arguments as in `reference.depthwise_conv`. Returns out, contiguous."""
    x, weight, bias = plain(x, weight, bias)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run(x, weight, bias, out, silu=activation == "silu")
    return out


def backward(dout, x, weight, bias, activation):
    """Gradients of x, weight and bias (None where there is none), each in its input's dtype and contiguous."""
    dout, x, weight, bias = plain(dout, x, weight, bias)
    dx, g = torch.empty(x.shape, dtype=x.dtype, device=x.device), dout
    if not x.numel():
        return dx, torch.zeros(weight.shape, dtype=weight.dtype, device=x.device), None if bias is None else torch.zeros_like(bias)
    if activation == "silu":
        g = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        _run(x, weight, bias, g, dout=dout)
    _run(g, weight, None, dx, mirror=True)
    batch, *spatial, channels = x.shape
    offsets, shares = weight[0].numel(), triton.cdiv(math.prod(spatial), SHARE)
    parts = triton.cdiv(weight.shape[-1], TAPS)
    sums = torch.empty((batch * shares, offsets + 1, channels), dtype=torch.float32, device=x.device)
    with on(x):
        _weights[batch * shares, triton.cdiv(channels, CHANNELS), offsets // weight.shape[-1] * parts](
            **_volumes(x, g=g, x=x),
            sums=sums,
            **_sizes(x, weight),
            TAPS=triton.cdiv(weight.shape[-1], parts),
            SHARE=SHARE,
            POSITIONS=POSITIONS // 2,  # TAPS sums are in registers
            CHANNELS=CHANNELS,
        )
    total = sums.sum(0)
    dweight = total[:offsets].t().reshape(weight.shape).to(weight.dtype).contiguous()
    return dx, dweight, None if bias is None else total[offsets].to(bias.dtype)


def _run(x, weight, bias, out, *, dout=None, mirror=False, silu=False):
    """_conv into `out`, contiguous."""
    if not out.numel():
        return
    batch, *spatial, channels = x.shape
    weight = weight.movedim(0, -1).contiguous().movedim(-1, 0)  # so that neighbouring channels are one load
    with on(x):
        _conv[batch * triton.cdiv(math.prod(spatial), POSITIONS), triton.cdiv(channels, CHANNELS)](
            **_volumes(x, x=x, dout=dout),
            **_weight(weight),
            **strided(("channel",), x, bias=bias),
            out=out,
            **_sizes(x, weight),
            MIRROR=mirror,
            BIAS=bias is not None,
            SILU=silu,
            BEFORE=dout is not None,
            POSITIONS=POSITIONS,
            CHANNELS=CHANNELS,
        )


def _volumes(instead, **tensors) -> dict:
    """Kernel arguments: tensors (b,*spatial,d) as pointers and strides of volumes. A missing leading axis has stride 0."""
    arguments: dict = pointers(instead, **tensors)
    for name, t in tensors.items():
        batch, *axes, channel = (0,) * 5 if t is None else t.stride()
        steps = (batch, *_axes(axes, 0), channel)
        arguments |= {f"{name}_{dim}": step for dim, step in zip(("batch", "z", "y", "x", "channel"), steps, strict=True)}
    return arguments


def _weight(weight) -> dict:
    """The weight (d,*kernel) in the same form."""
    z, y, x = _axes(weight.stride()[1:], 0)
    return {"weight": weight, "weight_channel": weight.stride(0), "weight_z": z, "weight_y": y, "weight_x": x}


def _sizes(x, weight) -> dict:
    """How large the volume and the kernel are."""
    _, *spatial, channels = x.shape
    (size_z, size_y, size_x), (KZ, KY, KX) = _axes(spatial, 1), _axes(weight.shape[1:], 1)
    volume = {"size": math.prod(spatial), "size_z": size_z, "size_y": size_y, "size_x": size_x, "channels": channels}
    return volume | {"KZ": KZ, "KY": KY, "KX": KX}


def _axes(values, absent: int) -> tuple[int, ...]:
    """(z, y, x); leading axes that an image or a sequence lacks get `absent`."""
    return (*(absent,) * (3 - len(values)), *values)
