"""causal_conv1d: Mamba's short depthwise convolution over a sequence, or over a 2D image or 3D volume in any scan order."""

from __future__ import annotations

import functools

import torch

from medssm import dispatch
from medssm.kernels import cuda, triton
from medssm.kernels.causal_conv1d import native, reference
from medssm.ops import checks, registration, walk

OP = "causal_conv1d"
_kernel = functools.partial(dispatch.kernel, OP)
_NAMES = ("x", "weight", "bias", "initial_state")
_WIDEST = 8  # taps that Triton's kernels unroll


def causal_conv1d(
    x, weight, bias=None, activation=None, *, order=None, reverse=False, initial_state=None, return_final_state=False, layout="bld", backend=None
):
    """Causal depthwise convolution along the walk p = order.index(spatial):

        y_t = act(bias + sum_{j=0}^{w-1} weight_j x_{p(t-w+1+j)})

    Args:
        x: (b, l, d); with an Order (b, *spatial, d).
        weight: (d, w), any width w from 1.
        bias: (d,).
        activation: None or "silu".
        order: an Order, or a LongTensor (l,), a permutation: the token visited at each step. Outputs stay where their tokens are; where
            the order begins anew (order.starts), so do the taps.
        reverse: walk the other way round.
        initial_state: (b, d, w-1), the tokens before the first step, oldest first (zeros if None); differentiable.
        return_final_state: return (out, state), state (b, d, w-1) in x's dtype: the tokens that the next step would see; differentiable.
        layout: "bld", or causal_conv1d's "bdl": x (b, d, l).
        backend: reference | native | triton | cuda | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out, x's shape and dtype, or (out, state). The sum runs in float32, in float64 if any input is; autocast never reaches it.

    Raises:
        ValueError: a wrong shape, dtype, device or order, or a backend that cannot serve; TypeError: what is no tensor.

    Source: Gu and Dao, Mamba, arXiv 2312.00752, section 3.4.
    """
    if layout != "bld":
        checks.choice("layout", layout, ("bld", "bdl"))
        checks.dims("x", x, *range(3, 12), form="(b, d, l)")
        out = causal_conv1d(
            x.movedim(1, -1),
            weight,
            bias,
            activation,
            order=order,
            reverse=reverse,
            initial_state=initial_state,
            return_final_state=return_final_state,
            backend=backend,
        )
        return (out[0].movedim(-1, 1), out[1]) if return_final_state else out.movedim(-1, 1)

    spatial = _check(x, weight, bias, activation, initial_state, nd=order is not None and not isinstance(order, torch.Tensor))
    shape, spec, index = x.shape, "", None
    if order is not None:
        spec, index = walk.parse(order, spatial)
        x = walk.flatten(x, spatial)
    tensors = (x, weight, bias, initial_state)

    chosen = dispatch.choose(OP, backend, tensors)
    if chosen == "reference":
        way = walk.resolve(spec, spatial, index, reverse, x.device)
        out, state = reference.causal_conv1d(x, weight, bias, activation, *way, initial_state)
    elif registration.direct(tensors):
        way = walk.resolve(spec, spatial, index, reverse, x.device)
        out, state = _kernel(chosen).forward(x, weight, bias, activation, *way, initial_state, return_final_state)
    else:
        out, state = _forward(*tensors, index, spec, spatial, reverse, activation, chosen)
    if order is not None:
        out = out.reshape(shape)
    return (out, state) if return_final_state else out


def causal_conv1d_step(state, x, weight, bias=None, activation=None, *, backend=None):
    """One token of `causal_conv1d`: x (b, d); state (b, d, w-1); the rest as there.

    Returns (out (b, d), the new state). Stepping through a sequence equals convolving it.
    """
    checks.dims("x", x, 2, form="(b, d)")
    out, state = causal_conv1d(x.unsqueeze(1), weight, bias, activation, initial_state=state, return_final_state=True, backend=backend)
    return out.squeeze(1), state


def _check(x, weight, bias, activation, initial_state, nd):
    """Raise one clear error for arguments that do not fit; return the spatial shape."""
    checks.floating(dict(zip(_NAMES, (x, weight, bias, initial_state), strict=True)))
    if nd:
        checks.dims("x", x, *range(3, 12), form="(b, *spatial, d)")
    else:
        checks.dims("x", x, 3, form="(b, l, d)")
    checks.dims("weight", weight, 2, form="(d, w)")
    batch, *spatial, channels = x.shape
    width = weight.shape[1]
    checks.shape("weight", weight, (channels, width))
    if width == 0:
        raise ValueError(f"weight: expected (d, w) with w at least 1, got {tuple(weight.shape)}")
    checks.shape("bias", bias, (channels,))
    checks.shape("initial_state", initial_state, (batch, channels, width - 1))
    checks.choice("activation", activation, (None, "silu"))
    return tuple(spatial)


# -- the registered operator ------------------------------------------------------------------------------------------------------


def _forward_impl(x, weight, bias, initial_state, index, order, spatial, reverse, activation, backend):
    way = walk.resolve(order, spatial, index, reverse, x.device)
    return _kernel(backend).forward(x, weight, bias, activation, *way, initial_state, True)


def _forward_fake(x, weight, bias, initial_state, index, order, spatial, reverse, activation, backend):
    batch, length, channels = x.shape
    return x.new_empty((batch, length, channels)), x.new_empty((batch, channels, weight.shape[1] - 1))


def _backward_impl(dout, dstate, x, weight, bias, initial_state, index, order, spatial, reverse, activation, backend):
    way = walk.resolve(order, spatial, index, reverse, x.device)
    gradients = _kernel(backend).backward(dout, dstate, x, weight, bias, activation, *way, initial_state)
    return tuple(registration.absent(x) if g is None else g for g in gradients)


def _backward_fake(dout, dstate, x, weight, bias, initial_state, *_rest):
    return tuple(registration.absent(x) if t is None else t.new_empty(t.shape) for t in (x, weight, bias, initial_state))


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state"
_OPTIONS = "Tensor? index, str order, SymInt[] spatial, bool reverse, str? activation, str backend"
_forward = registration.operator(f"{OP}_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)", _forward_impl, _forward_fake)
_backward = registration.operator(
    f"{OP}_backward", f"(Tensor dout, Tensor? dstate, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)", _backward_impl, _backward_fake
)


def _setup(ctx, inputs, output):
    *tensors, order, spatial, reverse, activation, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (order, spatial, reverse, activation, backend)


def _gradient(ctx, dout, dstate):
    *tensors, index = ctx.saved_tensors
    gradients = _backward(dout, dstate, *tensors, index, *ctx.options)
    return (*(g if t is not None else None for g, t in zip(gradients, tensors, strict=True)), *[None] * 6)


registration.differentiable(f"{OP}_forward", _setup, _gradient)
registration.once_differentiable(f"{OP}_backward")
registration.foldable(f"{OP}_forward", _forward, (*_NAMES, "index", "order", "spatial", "reverse", "activation", "backend"), ("x", "initial_state"))


def _explained(x, weight, bias=None, activation=None, *, initial_state=None, **_rest):
    return x, weight, bias, initial_state


def _triton_refuses(x, weight, bias, initial_state):
    return triton.refuse(x, weight, bias, initial_state) or (
        None if weight.shape[1] <= _WIDEST else f"it serves kernels of at most {_WIDEST} taps, got {weight.shape[1]}"
    )


dispatch.register(OP, _explained, **registration.kernels(native=native.refuse, triton=_triton_refuses, cuda=cuda.refuse))
