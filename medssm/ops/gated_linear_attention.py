"""gated_linear_attention: linear attention whose state decays, over a sequence, or over a 2D image or 3D volume in any scan order."""

from __future__ import annotations

import functools

import torch

from medssm import dispatch
from medssm.kernels import triton
from medssm.kernels.gated_linear_attention import native, reference
from medssm.ops import checks, registration, walk

OP = "gated_linear_attention"
_kernel = functools.partial(dispatch.kernel, OP)
_NAMES = ("q", "k", "v", "g", "initial_state")


def gated_linear_attention(q, k, v, g, *, scale=None, order=None, reverse=False, initial_state=None, return_final_state=False, backend=None):
    """Gated linear attention along the walk p = order.index(spatial):

        S_t = exp(g_t) S_{t-1} + k_t v_t^T
        o_t = scale q_t S_t

    Args:
        q, k: (b, l, h, dk); with an Order (b, *spatial, h, dk).
        v: (b, l, h, dv).
        g: the logarithm of the decay, at most 0: (b, l, h), one for a head's whole state (retention, simple gated linear attention), or
            (b, l, h, dk), one for each of its rows.
        scale: a number; None is dk**-0.5.
        order: an Order, or a LongTensor (l,), a permutation: the token visited at each step. Outputs stay where their tokens are; where
            the order begins anew (order.starts), so does the state.
        reverse: walk the other way round.
        initial_state: (b, h, dk, dv), precedes the first step (zeros if None); differentiable.
        return_final_state: return (out, state), state (b, h, dk, dv) in float32 (float64 when computing in it), differentiable.
        backend: reference | native | triton | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out, v's shape and dtype, or (out, state). The recurrence runs in float32, in float64 if any input is; autocast never reaches it.

    Raises:
        ValueError: a wrong shape, dtype, device or order, or a backend that cannot serve; TypeError: what is no tensor.

    Source: Yang et al., Gated Linear Attention Transformers, arXiv 2312.06635; Sun et al., Retentive Network, arXiv 2307.08621.
    """
    spatial = _check(q, k, v, g, initial_state, nd=order is not None and not isinstance(order, torch.Tensor))
    scale = float(q.shape[-1]) ** -0.5 if scale is None else float(scale)
    shape, spec, index = v.shape, "", None
    if order is not None:
        spec, index = walk.parse(order, spatial)
        q, k, v, g = (walk.flatten(t, spatial) for t in (q, k, v, g))
    tensors = (q, k, v, g, initial_state)

    chosen = dispatch.choose(OP, backend, tensors)
    if chosen == "reference" and not q.is_meta:  # of a meta tensor only shapes are wanted: the operator has them without a loop
        way = walk.resolve(spec, spatial, index, reverse, q.device)
        out, state = reference.gated_linear_attention(q, k, v, g, scale, *way, initial_state)
    elif chosen != "reference" and registration.direct(tensors):
        way = walk.resolve(spec, spatial, index, reverse, q.device)
        out, state = _kernel(chosen).forward(q, k, v, g, scale, *way, initial_state, return_final_state)
    else:
        out, state = _forward(*tensors, index, spec, spatial, reverse, scale, chosen)
    if order is not None:
        out = out.reshape(shape)
    return (out, state) if return_final_state else out


def gated_linear_attention_step(state, q, k, v, g, *, scale=None, backend=None):
    """One token of `gated_linear_attention`: q, k (b, h, dk); v (b, h, dv); g (b, h) or (b, h, dk); state (b, h, dk, dv).

    Returns (out (b, h, dv), the new state). Stepping through a sequence equals scanning it.
    """
    checks.dims("q", q, 3, form="(b, h, dk)")
    q, k, v, g = (t.unsqueeze(1) for t in (q, k, v, g))
    out, state = gated_linear_attention(q, k, v, g, scale=scale, initial_state=state, return_final_state=True, backend=backend)
    return out.squeeze(1), state


def _check(q, k, v, g, initial_state, nd):
    """Raise one clear error for arguments that do not fit; return the spatial shape."""
    checks.floating(dict(zip(_NAMES, (q, k, v, g, initial_state), strict=True)))
    if nd:
        checks.dims("q", q, *range(4, 13), form="(b, *spatial, h, dk)")
    else:
        checks.dims("q", q, 4, form="(b, l, h, dk)")
    *tokens, keys = q.shape
    if keys == 0:
        raise ValueError(f"q: expected (b, l, h, dk) with dk at least 1, got {tuple(q.shape)}")
    checks.shape("k", k, q.shape)
    checks.dims("v", v, q.dim(), form="(b, l, h, dv)")
    checks.shape("v", v, (*tokens, v.shape[-1]))
    checks.shape("g", g, tokens, q.shape)
    batch, *spatial, heads = tokens
    checks.shape("initial_state", initial_state, (batch, heads, keys, v.shape[-1]))
    return tuple(spatial)


# -- the registered operator ------------------------------------------------------------------------------------------------------


def _forward_impl(q, k, v, g, initial_state, index, order, spatial, reverse, scale, backend):
    way = walk.resolve(order, spatial, index, reverse, q.device)
    return _kernel(backend).forward(q, k, v, g, scale, *way, initial_state, True)


def _forward_fake(q, k, v, g, initial_state, index, order, spatial, reverse, scale, backend):
    batch, _, heads, keys = q.shape
    dtype = checks.compute_dtype(q, k, v, g, initial_state)
    return v.new_empty(v.shape), v.new_empty((batch, heads, keys, v.shape[3]), dtype=dtype)


def _backward_impl(dout, dstate, q, k, v, g, initial_state, index, order, spatial, reverse, scale, backend):
    way = walk.resolve(order, spatial, index, reverse, q.device)
    gradients = _kernel(backend).backward(dout, dstate, q, k, v, g, scale, *way, initial_state)
    return tuple(registration.absent(q) if t is None else t for t in gradients)


def _backward_fake(dout, dstate, q, k, v, g, initial_state, *_rest):
    return tuple(registration.absent(q) if t is None else t.new_empty(t.shape) for t in (q, k, v, g, initial_state))


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? initial_state"
_OPTIONS = "Tensor? index, str order, SymInt[] spatial, bool reverse, float scale, str backend"
_forward = registration.operator(f"{OP}_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)", _forward_impl, _forward_fake)
_backward = registration.operator(
    f"{OP}_backward",
    f"(Tensor dout, Tensor? dstate, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _setup(ctx, inputs, output):
    *tensors, order, spatial, reverse, scale, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (order, spatial, reverse, scale, backend)


def _gradient(ctx, dout, dstate):
    *tensors, index = ctx.saved_tensors
    gradients = _backward(dout, dstate, *tensors, index, *ctx.options)
    return (*(t if i is not None else None for t, i in zip(gradients, tensors, strict=True)), *[None] * 6)


registration.differentiable(f"{OP}_forward", _setup, _gradient)
registration.once_differentiable(f"{OP}_backward")
registration.foldable(f"{OP}_forward", _forward, (*_NAMES, "index", "order", "spatial", "reverse", "scale", "backend"), _NAMES)


def _explained(q, k, v, g, *, initial_state=None, **_rest):
    return q, k, v, g, initial_state


dispatch.register(OP, _explained, **registration.kernels(native=native.refuse, triton=triton.refuse))
