"""ssd: the recurrence of Mamba-2 (state space duality) over a sequence, or over a 2D image or 3D volume in any scan order."""

from __future__ import annotations

import functools
import math

import torch

from medssm import dispatch
from medssm.kernels import triton
from medssm.kernels.ssd import native, reference
from medssm.ops import checks, registration, walk

OP = "ssd"
_kernel = functools.partial(dispatch.kernel, OP)
_NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def ssd(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    *,
    dt_limit=(0.0, math.inf),
    order=None,
    reverse=False,
    initial_state=None,
    return_final_state=False,
    backend=None,
):
    """State space duality (Mamba-2): a matrix state per head, along the walk p = order.index(spatial):

        s_t = clamp(dt_t + dt_bias, *dt_limit), of softplus(dt_t + dt_bias) if dt_softplus
        S_t = exp(s_t A) S_{t-1} + s_t x_t B_t^T
        y_t = S_t C_t + D x_t,    out_t = y_t silu(z_t)

    Args:
        x, z: (b, l, h, p), h heads of size p; with an Order (b, *spatial, h, p). z gates the output; no norm inside.
        dt: (b, l, h).
        A, dt_bias: (h,).
        B, C: (b, l, g, n): head j uses group j // (h // g).
        D: (h,) or (h, p).
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: (low, high), what the step is clamped to; as upstream, the default makes a negative step 0. Its gradient is torch.clamp's.
        order: an Order, or a LongTensor (l,), a permutation: the token visited at each step. Outputs stay where their tokens are.
        reverse: walk the other way round.
        initial_state: (b, h, p, n), precedes the first step; differentiable.
        return_final_state: return (out, state), state (b, h, p, n) in float32 (float64 when computing in it), differentiable.
        backend: reference | native | triton | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out, x's shape and dtype, or (out, state). The recurrence runs in float32, in float64 if any input is; autocast never reaches it.

    Raises:
        ValueError: a wrong shape, dtype, device or order, or a backend that cannot serve; TypeError: what is no tensor.

    Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060.
    """
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    spatial = _check(*tensors, dt_limit, nd=order is not None and not isinstance(order, torch.Tensor))
    low, high = map(float, dt_limit)
    shape, spec, index = x.shape, "", None
    if order is not None:
        spec, index = walk.parse(order, spatial)
        x, dt, B, C, z = (walk.flatten(t, spatial) for t in (x, dt, B, C, z))
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state)

    chosen = dispatch.choose(OP, backend, tensors)
    if chosen == "reference" and not x.is_meta:  # of a meta tensor only shapes are wanted: the operator has them without a loop
        way = walk.resolve(spec, spatial, index, reverse, x.device)
        out, state = reference.ssd(*tensors[:8], dt_softplus, low, high, *way, initial_state)
    elif chosen != "reference" and registration.direct(tensors):
        way = walk.resolve(spec, spatial, index, reverse, x.device)
        out, state, _ = _kernel(chosen).forward(*tensors[:8], dt_softplus, low, high, *way, initial_state, False, return_final_state)
    else:
        save = z is not None and registration.needs_grad(tensors)
        out, state, _ = _forward(*tensors, index, spec, spatial, reverse, dt_softplus, low, high, save, chosen)
    if order is not None:
        out = out.reshape(shape)
    return (out, state) if return_final_state else out


def ssd_step(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, *, dt_limit=(0.0, math.inf), backend=None):
    """One token of `ssd`: x, z (b, h, p); dt (b, h); B, C (b, g, n); state (b, h, p, n); the rest as there.

    Returns (out (b, h, p), the new state). Stepping through a sequence equals scanning it.
    """
    checks.dims("x", x, 3, form="(b, h, p)")
    x, dt, B, C, z = (t.unsqueeze(1) if isinstance(t, torch.Tensor) else t for t in (x, dt, B, C, z))
    out, state = ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit=dt_limit, initial_state=state, return_final_state=True, backend=backend)
    return out.squeeze(1), state


