"""linear_attention: attention without the softmax, over all tokens or causal along any scan order, in linear time."""

from __future__ import annotations

import functools
import math

import torch

from medssm import dispatch
from medssm.kernels import triton
from medssm.kernels.linear_attention import native, reference
from medssm.ops import checks, registration, walk

OP = "linear_attention"
_kernel = functools.partial(dispatch.kernel, OP)
_NAMES = ("q", "k", "v", "cos", "sin", "initial_kv", "initial_k")


def linear_attention(
    q,
    k,
    v,
    *,
    feature_map="elu",
    rotary=None,
    causal=False,
    normalize=True,
    scale=1.0,
    eps=1e-6,
    order=None,
    reverse=False,
    initial_state=None,
    return_final_state=False,
    backend=None,
):
    """Linear attention. With q' = f(q), k' = f(k), f the feature map, and R the rotation of a token's position:

        kv = sum_s R_s k'_s v_s^T,    z = sum_s k'_s
        o_t = scale (R_t q'_t) kv / (q'_t . z + eps)

    The sums run over all tokens, or, causal, along the walk p = order.index(spatial) up to step t.

    Args:
        q: (b, l, h, dk); with an Order (b, *spatial, h, dk). Not causal, its length may differ from k's.
        k, v: (b, l, g, dk) and (b, l, g, dv), g groups that divide h (usually g = h): head j of q uses group j // (h // g).
        feature_map: "elu" (elu + 1), "relu", None (as they are), or a function, called on q and on k in PyTorch before everything else.
        rotary: (cos, sin), each (l, dk) or (l, g, dk), tokens in memory's order, one number for every channel: the pair of channels (2i, 2i+1), taken
            as a complex number, turns by the angle whose cosine and sine stand, the same, at 2i and 2i+1. The numerator alone is rotated. Constants.
        causal: token t sees the tokens up to its own step alone.
        normalize: divide by q' . z + eps; without, eps plays no part.
        scale, eps: numbers.
        order: an Order, or a LongTensor (l,), a permutation: the token visited at each step; causal sums begin anew where order.starts says. Outputs
            stay where their tokens are. Without `causal`, order and reverse change nothing.
        reverse: walk the other way round.
        initial_state: (kv, z) as (b, g, dk, dv) and (b, g, dk), added before the first step; differentiable.
        return_final_state: return (out, (kv, z)), the sums after the last step, in float32 (float64 when computing in it), differentiable. A
            sequence cut in two, the state passed on, gives the same when causal; not causal, the state is the total, initial_state included.
        backend: reference | native | triton | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out (b, l, h, dv), or (b, *spatial, h, dv), in v's dtype; or (out, state). The sums run in float32, in float64 if any input is; autocast never
        reaches them.

    Raises:
        ValueError: a wrong shape, dtype, device or order, or a backend that cannot serve; TypeError: what is no tensor.

    Source: Katharopoulos et al., arXiv 2006.16236, section 3; the rotation of the numerator alone: Han et al., arXiv 2405.16605, section 4.2.
    """
    if callable(feature_map):
        q, k, feature_map = feature_map(q), feature_map(k), None
    checks.choice("feature_map", feature_map, ("elu", "relu", None))
    cos, sin = _pair("rotary", rotary, "(cos, sin)")
    initial_kv, initial_k = _pair("initial_state", initial_state, "(sum k' v^T, sum k')")
    nd = order is not None and not isinstance(order, torch.Tensor)
    q_spatial, spatial = _check(q, k, v, cos, sin, initial_kv, initial_k, causal, nd)
    shape, spec, index = (*q.shape[:-1], v.shape[-1]), "", None
    if order is not None:
        spec, index = walk.parse(order, spatial)
        q, k, v = walk.flatten(q, q_spatial), walk.flatten(k, spatial), walk.flatten(v, spatial)
    if not causal:
        spec, index, reverse = "", None, False
    if cos is not None:
        cos, sin = (_tokens(t, spatial, *k.shape[1:3]) for t in (cos, sin))
    tensors = (q, k, v, cos, sin, initial_kv, initial_k)
    options = (feature_map, causal, normalize, float(scale), float(eps))

    chosen = dispatch.choose(OP, backend, (*tensors, causal))
    if chosen == "reference" and not (causal and q.is_meta):  # of a meta tensor only shapes are wanted: the operator has them without a loop
        out, *state = reference.linear_attention(*tensors, *options, *walk.resolve(spec, spatial, index, reverse, q.device))
    elif chosen != "reference" and registration.direct(tensors):
        out, *state = _kernel(chosen).forward(*tensors, *options, *walk.resolve(spec, spatial, index, reverse, q.device))
    else:
        out, *state = _forward(*tensors, index, spec, spatial, reverse, *options, chosen)
    if order is not None:
        out = out.reshape(shape)
    return (out, tuple(state)) if return_final_state else out


