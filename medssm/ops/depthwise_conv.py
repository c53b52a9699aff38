"""depthwise_conv: every channel convolved with its own small kernel, over a 1D sequence, a 2D image or a 3D volume."""

from __future__ import annotations

import functools

from medssm import dispatch
from medssm.kernels import cuda, triton
from medssm.kernels.depthwise_conv import native, reference
from medssm.ops import checks, registration

OP = "depthwise_conv"
_kernel = functools.partial(dispatch.kernel, OP)
_NAMES = ("x", "weight", "bias")


def depthwise_conv(x, weight, bias=None, activation=None, *, backend=None):
    """Depthwise convolution (cross-correlation) with stride 1 and zero padding to the same size:

        y_p = act(bias + sum_o weight_o x_{p+o}),    o from -(side-1)/2 to (side-1)/2 along each axis

    Args:
        x: (b, *spatial, d), one or more spatial axes.
        weight: (d, *kernel), one odd side per spatial axis.
        bias: (d,).
        activation: None or "silu".
        backend: reference | native | triton | cuda | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        x's shape and dtype. The sum runs in float32, in float64 if any input is; autocast never reaches it.

    Raises:
        ValueError: a wrong shape, an even side, a wrong dtype or device, or a backend that cannot serve; TypeError: what is no tensor.
    """
    _check(x, weight, bias, activation)
    tensors = (x, weight, bias)
    chosen = dispatch.choose(OP, backend, tensors)
    if chosen == "reference":
        return reference.depthwise_conv(x, weight, bias, activation)
    if registration.direct(tensors):
        return _kernel(chosen).forward(x, weight, bias, activation)
    return _forward(x, weight, bias, activation, chosen)


def _check(x, weight, bias, activation):
    """Raise one clear error for arguments that do not fit."""
    checks.floating(dict(zip(_NAMES, (x, weight, bias), strict=True)))
    checks.dims("x", x, *range(3, 12), form="(b, *spatial, d)")
    checks.dims("weight", weight, x.dim() - 1, form=f"(d, *kernel) with {x.dim() - 2} sides")
    channels, sides = x.shape[-1], tuple(weight.shape[1:])
    checks.shape("weight", weight, (channels, *sides))
    if any(side % 2 == 0 for side in sides):
        raise ValueError(f"weight: expected odd kernel sides, got {sides}")
    checks.shape("bias", bias, (channels,))
    checks.choice("activation", activation, (None, "silu"))


# -- the registered operator ------------------------------------------------------------------------------------------------------


def _forward_impl(x, weight, bias, activation, backend):
    return _kernel(backend).forward(x, weight, bias, activation)


def _forward_fake(x, weight, bias, activation, backend):
    return x.new_empty(x.shape)


def _backward_impl(dout, x, weight, bias, activation, backend):
    gradients = _kernel(backend).backward(dout, x, weight, bias, activation)
    return tuple(registration.absent(x) if g is None else g for g in gradients)


def _backward_fake(dout, x, weight, bias, activation, backend):
    return tuple(registration.absent(x) if t is None else t.new_empty(t.shape) for t in (x, weight, bias))


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, str? activation, str backend"
_forward = registration.operator(f"{OP}_forward", f"({_INPUTS}) -> Tensor", _forward_impl, _forward_fake)
_backward = registration.operator(f"{OP}_backward", f"(Tensor dout, {_INPUTS}) -> (Tensor, Tensor, Tensor)", _backward_impl, _backward_fake)


def _setup(ctx, inputs, output):
    *tensors, activation, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (activation, backend)


def _gradient(ctx, dout):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _backward(dout, x, weight, bias, *ctx.options)
    return dx, dweight, None if bias is None else dbias, None, None


registration.differentiable(f"{OP}_forward", _setup, _gradient)
registration.once_differentiable(f"{OP}_backward")
registration.foldable(f"{OP}_forward", _forward, (*_NAMES, "activation", "backend"), ("x",))


def _explained(x, weight, bias=None, activation=None, **_rest):
    return x, weight, bias


def _gpu(library):
    """What a GPU's kernels refuse: what their library does, and more axes than they have."""
    return lambda x, weight, bias: (
        library.refuse(x, weight, bias) or (None if x.dim() <= 5 else f"it serves up to three spatial axes, x has {x.dim() - 2}")
    )


dispatch.register(OP, _explained, **registration.kernels(native=native.refuse, triton=_gpu(triton), cuda=_gpu(cuda)))
