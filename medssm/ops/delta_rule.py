"""delta_rule: the (gated) DeltaNet recurrence over a sequence, or over a 2D image or 3D volume in any scan order."""

from __future__ import annotations

import functools

import torch

from medssm import dispatch
from medssm.kernels import triton
from medssm.kernels.delta_rule import native, reference
from medssm.ops import checks, registration, walk

OP = "delta_rule"
_kernel = functools.partial(dispatch.kernel, OP)
_NAMES = ("q", "k", "v", "beta", "g", "initial_state")


def delta_rule(q, k, v, beta, *, g=None, scale=None, order=None, reverse=False, initial_state=None, return_final_state=False, backend=None):
    """The delta rule along the walk p = order.index(spatial): a state S (dk, dv) per head, in which each token replaces the share beta of what
    is recalled for its key by its value:

        S'_t = exp(g_t) S_{t-1}
        S_t = S'_t + k_t (beta_t (v_t - S'_t^T k_t))^T
        o_t = scale S_t^T q_t

    Args:
        q, k: (b, l, h, dk); with an Order (b, *spatial, h, dk). They are not normalised inside: the recurrence is stable for |k| at most 1
            and beta in [0, 1].
        v: (b, l, h, dv).
        beta: (b, l, h), how much of the old value each token replaces.
        g: (b, l, h), the log of the decay, at most 0; None: no decay.
        scale: of the output; None is dk**-0.5.
        order: an Order, or a LongTensor (l,), a permutation: the token visited at each step. Outputs stay where their tokens are; where the
            order begins anew (order.starts), the state is zero.
        reverse: walk the other way round.
        initial_state: (b, h, dk, dv), precedes the first step; differentiable.
        return_final_state: return (out, state), state (b, h, dk, dv) in float32 (float64 when computing in it), differentiable.
        backend: reference | native | triton | cuda | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out, v's shape and dtype, or (out, state). The recurrence runs in float32, in float64 if any input is; autocast never reaches it.

    Raises:
        ValueError: a wrong shape, dtype, device or order, or a backend that cannot serve; TypeError: what is no tensor.

    Source: Yang et al., arXiv 2406.06484 (DeltaNet) and 2412.06464 (gated DeltaNet).
    """
    tensors = (q, k, v, beta, g, initial_state)
    spatial = _check(*tensors, nd=order is not None and not isinstance(order, torch.Tensor))
    shape = v.shape
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    spec, index = "", None
    if order is not None:
        spec, index = walk.parse(order, spatial)
        q, k, v, beta, g = (walk.flatten(t, spatial) for t in (q, k, v, beta, g))
        tensors = (q, k, v, beta, g, initial_state)

    chosen = dispatch.choose(OP, backend, tensors)
    if chosen == "reference" and not q.is_meta:  # of a meta tensor only shapes are wanted: the operator has them without a loop
        way = walk.resolve(spec, spatial, index, reverse, q.device)
        out, state = reference.delta_rule(q, k, v, beta, g, scale, *way, initial_state)
    elif chosen != "reference" and registration.direct(tensors):
        way = walk.resolve(spec, spatial, index, reverse, q.device)
        out, state, _ = _kernel(chosen).forward(q, k, v, beta, g, scale, *way, initial_state, False, return_final_state)
    else:
        save = registration.needs_grad(tensors) and v.shape[1] > 0
        out, state, _ = _forward(*tensors, index, spec, spatial, reverse, scale, save, chosen)
    if order is not None:
        out = out.reshape(shape)
    return (out, state) if return_final_state else out


def delta_rule_step(state, q, k, v, beta, *, g=None, scale=None, backend=None):
    """One token of `delta_rule`: q, k (b, h, dk); v (b, h, dv); beta, g (b, h); state (b, h, dk, dv); the rest as there.

    Returns (out (b, h, dv), the new state). Stepping through a sequence equals the whole.
    """
    checks.dims("q", q, 3, form="(b, h, dk)")
    q, k, v, beta, g = (None if t is None else t.unsqueeze(1) for t in (q, k, v, beta, g))
    out, state = delta_rule(q, k, v, beta, g=g, scale=scale, initial_state=state, return_final_state=True, backend=backend)
    return out.squeeze(1), state


