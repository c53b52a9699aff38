"""selective_scan_nd: several selective scans through one image or volume, each in its own order, merged in place."""

from __future__ import annotations

import functools

from medssm import dispatch
from medssm.kernels import cuda, triton
from medssm.kernels.selective_scan import native, plan, reference
from medssm.ops import checks, registration, walk

OP = "selective_scan_nd"
_kernel = functools.partial(dispatch.kernel, "selective_scan")
_NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_proj")


def selective_scan_nd(
    x, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *, delta_proj=None, orders, merge="sum", backend=None
):
    """Scan x along every order in place, each with its own parameters, and merge: the core of VMamba's SS2D, in any dimension.

        y_k = selective_scan(x, delta_k, A_k, B_k, C_k, D_k, order=orders[k]),    out = merge_k(y_k) silu(z)

    Nothing is flipped, transposed or copied; the merge adds in float32 in list order.

    Args:
        x: (b, *spatial, d), shared by the orders, or one per order (b, *spatial, k, d).
        delta: (b, *spatial, k, d), or with delta_proj the low-rank (b, *spatial, k, r).
        A: (k, d, n). B, C: (b, *spatial, k, n) or (b, *spatial, k, g, n). D, delta_bias: (k, d).
        z: (b, *spatial, d), gates after the merge (every slice of a stack).
        delta_proj: (k, d, r), expands the low-rank delta inside the kernel.
        orders: a list of k Orders. merge: "sum" | "mean" -> (b, *spatial, d); "stack" -> (b, *spatial, k, d).
        backend: reference | native | triton | cuda | auto.

    Raises ValueError or TypeError as `selective_scan` does. Source: Liu et al., VMamba, arXiv 2401.10166.
    """
    orders = list(orders)
    tensors = (x, delta, A, B, C, D, z, delta_bias, delta_proj)
    spatial = _check(*tensors, orders, merge)
    specs = [walk.parse(order, spatial, f"orders[{k}]")[0] for k, order in enumerate(orders)]
    batch, channels = x.shape[0], x.shape[-1]
    dims = len(spatial)
    x, delta, B, C, z = (walk.flatten(t, spatial) for t in (x, delta, B, C, z))
    if B.dim() == 4:
        B = B.unsqueeze(3)
    if C.dim() == 4:
        C = C.unsqueeze(3)
    tensors = (x, delta, A, B, C, D, z, delta_bias, delta_proj)

    chosen = dispatch.choose(OP, backend, tensors)
    if chosen == "reference" and not x.is_meta:  # of a meta tensor only shapes are wanted: the operator has them without a loop
        walks = [walk.resolve(spec, spatial, None, False, x.device) for spec in specs]
        out = reference.selective_scan_nd(*tensors[:8], delta_softplus, delta_proj, walks, merge)
    elif chosen != "reference" and registration.direct(tensors):
        walks = [walk.resolve(spec, spatial, None, False, x.device) for spec in specs]
        out, _ = _kernel(chosen).forward_nd(*tensors[:8], delta_softplus, delta_proj, walks, merge, False)
    else:
        save = registration.needs_grad(tensors) and x.numel() > 0
        out, _ = _forward(*tensors, specs, spatial, delta_softplus, merge, save, chosen)
    if dims == 1:
        return out
    return out.reshape(batch, *spatial, *((len(orders),) if merge == "stack" else ()), channels)


def _check(x, delta, A, B, C, D, z, delta_bias, delta_proj, orders, merge):
    """Raise one clear error for arguments that do not fit; return the spatial shape."""
    checks.floating(dict(zip(_NAMES, (x, delta, A, B, C, D, z, delta_bias, delta_proj), strict=True)))
    checks.choice("merge", merge, ("sum", "mean", "stack"))
    checks.dims("A", A, 3, form="(k, d, n)")
    k, channels, state = A.shape
    if not 1 <= state <= 256:
        raise ValueError(f"A: expected (k, d, n) with n from 1 to 256, got {tuple(A.shape)}")
    if len(orders) != k or k == 0:
        raise ValueError(f"orders: expected {max(k, 1)} orders, one per row of A {tuple(A.shape)}, got {len(orders)}")
    checks.dims("delta", delta, *range(4, 12), form="(b, *spatial, k, d)")
    batch, *spatial = delta.shape[:-2]
    checks.dims("x", x, delta.dim() - 1, delta.dim(), form=f"{(batch, *spatial, channels)} or {(batch, *spatial, k, channels)}")
    checks.shape("x", x, (batch, *spatial, channels), (batch, *spatial, k, channels))
    if delta_proj is None:
        checks.shape("delta", delta, (batch, *spatial, k, channels))
    else:
        checks.dims("delta_proj", delta_proj, 3, form="(k, d, r)")
        checks.shape("delta_proj", delta_proj, (k, channels, delta_proj.shape[2]))
        checks.shape("delta", delta, (batch, *spatial, k, delta_proj.shape[2]))
    counts = [t.shape[-2] if t.dim() == delta.dim() + 1 else 1 for t in (B, C)]
    if counts[0] != counts[1]:
        raise ValueError(f"C: expected {counts[0]} groups as B has, got {counts[1]}")
    if counts[0] == 0 or channels % counts[0]:
        raise ValueError(f"B: expected a number of groups that divides {channels} channels, got {counts[0]}")
    for name, t in (("B", B), ("C", C)):
        checks.shape(name, t, (batch, *spatial, k, state), (batch, *spatial, k, counts[0], state))
    checks.shape("z", z, (batch, *spatial, channels))
    checks.shape("D", D, (k, channels))
    checks.shape("delta_bias", delta_bias, (k, channels))
    return tuple(spatial)


