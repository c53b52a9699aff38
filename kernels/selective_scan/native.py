"""Selective scan on the CPU: allocates, packs one argument block, calls csrc/selective_scan.

The caller has checked shapes and resolved the walk: `index` (l,) int64 is the token visited at each step (None: raster), `starts` the
steps at which the state begins anew (None: only step 0), `reverse` turns the walk round. Nothing here records gradients.
"""

from __future__ import annotations

import struct

import torch

from medssm.kernels import native
from medssm.kernels.selective_scan.plan import chunks

# The fields of csrc/selective_scan: Problem; then Forward's or Backward's own.
_PROBLEM = "45qd"
_FORWARD = struct.Struct(_PROBLEM + "8q").pack
_BACKWARD = struct.Struct(_PROBLEM + "38q").pack
_ABSENT = (0, 0, 0, 0, 0)

_DTYPES = native.DTYPES
_Float = torch.FloatTensor  # an instance is a float32 tensor on the CPU: one question in place of two


def refuse(*tensors) -> str | None:
    """Why this kernel cannot serve these tensors, or None."""
    for t in tensors:
        if t is not None and not (t.is_cpu and t.dtype in _DTYPES):
            return f"it serves {', '.join(_name(d) for d in _DTYPES)} on the CPU, got {_name(t.dtype)} on {t.device}"
    return None


def forward(u, delta, A, B, C, D, z, delta_bias, softplus, delta_proj, index, starts, reverse, initial_state, save, final):
    """u, delta, z (b,l,d), or delta (b,l,r) with delta_proj (d,r); A (d,n); B, C (b,l,g,n); D, delta_bias (d,); initial_state (b,d,n).

    save: keep what backward needs. final: return the state after the last step. Returns out (b,l,d), the state (b,d,n) or None, and
    the checkpoints (b,chunks,n,d) or None; out in u's dtype, the others in the compute dtype.
    """
    dtype = _compute_dtype(u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state)
    batch, length, channels = u.shape
    n = A.shape[1]
    out = torch.empty((batch, length, channels), dtype=u.dtype)
    state = torch.empty((batch, channels, n), dtype=dtype) if final else None
    checkpoints = torch.empty((batch, chunks(length, n), n, channels), dtype=dtype) if save else None
    if out.numel():
        _scan(dtype, u, delta, A, B, C, D, z, delta_bias, softplus, delta_proj, index, starts, reverse, initial_state, 1.0, out, None, state,
              checkpoints)
    elif final:
        state.zero_() if initial_state is None else state.copy_(initial_state)
    return out, state, checkpoints


