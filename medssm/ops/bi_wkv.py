"""bi_wkv: Vision-RWKV's bidirectional attention over a sequence, or over a 2D image or 3D volume in any scan order."""

from __future__ import annotations

import functools

import torch

from medssm import dispatch
from medssm.kernels import triton
from medssm.kernels.bi_wkv import native, reference
from medssm.ops import checks, registration, walk

OP = "bi_wkv"
_kernel = functools.partial(dispatch.kernel, OP)
_NAMES = ("v", "k", "w", "u")


def bi_wkv(w, u, k, v, *, mode="exact", order=None, backend=None):
    """Bidirectional WKV along the walk p = order.index(spatial); t and i are steps of it:

        o_t = (sum_{i != t} e^{k_i - (|t-i|-1) w} v_i + e^{u+k_t} v_t) / (sum_{i != t} e^{k_i - (|t-i|-1) w} + e^{u+k_t})

    Args:
        w: (d,), how fast a token's weight falls with its distance; of any sign. Vision-RWKV passes its decay divided by the length, here and for u.
        u: (d,), a token's bonus for itself.
        k, v: (b, l, d); with an Order (b, *spatial, d).
        mode: "exact", the formula; "upstream", what the published CUDA kernels compute, for weights that were trained with them: they cut the walk
            into 32 chunks, and weights across a chunk's start fall one step too far (kernels/bi_wkv/reference.py has it term by term).
            Its denominator may come near zero where w times the chunk's length is not small: at 10 the reference in float32 keeps three digits of
            the outputs, and so does every kernel. The gradient is that of this function, eps and its shift taken for constants; the published
            backward kernels leave the extra step out of the gradients of k and v.
        order: an Order, or a LongTensor (l,), a permutation: the token at each step. Outputs stay where their tokens are; where the order
            begins anew (order.starts), so does the attention: tokens of different segments do not see each other, and each has chunks of its own.
        backend: reference | native | triton | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out, v's shape and dtype. The sums run in float32, in float64 if any input is, shifted by their largest exponent or nearly so: keys
        and decays of any size give finite numbers. Autocast never reaches the sums. Over 16,384 tokens, w and u scaled by the length, the CPU kernel
        in float32 is within 1e-5 of float64 in the outputs and 1e-4 in the gradients, relative to the largest. With a negative w weights grow to
        e^{|w| l}; where |w| l is in the hundreds, float32's gradients keep four or five digits, that of w three. With a bonus u of 20 and more an
        output is its own token's value, and of the differences that make the gradients of u and k float32 keeps one digit.

    Raises:
        ValueError: a wrong shape, dtype, device, mode or order, or a backend that cannot serve; TypeError: what is no tensor.

    Source: Duan et al., Vision-RWKV, arXiv 2403.02308, section 3.2.
    """
    spatial = _check(w, u, k, v, mode, nd=order is not None and not isinstance(order, torch.Tensor))
    shape, spec, index = v.shape, "", None
    if order is not None:
        spec, index = walk.parse(order, spatial)
        k, v = walk.flatten(k, spatial), walk.flatten(v, spatial)
    tensors = (v, k, w, u)

    chosen = dispatch.choose(OP, backend, tensors)
    if chosen == "reference" and not v.is_meta:  # of a meta tensor only shapes are wanted: the operator has them without a loop
        out = reference.bi_wkv(w, u, k, v, mode, *walk.resolve(spec, spatial, index, False, v.device))
    elif chosen != "reference" and registration.direct(tensors):
        out = _kernel(chosen).forward(w, u, k, v, mode, *walk.resolve(spec, spatial, index, False, v.device))
    else:
        out = _forward(*tensors, index, spec, spatial, mode, chosen)
    return out if order is None else out.reshape(shape)


def _check(w, u, k, v, mode, nd):
    """Raise one clear error for arguments that do not fit; return the spatial shape."""
    checks.floating(dict(zip(_NAMES, (v, k, w, u), strict=True)))
    if nd:
        checks.dims("v", v, *range(3, 12), form="(b, *spatial, d)")
    else:
        checks.dims("v", v, 3, form="(b, l, d)")
    _batch, *spatial, channels = v.shape
    checks.shape("k", k, v.shape)
    checks.shape("w", w, (channels,))
    checks.shape("u", u, (channels,))
    checks.choice("mode", mode, ("exact", "upstream"))
    return tuple(spatial)


# -- the registered operator ------------------------------------------------------------------------------------------------------
# The backward keeps nothing but the inputs: the forward's sums are found again, in two of its sweeps.


def _forward_impl(v, k, w, u, index, order, spatial, mode, backend):
    return _kernel(backend).forward(w, u, k, v, mode, *walk.resolve(order, spatial, index, False, v.device))


def _forward_fake(v, k, w, u, index, order, spatial, mode, backend):
    return v.new_empty(v.shape)


def _backward_impl(dout, v, k, w, u, index, order, spatial, mode, backend):
    dw, du, dk, dv = _kernel(backend).backward(dout, w, u, k, v, mode, *walk.resolve(order, spatial, index, False, v.device))
    return dv, dk, dw, du


def _backward_fake(dout, v, k, w, u, *_rest):
    return tuple(t.new_empty(t.shape) for t in (v, k, w, u))


_INPUTS = "Tensor v, Tensor k, Tensor w, Tensor u"
_OPTIONS = "Tensor? index, str order, SymInt[] spatial, str mode, str backend"
_forward = registration.operator(f"{OP}_forward", f"({_INPUTS}, {_OPTIONS}) -> Tensor", _forward_impl, _forward_fake)
_backward = registration.operator(
    f"{OP}_backward", f"(Tensor dout, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)", _backward_impl, _backward_fake
)


def _setup(ctx, inputs, output):
    *tensors, order, spatial, mode, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (order, spatial, mode, backend)


def _gradient(ctx, dout):
    *tensors, index = ctx.saved_tensors
    return (*_backward(dout, *tensors, index, *ctx.options), *[None] * 5)


registration.differentiable(f"{OP}_forward", _setup, _gradient)
registration.once_differentiable(f"{OP}_backward")
registration.foldable(f"{OP}_forward", _forward, (*_NAMES, "index", "order", "spatial", "mode", "backend"), ("v", "k"))


def _explained(w, u, k, v, **_rest):
    return v, k, w, u


dispatch.register(OP, _explained, **registration.kernels(native=native.refuse, triton=triton.refuse))