# -- the registered operator ------------------------------------------------------------------------------------------------------


def _walks(orders, spatial, device):
    return [walk.resolve(spec, spatial, None, False, device) for spec in orders]


def _forward_impl(x, delta, A, B, C, D, z, delta_bias, delta_proj, orders, spatial, delta_softplus, merge, save, backend):
    walks = _walks(orders, spatial, x.device)
    out, checkpoints = _kernel(backend).forward_nd(x, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, walks, merge, save)
    return out, registration.absent(out) if checkpoints is None else checkpoints


def _forward_fake(x, delta, A, B, C, D, z, delta_bias, delta_proj, orders, spatial, delta_softplus, merge, save, backend):
    batch, length, channels = x.shape[0], x.shape[1], x.shape[-1]
    k, _, state = A.shape
    dtype = checks.compute_dtype(x, delta, A, B, C, D, z, delta_bias, delta_proj) if save else x.dtype
    checkpoints = (batch, k, plan.chunks(length, state), state, channels) if save else (0,)
    out = (batch, length, k, channels) if merge == "stack" else (batch, length, channels)
    return x.new_empty(out), x.new_empty(checkpoints, dtype=dtype)


def _backward_impl(dout, checkpoints, x, delta, A, B, C, D, z, delta_bias, delta_proj, orders, spatial, delta_softplus, merge, backend):
    walks, kernel = _walks(orders, spatial, x.device), _kernel(backend)
    rest = (x, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, walks, merge)
    if checkpoints.dim() == 1 and x.numel():
        checkpoints = kernel.forward_nd(*rest, True)[1]
    return tuple(registration.absent(x) if g is None else g for g in kernel.backward_nd(dout, checkpoints, *rest))


def _backward_fake(dout, checkpoints, x, delta, A, B, C, D, z, delta_bias, delta_proj, *_rest):
    return tuple(registration.absent(x) if t is None else t.new_empty(t.shape) for t in (x, delta, A, B, C, D, z, delta_bias, delta_proj))


_INPUTS = "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? delta_proj"
_OPTIONS = "str[] orders, SymInt[] spatial, bool delta_softplus, str merge"
_forward = registration.operator(
    f"{OP}_forward", f"({_INPUTS}, {_OPTIONS}, bool save, str backend) -> (Tensor, Tensor)", _forward_impl, _forward_fake
)
_backward = registration.operator(
    f"{OP}_backward",
    f"(Tensor dout, Tensor checkpoints, {_INPUTS}, {_OPTIONS}, str backend) -> (" + ", ".join(["Tensor"] * len(_NAMES)) + ")",
    _backward_impl,
    _backward_fake,
)


def _setup(ctx, inputs, output):
    *tensors, orders, spatial, delta_softplus, merge, _save, backend = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.options = (orders, spatial, delta_softplus, merge, backend)


def _gradient(ctx, dout, _dcheckpoints):
    checkpoints, *tensors = ctx.saved_tensors
    gradients = _backward(dout, checkpoints, *tensors, *ctx.options)
    return (*(g if t is not None else None for g, t in zip(gradients, tensors, strict=True)), *[None] * 6)


registration.differentiable(f"{OP}_forward", _setup, _gradient)
registration.once_differentiable(f"{OP}_backward")
registration.foldable(
    f"{OP}_forward", _forward, (*_NAMES, "orders", "spatial", "delta_softplus", "merge", "save", "backend"), ("x", "delta", "B", "C", "z")
)


def _explained(x, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *, delta_proj=None, **_rest):
    return x, delta, A, B, C, D, z, delta_bias, delta_proj


dispatch.register(OP, _explained, **registration.kernels(native=native.refuse, triton=triton.refuse, cuda=cuda.refuse))