def forward_usual(u, delta, A, B, C, D, z, delta_bias, softplus, reverse):
    """`forward` of a plain sequence on the CPU in float32, its shapes checked here; None where anything is not as usual.

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
    at_D = at_bias = at_z = z_batch = z_token = z_channel = 0
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
    native.function("selective_scan_forward")(_FORWARD(
        u.data_ptr(), 0, u_batch, u_token, u_channel, delta.data_ptr(), 0, delta_batch, delta_token, delta_channel,
        at_z, 0, z_batch, z_token, z_channel, B.data_ptr(), 0, B_batch, B_token, 0, B_state, C.data_ptr(), 0, C_batch, C_token, 0, C_state,
        A.data_ptr(), at_D, at_bias, 0, 0, 0, 0, 0, reverse, batch, length, channels, 1, state, 0, softplus, False,
        torch.get_num_threads(), 1.0, out.data_ptr(), 0, u_batch, u_token, 0, 0, 0, 0))
    return out


def forward_nd(x, delta, A, B, C, D, z, delta_bias, softplus, delta_proj, walks, merge, save):
    """One scan per walk (index, starts, reverse), merged in the order of the list.

    x (b,l,d) or (b,l,k,d); delta (b,l,k,d) or (b,l,k,r); A (k,d,n); B, C (b,l,k,g,n); D, delta_bias (k,d); delta_proj (k,d,r); z (b,l,d).
    Returns out (b,l,d), or (b,l,k,d) for merge="stack", in x's dtype, and the checkpoints (b,k,chunks,n,d) or None.
    """
    dtype = _compute_dtype(x, delta, A, B, C, D, z, delta_bias, delta_proj)
    k, channels, n = A.shape
    batch, length = x.shape[:2]
    stack = merge == "stack"
    out = torch.empty((batch, length, k, channels) if stack else (batch, length, channels), dtype=x.dtype)
    checkpoints = torch.empty((batch, k, chunks(length, n), n, channels), dtype=dtype) if save else None
    if not out.numel():
        return out, checkpoints
    # The sum of all orders but the last; the last one adds it, scales, gates and writes out.
    total = None if stack or k == 1 else out if out.dtype is dtype else torch.empty_like(out, dtype=dtype)
    for i, (index, starts, reverse) in enumerate(walks):
        last = stack or i == k - 1
        _scan(dtype, _slice(x, i), delta[:, :, i], A[i], B[:, :, i], C[:, :, i], _row(D, i), z if last else None, _row(delta_bias, i), softplus,
              _row(delta_proj, i), index, starts, reverse, None, 1 / k if last and merge == "mean" else 1.0,
              out[:, :, i] if stack else out if last else total, None if stack or i == 0 else total, None, _column(checkpoints, i))
    return out, checkpoints


def backward(dout, dstate, checkpoints, u, delta, A, B, C, D, z, delta_bias, softplus, delta_proj, index, starts, reverse, initial_state):
    """Gradients of u, delta, A, B, C, D, z, delta_bias, delta_proj and initial_state, None where the input is; each in its input's dtype.

    dout (b,l,d); dstate (b,d,n) or None; checkpoints as forward saved them; the rest as in forward.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state)
    dtype = _compute_dtype(*inputs)
    if not u.numel():
        gradients = [None if t is None else torch.zeros_like(t) for t in inputs]
        if initial_state is not None and dstate is not None:
            gradients[-1].copy_(dstate)
        return tuple(gradients)
    du, ddelta, dB, dC, dz = (None if t is None else _new(t) for t in (u, delta, B, C, z))
    weights = (A, D, delta_bias, delta_proj, initial_state)
    dweights = [None if t is None else torch.empty(t.shape, dtype=dtype) for t in weights]
    _scan_backward(dtype, dout, dstate, checkpoints, u, delta, A, B, C, D, z, delta_bias, softplus, delta_proj, index, starts, reverse,
                   initial_state, 1.0, du, None, ddelta, dB, dC, dz, None, *dweights)
    dA, dD, dbias, dproj, dinitial = (None if t is None else g.to(t.dtype) for g, t in zip(dweights, weights, strict=True))
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dproj, dinitial


def backward_nd(dout, checkpoints, x, delta, A, B, C, D, z, delta_bias, softplus, delta_proj, walks, merge):
    """Gradients of x, delta, A, B, C, D, z, delta_bias and delta_proj, None where the input is; each in its input's dtype.

    dout as forward_nd's out; the rest as there. The orders add to the gradients of x and z in the compute dtype.
    """
    inputs = (x, delta, A, B, C, D, z, delta_bias, delta_proj)
    dtype = _compute_dtype(*inputs)
    if not x.numel():
        return tuple(None if t is None else torch.zeros_like(t) for t in inputs)
    k = A.shape[0]
    dx, ddelta, dB, dC, dz = (None if t is None else _new(t) for t in (x, delta, B, C, z))
    weights = (A, D, delta_bias, delta_proj)
    dweights = [None if t is None else torch.empty(t.shape, dtype=dtype) for t in weights]
    # Sums over all orders but the last.
    x_total = None if x.dim() == 4 or k == 1 else dx if dx.dtype is dtype else torch.empty_like(dx, dtype=dtype)
    z_total = None if z is None or k == 1 else dz if dz.dtype is dtype else torch.empty_like(dz, dtype=dtype)
    for i, (index, starts, reverse) in enumerate(walks):
        last = i == k - 1
        _scan_backward(
            dtype, _slice(dout, i), None, checkpoints[:, i], _slice(x, i), delta[:, :, i], A[i], B[:, :, i], C[:, :, i], _row(D, i), z,
            _row(delta_bias, i), softplus, _row(delta_proj, i), index, starts, reverse, None, 1 / k if merge == "mean" else 1.0,
            _slice(dx if last or x.dim() == 4 else x_total, i), None if i == 0 else x_total, ddelta[:, :, i], dB[:, :, i], dC[:, :, i],
            dz if last else z_total, None if i == 0 else z_total, *(_row(g, i) for g in dweights), None)
    dA, dD, dbias, dproj = (None if t is None else g.to(t.dtype) for g, t in zip(dweights, weights, strict=True))
    return dx, ddelta, dA, dB, dC, dD, dz, dbias, dproj