def _check(x, dt, A, B, C, D, z, dt_bias, initial_state, dt_limit, nd):
    """Raise one clear error for arguments that do not fit; return the spatial shape."""
    checks.floating(dict(zip(_NAMES, (x, dt, A, B, C, D, z, dt_bias, initial_state), strict=True)))
    if nd:
        checks.dims("x", x, *range(4, 13), form="(b, *spatial, h, p)")
    else:
        checks.dims("x", x, 4, form="(b, l, h, p)")
    batch, *spatial, heads, size = x.shape
    checks.shape("dt", dt, x.shape[:-1])
    checks.shape("A", A, (heads,))
    checks.dims("B", B, x.dim(), form="(b, *spatial, g, n)" if nd else "(b, l, g, n)")
    groups, state = B.shape[-2:]
    checks.shape("B", B, (batch, *spatial, groups, state))
    if not groups or heads % groups or not state:
        raise ValueError(f"B: expected (b, l, g, n) with g dividing {heads} heads and n at least 1, got {tuple(B.shape)}")
    checks.shape("C", C, B.shape)
    checks.shape("D", D, (heads,), (heads, size))
    checks.shape("z", z, x.shape)
    checks.shape("dt_bias", dt_bias, (heads,))
    checks.shape("initial_state", initial_state, (batch, heads, size, state))
    if not (isinstance(dt_limit, (tuple, list)) and len(dt_limit) == 2 and dt_limit[0] <= dt_limit[1]):
        raise ValueError(f"dt_limit: expected low, high with low at most high, got {dt_limit!r}")
    return tuple(spatial)


# -- the registered operator ------------------------------------------------------------------------------------------------------
# A kernel's forward returns (out, state, y): y (b, l, h, p) in the compute dtype is out before the gate, kept for the gradient of z.


def _forward_impl(x, dt, A, B, C, D, z, dt_bias, initial_state, index, order, spatial, reverse, dt_softplus, low, high, save, backend):
    way = walk.resolve(order, spatial, index, reverse, x.device)
    out, state, y = _kernel(backend).forward(x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, *way, initial_state, save, True)
    return out, state, registration.absent(state) if y is None else y


def _forward_fake(x, dt, A, B, C, D, z, dt_bias, initial_state, index, order, spatial, reverse, dt_softplus, low, high, save, backend):
    batch, _length, heads, size = x.shape
    dtype = checks.compute_dtype(x, dt, A, B, C, D, z, dt_bias, initial_state)
    out = x.new_empty(x.shape)
    return out, x.new_empty((batch, heads, size, B.shape[3]), dtype=dtype), x.new_empty(x.shape if save else (0,), dtype=dtype)


def _backward_impl(dout, dstate, y, x, dt, A, B, C, D, z, dt_bias, initial_state, index, order, spatial, reverse, dt_softplus, low, high, backend):
    kernel, way = _kernel(backend), walk.resolve(order, spatial, index, reverse, x.device)
    rest = (x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, *way, initial_state)
    if z is None:
        y = None
    elif y.dim() == 1:
        y = kernel.forward(*rest, True, False)[2]
    gradients = kernel.backward(dout, dstate, y, *rest)
    return tuple(registration.absent(x) if g is None else g for g in gradients)


def _backward_fake(dout, dstate, y, x, dt, A, B, C, D, z, dt_bias, initial_state, *_rest):
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(registration.absent(x) if t is None else t.new_empty(t.shape) for t in inputs)


_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state"
_OPTIONS = "Tensor? index, str order, SymInt[] spatial, bool reverse, bool dt_softplus, float low, float high"
_forward = registration.operator(
    f"{OP}_forward", f"({_INPUTS}, {_OPTIONS}, bool save, str backend) -> (Tensor, Tensor, Tensor)", _forward_impl, _forward_fake
)
_backward = registration.operator(
    f"{OP}_backward",
    f"(Tensor dout, Tensor? dstate, Tensor y, {_INPUTS}, {_OPTIONS}, str backend) -> (" + ", ".join(["Tensor"] * len(_NAMES)) + ")",
    _backward_impl,
    _backward_fake,
)


def _setup(ctx, inputs, output):
    *tensors, order, spatial, reverse, dt_softplus, low, high, _save, backend = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.options = (order, spatial, reverse, dt_softplus, low, high, backend)


def _gradient(ctx, dout, dstate, _dy):
    y, *tensors, index = ctx.saved_tensors
    gradients = _backward(dout, dstate, y, *tensors, index, *ctx.options)
    return (*(g if t is not None else None for g, t in zip(gradients, tensors, strict=True)), *[None] * 9)


registration.differentiable(f"{OP}_forward", _setup, _gradient)
registration.once_differentiable(f"{OP}_backward")
registration.foldable(
    f"{OP}_forward",
    _forward,
    (*_NAMES, "index", "order", "spatial", "reverse", "dt_softplus", "low", "high", "save", "backend"),
    ("x", "dt", "B", "C", "z", "initial_state"),
)


def _explained(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, *, initial_state=None, **_rest):
    return x, dt, A, B, C, D, z, dt_bias, initial_state


dispatch.register(OP, _explained, **registration.kernels(native=native.refuse, triton=triton.refuse))