def linear_attention_step(state, q, k, v, *, feature_map="elu", rotary=None, normalize=True, scale=1.0, eps=1e-6, backend=None):
    """One token of causal `linear_attention`: q (b, h, dk); k (b, g, dk); v (b, g, dv); rotary (dk,) or (g, dk) each; state (kv, z), the rest as
    there.

    Returns (out (b, h, dv), the new state). Stepping through a sequence equals causal attention over it.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        checks.dims(name, t, 3, form="(b, h, d)")
    if rotary is not None:
        rotary = tuple(t.unsqueeze(0) for t in _pair("rotary", rotary, "(cos, sin)"))
    out, state = linear_attention(
        *(t.unsqueeze(1) for t in (q, k, v)),
        feature_map=feature_map,
        rotary=rotary,
        causal=True,
        normalize=normalize,
        scale=scale,
        eps=eps,
        initial_state=state,
        return_final_state=True,
        backend=backend,
    )
    return out.squeeze(1), state


def _pair(name, value, form):
    """Both tensors of a pair, or twice None."""
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(t, torch.Tensor) for t in value):
        raise TypeError(f"{name}: expected a pair of tensors {form}, got {type(value).__name__}")
    return tuple(value)


def _tokens(t, spatial, length, groups):
    """(l, dk), or (*spatial, dk), or with groups before dk -> (l, g, dk)."""
    heads = 1 if t.shape[:-1] in ((length,), spatial) else groups
    return t.reshape(length, heads, t.shape[-1]).expand(length, groups, t.shape[-1])


def _check(q, k, v, cos, sin, initial_kv, initial_k, causal, nd):
    """Raise one clear error for arguments that do not fit; return the spatial shapes of q and of k."""
    names = ("q", "k", "rotary", "rotary", "initial_state", "initial_state")
    for name, t in zip(names, (q, k, cos, sin, initial_kv, initial_k), strict=True):
        checks.floating({"v": v, name: t})
    for name, t, form in (("q", q, "h, dk"), ("k", k, "g, dk"), ("v", v, "g, dv")):
        checks.dims(name, t, *(range(4, 13) if nd else (4,)), form=f"(b, *spatial, {form})" if nd else f"(b, l, {form})")
    batch, *q_spatial, heads, dk = q.shape
    spatial, groups, dv = tuple(k.shape[1:-2]), k.shape[-2], v.shape[-1]
    q_spatial = tuple(q_spatial)
    checks.shape("k", k, (batch, *(q_spatial if causal else spatial), groups, dk))
    if groups == 0 or heads % groups:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {groups}")
    checks.shape("v", v, (batch, *spatial, groups, dv))
    if cos is not None:
        length = math.prod(spatial)
        if q_spatial != spatial:
            raise ValueError(f"rotary: expected q and k of the same tokens, got {q_spatial} and {spatial}")
        if dk % 2:
            raise ValueError(f"rotary: expected an even number of channels to pair, got dk = {dk}")
        for t in (cos, sin):
            checks.shape("rotary", t, (length, dk), (length, groups, dk), (*spatial, dk), (*spatial, groups, dk))
            if t.requires_grad:
                raise ValueError("rotary: expected constants, got tensors that require a gradient")
    checks.shape("initial_state", initial_kv, (batch, groups, dk, dv))
    checks.shape("initial_state", initial_k, (batch, groups, dk))
    return q_spatial, spatial


# -- the registered operator ------------------------------------------------------------------------------------------------------


def _forward_impl(q, k, v, cos, sin, initial_kv, initial_k, index, order, spatial, reverse, feature_map, causal, normalize, scale, eps, backend):
    way = walk.resolve(order, spatial, index, reverse, q.device)
    return tuple(_kernel(backend).forward(q, k, v, cos, sin, initial_kv, initial_k, feature_map, causal, normalize, scale, eps, *way))


def _forward_fake(q, k, v, cos, sin, initial_kv, initial_k, *_rest):
    dtype = checks.compute_dtype(q, k, v, cos, sin, initial_kv, initial_k)
    batch, _, groups, dk = k.shape
    state = q.new_empty((batch, groups, dk, v.shape[-1]), dtype=dtype)
    return v.new_empty((*q.shape[:-1], v.shape[-1])), state, q.new_empty((batch, groups, dk), dtype=dtype)


def _backward_impl(
    dout,
    dkv,
    dz,
    kv,
    z,
    q,
    k,
    v,
    cos,
    sin,
    initial_kv,
    initial_k,
    index,
    order,
    spatial,
    reverse,
    feature_map,
    causal,
    normalize,
    scale,
    eps,
    backend,
):
    way = walk.resolve(order, spatial, index, reverse, q.device)
    gradients = _kernel(backend).backward(
        dout, dkv, dz, kv, z, q, k, v, cos, sin, initial_kv, initial_k, feature_map, causal, normalize, scale, eps, *way
    )
    return tuple(registration.absent(q) if g is None else g for g in gradients)


def _backward_fake(dout, dkv, dz, kv, z, q, k, v, cos, sin, initial_kv, initial_k, *_rest):
    return tuple(registration.absent(q) if t is None else t.new_empty(t.shape) for t in (q, k, v, initial_kv, initial_k))


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? initial_kv, Tensor? initial_k"
_OPTIONS = (
    "Tensor? index, str order, SymInt[] spatial, bool reverse, str? feature_map, bool causal, bool normalize, float scale, float eps, str backend"
)
_forward = registration.operator(f"{OP}_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", _forward_impl, _forward_fake)
_backward = registration.operator(
    f"{OP}_backward",
    f"(Tensor dout, Tensor? dkv, Tensor? dz, Tensor kv, Tensor z, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _setup(ctx, inputs, output):
    tensors, index, options = inputs[:7], inputs[7], inputs[8:]
    ctx.save_for_backward(*output[1:], *tensors, index)
    ctx.options = options


def _gradient(ctx, dout, dkv, dz):
    kv, z, *tensors, index = ctx.saved_tensors
    dq, dk, dv, dinitial_kv, dinitial_k = _backward(dout, dkv, dz, kv, z, *tensors, index, *ctx.options)
    if tensors[5] is None:
        dinitial_kv = dinitial_k = None
    return dq, dk, dv, None, None, dinitial_kv, dinitial_k, *[None] * 10


registration.differentiable(f"{OP}_forward", _setup, _gradient)
registration.once_differentiable(f"{OP}_backward")
registration.foldable(
    f"{OP}_forward",
    _forward,
    (*_NAMES, "index", "order", "spatial", "reverse", "feature_map", "causal", "normalize", "scale", "eps", "backend"),
    ("q", "k", "v", "initial_kv", "initial_k"),
)


def _explained(q, k, v, *, causal=False, rotary=None, initial_state=None, **_rest):
    return (q, k, v, *_pair("rotary", rotary, "(cos, sin)"), *_pair("initial_state", initial_state, "(kv, z)"), causal)


def _triton_refuses(q, k, v, cos, sin, initial_kv, initial_k, causal):
    return triton.refuse(q, k, v, cos, sin, initial_kv, initial_k)


dispatch.register(OP, _explained, **registration.kernels(native=native.refuse, triton=_triton_refuses))