def _scan(dtype, u, delta, A, B, C, D, z, delta_bias, softplus, delta_proj, index, starts, reverse, initial_state, scale, out, earlier, state,
          checkpoints):
    """out = scale (y + D u + earlier) silu(z), with y along the walk; fills state and checkpoints where given."""
    weights = [_dense(t, dtype) for t in (A, D, delta_bias, delta_proj, initial_state)]
    native.function("selective_scan_forward")(_FORWARD(
        *_problem(dtype, u, delta, z, B, C, weights, softplus, index, starts, reverse, scale), *_output(out, earlier), native.pointer(state),
        native.pointer(checkpoints), 0 if checkpoints is None else checkpoints.stride(0)))


def _scan_backward(dtype, dout, dstate, checkpoints, u, delta, A, B, C, D, z, delta_bias, softplus, delta_proj, index, starts, reverse, initial_state,
                   scale, du, du_earlier, ddelta, dB, dC, dz, dz_earlier, dA, dD, dbias, dproj, dinitial):
    """The gradients of _scan's arguments, written into du … dinitial; du and dz are added to what is earlier."""
    weights = [_dense(t, dtype) for t in (A, D, delta_bias, delta_proj, initial_state)]
    dstate = _dense(dstate, dtype)
    native.function("selective_scan_backward")(_BACKWARD(
        *_problem(dtype, u, delta, z, B, C, weights, softplus, index, starts, reverse, scale), dout.data_ptr(), _DTYPES[dout.dtype], *dout.stride(),
        native.pointer(dstate), checkpoints.data_ptr(), checkpoints.stride(0), *_output(du, du_earlier), *_output(ddelta), *_output(dz, dz_earlier),
        dB.data_ptr(), _DTYPES[dB.dtype], *dB.stride()[:3], dC.data_ptr(), _DTYPES[dC.dtype], *dC.stride()[:3],
        *(native.pointer(t) for t in (dA, dD, dbias, dproj, dinitial))))


def _problem(dtype, u, delta, z, B, C, weights, softplus, index, starts, reverse, scale):
    """The fields of csrc/selective_scan/problem.h's Problem. The caller keeps the weights alive."""
    A, D, delta_bias, delta_proj, initial_state = weights
    batch, length, channels = u.shape
    return (
        u.data_ptr(), _DTYPES[u.dtype], *u.stride(), delta.data_ptr(), _DTYPES[delta.dtype], *delta.stride(),
        *(_ABSENT if z is None else (z.data_ptr(), _DTYPES[z.dtype], *z.stride())),
        B.data_ptr(), _DTYPES[B.dtype], *B.stride(), C.data_ptr(), _DTYPES[C.dtype], *C.stride(),
        A.data_ptr(), 0 if D is None else D.data_ptr(), 0 if delta_bias is None else delta_bias.data_ptr(),
        0 if delta_proj is None else delta_proj.data_ptr(), 0 if initial_state is None else initial_state.data_ptr(),
        0 if index is None else index.data_ptr(), 0 if starts is None else starts.data_ptr(), 0 if starts is None else starts.shape[0], reverse,
        batch, length, channels, B.shape[2], A.shape[1], 0 if delta_proj is None else delta_proj.shape[1],
        softplus, dtype is torch.float64, torch.get_num_threads(), scale)


def _output(out, earlier=None):
    """The fields of problem.h's Output: a tensor (b,l,d) with adjacent channels, and what it is to be added to."""
    if out is None:
        return _ABSENT
    batch, token, _ = out.stride()
    return out.data_ptr(), _DTYPES[out.dtype], batch, token, 0 if earlier is None else earlier.data_ptr()


def _new(t):
    """A gradient for t: contiguous, whatever t's strides are."""
    return torch.empty(t.shape, dtype=t.dtype)


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compute_dtype(*tensors) -> torch.dtype:
    for t in tensors:
        if t is not None and t.dtype is torch.float64:
            return torch.float64
    return torch.float32


def _dense(t, dtype):
    """A weight as the kernel reads it: contiguous, the compute dtype."""
    return t if t is None or (t.dtype is dtype and t.is_contiguous()) else t.to(dtype).contiguous()


def _slice(x, i):
    """Order i's tokens: a tensor (b,l,k,d) has its own for every order, (b,l,d) serves all."""
    return x[:, :, i] if x.dim() == 4 else x


def _row(weight, i):
    return None if weight is None else weight[i]


def _column(checkpoints, i):
    return None if checkpoints is None else checkpoints[:, i]