def _check(q, k, v, beta, g, initial_state, nd):
    """Raise one clear error for arguments that do not fit; return the spatial shape."""
    checks.floating(dict(zip(_NAMES, (q, k, v, beta, g, initial_state), strict=True)))
    if nd:
        checks.dims("q", q, *range(4, 13), form="(b, *spatial, h, dk)")
    else:
        checks.dims("q", q, 4, form="(b, l, h, dk)")
    *tokens, dk = q.shape
    if dk == 0:
        raise ValueError(f"q: expected (b, l, h, dk) with dk at least 1, got {tuple(q.shape)}")
    checks.shape("k", k, (*tokens, dk))
    checks.dims("v", v, q.dim(), form="(b, l, h, dv)")
    checks.shape("v", v, (*tokens, v.shape[-1]))
    checks.shape("beta", beta, tokens)
    checks.shape("g", g, tokens)
    batch, *spatial, heads = tokens
    checks.shape("initial_state", initial_state, (batch, heads, dk, v.shape[-1]))
    return tuple(spatial)


# -- the registered operator ------------------------------------------------------------------------------------------------------
# Besides out and the final state it returns what the backward needs: recalled_t = S'_t^T k_t (b, l, h, dv) in the compute dtype.


def _forward_impl(q, k, v, beta, g, initial_state, index, order, spatial, reverse, scale, save, backend):
    way = walk.resolve(order, spatial, index, reverse, q.device)
    out, state, recalled = _kernel(backend).forward(q, k, v, beta, g, scale, *way, initial_state, save, True)
    return out, state, registration.absent(state) if recalled is None else recalled


def _forward_fake(q, k, v, beta, g, initial_state, index, order, spatial, reverse, scale, save, backend):
    batch, _length, heads, dk = q.shape
    dtype = checks.compute_dtype(q, k, v, beta, g, initial_state)
    recalled = v.new_empty(v.shape if save else (0,), dtype=dtype)
    return v.new_empty(v.shape), v.new_empty((batch, heads, dk, v.shape[-1]), dtype=dtype), recalled


def _backward_impl(dout, dstate, recalled, q, k, v, beta, g, initial_state, index, order, spatial, reverse, scale, backend):
    way = walk.resolve(order, spatial, index, reverse, q.device)
    rest = (q, k, v, beta, g, scale, *way, initial_state)
    if recalled.dim() == 1 and q.numel():
        recalled = _kernel(backend).forward(*rest, True, False)[2]
    gradients = _kernel(backend).backward(dout, dstate, recalled, *rest)
    return tuple(registration.absent(q) if t is None else t for t in gradients)


def _backward_fake(dout, dstate, recalled, q, k, v, beta, g, initial_state, *_rest):
    return tuple(registration.absent(q) if t is None else t.new_empty(t.shape) for t in (q, k, v, beta, g, initial_state))


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? initial_state"
_OPTIONS = "Tensor? index, str order, SymInt[] spatial, bool reverse, float scale"
_forward = registration.operator(
    f"{OP}_forward", f"({_INPUTS}, {_OPTIONS}, bool save, str backend) -> (Tensor, Tensor, Tensor)", _forward_impl, _forward_fake
)
_backward = registration.operator(
    f"{OP}_backward",
    f"(Tensor dout, Tensor? dstate, Tensor recalled, {_INPUTS}, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _setup(ctx, inputs, output):
    *tensors, order, spatial, reverse, scale, _save, backend = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.options = (order, spatial, reverse, scale, backend)


def _gradient(ctx, dout, dstate, _drecalled):
    recalled, *tensors, index = ctx.saved_tensors
    gradients = _backward(dout, dstate, recalled, *tensors, index, *ctx.options)
    return (*(g if t is not None else None for g, t in zip(gradients, tensors, strict=True)), *[None] * 7)


registration.differentiable(f"{OP}_forward", _setup, _gradient)
registration.once_differentiable(f"{OP}_backward")
registration.foldable(f"{OP}_forward", _forward, (*_NAMES, "index", "order", "spatial", "reverse", "scale", "save", "backend"), _NAMES)


def _explained(q, k, v, beta, *, g=None, initial_state=None, **_rest):
    return q, k, v, beta, g, initial_state


dispatch.register(OP, _explained, **registration.kernels(native=native.refuse, triton=triton.refuse))
