"""Selective scan on the CPU: packs one argument block, calls csrc/selective_scan. See scans.py for what the functions take."""

from __future__ import annotations

import torch

from medssm.kernels import native
from medssm.kernels.native import fields
from medssm.kernels.selective_scan.arguments import OUTPUT, PROBLEM, TOKENS, dense, output, problem
from medssm.kernels.selective_scan.scans import Scans

# The Arguments of csrc/selective_scan/cpu_forward.cpp and cpu_backward.cpp.
_forward = native.Kernel("selective_scan", "forward", fields(("problem", PROBLEM), ("out", OUTPUT), "state checkpoints checkpoint_batch"))
_backward = native.Kernel(
    "selective_scan",
    "backward",
    fields(
        ("problem", PROBLEM),
        ("dout", TOKENS),
        "dstate checkpoints checkpoint_batch",
        ("du ddelta dz", OUTPUT),
        ("dB dC", fields("data type batch token group")),
        "dA dD dbias dproj dinitial",
    ),
)

_DTYPES = native.DTYPES
_Float = torch.FloatTensor  # an instance is a float32 tensor on the CPU: one question in place of two


def forward_usual(
    u: torch.Tensor,  # (b,l,d)
    delta: torch.Tensor,  # (b,l,d)
    A: torch.Tensor,  # (d,n)
    B: torch.Tensor,  # (b,l,n)
    C: torch.Tensor,  # (b,l,n)
    D: torch.Tensor | None,  # (d,)
    z: torch.Tensor | None,  # (b,l,d)
    delta_bias: torch.Tensor | None,  # (d,)
    softplus: bool,
    reverse: bool,
    segments: tuple[torch.Tensor, torch.Tensor, int] | None = None,  # of packed sequences: (starts, their sequences, how many), int64
) -> torch.Tensor | None:
    """`forward` of plain or packed sequences on the CPU in float32, shapes checked here; None where anything is not as usual.

    Of a call that takes microseconds, finding out what the tensors are is the larger part: so this looks at each of them once.
    """
    shape, rates, rows = u.shape, A.shape, B.shape
    if len(shape) != 3 or len(rates) != 2:
        return None
    batch, length, channels = shape
    state = rates[1]
    if delta.shape != shape or rates[0] != channels or rows != (batch, length, state) or C.shape != rows or not 1 <= state <= 256 or 0 in shape:
        return None
    if not (isinstance(u, _Float) and isinstance(delta, _Float) and isinstance(A, _Float) and isinstance(B, _Float) and isinstance(C, _Float)):
        return None
    at_D = at_bias = at_z = z_batch = z_token = z_channel = at_starts = at_sequences = start_count = 0
    if segments is not None:
        starts, of_segments, start_count = segments
        at_starts, at_sequences = starts.data_ptr(), of_segments.data_ptr()
    if D is not None:
        if D.shape != (channels,) or not isinstance(D, _Float) or not D.is_contiguous():
            return None
        at_D = D.data_ptr()
    if delta_bias is not None:
        if delta_bias.shape != (channels,) or not isinstance(delta_bias, _Float) or not delta_bias.is_contiguous():
            return None
        at_bias = delta_bias.data_ptr()
    if z is not None:
        if z.shape != shape or not isinstance(z, _Float):
            return None
        z_batch, z_token, z_channel = z.stride()
        at_z = z.data_ptr()
    u_batch, u_token, u_channel = u.stride()
    if not A.is_contiguous() or u_channel != 1 or u_token != channels or u_batch != length * channels:
        return None
    delta_batch, delta_token, delta_channel = delta.stride()
    B_batch, B_token, B_state = B.stride()
    C_batch, C_token, C_state = C.stride()
    out = torch.empty_like(u)
    _forward.run(
        _forward.pack(
            u.data_ptr(),
            0,
            u_batch,
            u_token,
            u_channel,
            delta.data_ptr(),
            0,
            delta_batch,
            delta_token,
            delta_channel,
            at_z,
            0,
            z_batch,
            z_token,
            z_channel,
            B.data_ptr(),
            0,
            B_batch,
            B_token,
            0,
            B_state,
            C.data_ptr(),
            0,
            C_batch,
            C_token,
            0,
            C_state,
            A.data_ptr(),
            at_D,
            at_bias,
            0,
            0,
            0,
            at_starts,
            at_sequences,
            start_count,
            reverse,
            batch,
            length,
            channels,
            1,
            state,
            0,
            softplus,
            False,
            torch.get_num_threads(),
            1.0,
            out.data_ptr(),
            0,
            u_batch,
            u_token,
            0,
            0,
            0,
            0,
        )
    )
    return out


def _scan(
    dtype,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    softplus,
    delta_proj,
    index,
    starts,
    reverse,
    sequences,
    initial_state,
    scale,
    out,
    earlier,
    state,
    checkpoints,
):
    weights = [dense(t, dtype) for t in (A, D, delta_bias, delta_proj, initial_state)]
    arguments = problem(dtype, u, delta, z, B, C, weights, softplus, index, starts, sequences, reverse, scale, torch.get_num_threads())
    at_checkpoints = (0, 0) if checkpoints is None else (checkpoints.data_ptr(), checkpoints.stride(0))
    _forward(*arguments, *output(out, earlier), native.pointer(state), *at_checkpoints)


def _scan_backward(
    dtype,
    dout,
    dstate,
    checkpoints,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    softplus,
    delta_proj,
    index,
    starts,
    reverse,
    sequences,
    initial_state,
    scale,
    du,
    du_earlier,
    ddelta,
    dB,
    dC,
    dz,
    dz_earlier,
    dA,
    dD,
    dbias,
    dproj,
    dinitial,
):
    weights = [dense(t, dtype) for t in (A, D, delta_bias, delta_proj, initial_state)]
    dstate = dense(dstate, dtype)
    arguments = problem(dtype, u, delta, z, B, C, weights, softplus, index, starts, sequences, reverse, scale, torch.get_num_threads())
    _backward(
        *arguments,
        dout.data_ptr(),
        _DTYPES[dout.dtype],
        *dout.stride(),
        native.pointer(dstate),
        checkpoints.data_ptr(),
        checkpoints.stride(0),
        *output(du, du_earlier),
        *output(ddelta),
        *output(dz, dz_earlier),
        dB.data_ptr(),
        _DTYPES[dB.dtype],
        *dB.stride()[:3],
        dC.data_ptr(),
        _DTYPES[dC.dtype],
        *dC.stride()[:3],
        *(native.pointer(t) for t in (dA, dD, dbias, dproj, dinitial)),
    )


_scans = Scans(_scan, _scan_backward)
forward, backward, forward_nd, backward_nd = _scans.forward, _scans.backward, _scans.forward_nd, _scans.backward_nd
