"""selective_scan: the recurrence of Mamba over a sequence, or over a 2D image or 3D volume in any scan order."""

from __future__ import annotations

import functools

import torch

from medssm import dispatch
from medssm.kernels import cuda, triton
from medssm.kernels import native as library
from medssm.kernels.selective_scan import native, plan, reference
from medssm.ops import checks, registration, walk

OP = "selective_scan"
_kernel = functools.partial(dispatch.kernel, "selective_scan")
_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_proj", "initial_state")


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    *,
    delta_proj=None,
    order=None,
    reverse=False,
    initial_state=None,
    return_final_state=False,
    layout="bld",
    backend=None,
):
    """Selective scan (Mamba's S6), along the walk p = order.index(spatial):

        s_t = delta_t + delta_bias, softplus(s_t) if delta_softplus
        h_t = exp(s_t A) h_{t-1} + s_t B_t u_t
        y_t = C_t . h_t + D u_t,    out_t = y_t silu(z_t)

    Args:
        u, delta, z: (b, l, d); with an Order (b, *spatial, d). z gates the output.
        A: (d, n), state n from 1 to 256.
        B, C: (b, l, n), or (b, l, g, n): channel j uses group j // (d // g).
        D, delta_bias: (d,).
        delta_softplus: apply softplus to delta + delta_bias.
        delta_proj: (d, r): delta is then the low-rank (b, l, r), expanded inside the kernel and never stored.
        order: an Order, or a LongTensor (l,), a permutation: the token visited at each step. Outputs stay where their tokens are.
        reverse: walk the other way round.
        initial_state: (b, d, n), precedes the first step; differentiable.
        return_final_state: return (out, state), state (b, d, n) in float32 (float64 when computing in it), differentiable.
        layout: "bld", or mamba_ssm's "bdl": u, delta, z (b, d, l); B, C (b, n, l) or (b, g, n, l).
        backend: reference | native | triton | cuda | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out, u's shape and dtype, or (out, state). The recurrence runs in float32, in float64 if any input is; autocast never reaches it.

    Raises:
        ValueError: a wrong shape, dtype, device or order, or a backend that cannot serve; TypeError: what is no tensor.

    Source: Gu and Dao, Mamba, arXiv 2312.00752.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state)
    plain = order is None and initial_state is None and delta_proj is None and not return_final_state and layout == "bld"
    if plain and dispatch.free(backend, "native") and not library.reason() and registration.direct(tensors):
        out = native.forward_usual(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
        if out is not None:
            return out
    if layout != "bld":
        checks.choice("layout", layout, ("bld", "bdl"))
        u, delta, B, C, z = (_channels_last(t, name, u) for t, name in ((u, "u"), (delta, "delta"), (B, "B"), (C, "C"), (z, "z")))
        out = selective_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            delta_softplus,
            delta_proj=delta_proj,
            order=order,
            reverse=reverse,
            initial_state=initial_state,
            return_final_state=return_final_state,
            backend=backend,
        )
        return (out[0].movedim(-1, 1), out[1]) if return_final_state else out.movedim(-1, 1)

    spatial = _check(*tensors, nd=order is not None and not isinstance(order, torch.Tensor))
    shape, length = u.shape, spatial[0]
    spec, index = "", None
    if order is not None:
        spec, index = walk.parse(order, spatial)
        u, delta, B, C, z = (walk.flatten(t, spatial) for t in (u, delta, B, C, z))
        length = u.shape[1]
    if B.dim() == 3:
        B = B.unsqueeze(2)
    if C.dim() == 3:
        C = C.unsqueeze(2)
    tensors = (u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state)

    chosen = dispatch.choose(OP, backend, tensors)
    if chosen == "reference" and not u.is_meta:  # of a meta tensor only shapes are wanted: the operator has them without a loop
        way = walk.resolve(spec, spatial, index, reverse, u.device)
        out, state = reference.selective_scan(*tensors[:8], delta_softplus, delta_proj, *way, initial_state)
    elif chosen != "reference" and registration.direct(tensors):
        way = walk.resolve(spec, spatial, index, reverse, u.device)
        out, state, _ = _kernel(chosen).forward(*tensors[:8], delta_softplus, delta_proj, *way, initial_state, False, return_final_state)
    else:
        save = registration.needs_grad(tensors) and length > 0
        out, state, _ = _forward(*tensors, index, spec, spatial, reverse, delta_softplus, save, chosen)
    if order is not None:
        out = out.reshape(shape)
    return (out, state) if return_final_state else out


def selective_scan_step(state, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *, delta_proj=None, backend=None):
    """One token of `selective_scan`: u, delta, z (b, d); B, C (b, n) or (b, g, n); state (b, d, n), the rest as there.

    Returns (out (b, d), the new state). Stepping through a sequence equals scanning it.
    """
    u, delta, B, C, z = (None if t is None else t.unsqueeze(1) for t in (u, delta, B, C, z))
    out, state = selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj=delta_proj, initial_state=state, return_final_state=True, backend=backend
    )
    return out.squeeze(1), state


def _channels_last(t, name, u):
    """(b, d, *spatial) -> (b, *spatial, d), or (b, g, n, *spatial) -> (b, *spatial, g, n)."""
    if t is None:
        return None
    checks.dims(name, t, *range(2, 12), form="(b, d, l)")
    return t.movedim(1, -1) if t.dim() == u.dim() else t.movedim((1, 2), (-2, -1))


def _check(u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state, nd):
    """Raise one clear error for arguments that do not fit; return the spatial shape."""
    checks.floating(dict(zip(_NAMES, (u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state), strict=True)))
    if nd:
        checks.dims("u", u, *range(3, 12), form="(b, *spatial, d)")
    else:
        checks.dims("u", u, 3, form="(b, l, d)")
    checks.dims("A", A, 2, form="(d, n)")
    batch, *spatial, channels = u.shape
    spatial, state = tuple(spatial), A.shape[1]
    checks.shape("A", A, (channels, state))
    if not 1 <= state <= 256:
        raise ValueError(f"A: expected (d, n) with n from 1 to 256, got {tuple(A.shape)}")
    if delta_proj is None:
        checks.shape("delta", delta, u.shape)
    else:
        checks.dims("delta_proj", delta_proj, 2, form="(d, r)")
        checks.shape("delta_proj", delta_proj, (channels, delta_proj.shape[1]))
        checks.shape("delta", delta, (batch, *spatial, delta_proj.shape[1]))
    groups = _groups(B, C, u.dim(), channels)
    for name, t in (("B", B), ("C", C)):
        checks.shape(name, t, (batch, *spatial, state), (batch, *spatial, groups, state))
    checks.shape("z", z, u.shape)
    checks.shape("D", D, (channels,))
    checks.shape("delta_bias", delta_bias, (channels,))
    checks.shape("initial_state", initial_state, (batch, channels, state))
    return spatial


def _groups(B, C, dims, channels):
    """The number of groups that B and C share; B and C without a group dimension have one."""
    counts = [t.shape[-2] if t.dim() == dims + 1 else 1 for t in (B, C)]
    if counts[0] != counts[1]:
        raise ValueError(f"C: expected {counts[0]} groups as B has, got {counts[1]}")
    if counts[0] == 0 or channels % counts[0]:
        raise ValueError(f"B: expected a number of groups that divides {channels} channels, got {counts[0]}")
    return counts[0]


# -- the registered operator ------------------------------------------------------------------------------------------------------


def _forward_impl(u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state, index, order, spatial, reverse, delta_softplus, save, backend):
    way = walk.resolve(order, spatial, index, reverse, u.device)
    out, state, checkpoints = _kernel(backend).forward(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, *way, initial_state, save, True
    )
    return out, state, registration.absent(state) if checkpoints is None else checkpoints


def _forward_fake(u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state, index, order, spatial, reverse, delta_softplus, save, backend):
    batch, length, channels = u.shape
    state = A.shape[1]
    dtype = checks.compute_dtype(u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state)
    checkpoints = (batch, plan.chunks(length, state), state, channels) if save else (0,)
    return u.new_empty((batch, length, channels)), u.new_empty((batch, channels, state), dtype=dtype), u.new_empty(checkpoints, dtype=dtype)


def _backward_impl(
    dout, dstate, checkpoints, u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state, index, order, spatial, reverse, delta_softplus, backend
):
    way = walk.resolve(order, spatial, index, reverse, u.device)
    kernel = _kernel(backend)
    rest = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, *way, initial_state)
    if checkpoints.dim() == 1 and u.numel():
        checkpoints = kernel.forward(*rest, True, False)[2]
    gradients = kernel.backward(dout, dstate, checkpoints, *rest)
    return tuple(registration.absent(u) if g is None else g for g in gradients)


def _backward_fake(dout, dstate, checkpoints, u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state, *_rest):
    inputs = (u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state)
    return tuple(registration.absent(u) if t is None else t.new_empty(t.shape) for t in inputs)


_OPTIONS = "Tensor? index, str order, SymInt[] spatial, bool reverse, bool delta_softplus"
_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? delta_proj, Tensor? initial_state"
_forward = registration.operator(
    f"{OP}_forward", f"({_INPUTS}, {_OPTIONS}, bool save, str backend) -> (Tensor, Tensor, Tensor)", _forward_impl, _forward_fake
)
_backward = registration.operator(
    f"{OP}_backward",
    f"(Tensor dout, Tensor? dstate, Tensor checkpoints, {_INPUTS}, {_OPTIONS}, str backend) -> (" + ", ".join(["Tensor"] * len(_NAMES)) + ")",
    _backward_impl,
    _backward_fake,
)


def _setup(ctx, inputs, output):
    *tensors, index, order, spatial, reverse, delta_softplus, _save, backend = inputs
    ctx.save_for_backward(output[2], *tensors, index)
    ctx.options = (order, spatial, reverse, delta_softplus, backend)


def _gradient(ctx, dout, dstate, _dcheckpoints):
    checkpoints, *tensors, index = ctx.saved_tensors
    gradients = _backward(dout, dstate, checkpoints, *tensors, index, *ctx.options)
    return (*(g if t is not None else None for g, t in zip(gradients, tensors, strict=True)), *[None] * 7)


registration.differentiable(f"{OP}_forward", _setup, _gradient)
registration.once_differentiable(f"{OP}_backward")
registration.foldable(
    f"{OP}_forward",
    _forward,
    (*_NAMES, "index", "order", "spatial", "reverse", "delta_softplus", "save", "backend"),
    ("u", "delta", "B", "C", "z", "initial_state"),
)


def _explained(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *, delta_proj=None, initial_state=None, **_rest):
    return u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state


dispatch.register(OP, _explained, **registration.kernels(native=native.refuse, triton=triton.refuse, cuda=cuda.refuse))
