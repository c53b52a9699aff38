"""mamba_ssm.ops.selective_scan_interface and selective_state_update on medssm's ops: mamba_ssm's layout and arguments, gradients by autograd."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from medssm import ops
from medssm.integrations.mamba_ssm import complex_scan, states
from medssm.integrations.mamba_ssm.norm import rms_norm_forward


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan in mamba_ssm's layout, `medssm.ops.selective_scan(..., layout="bdl")`.

    Args:
        u, delta, z: (b, d, l). A: (d, n). D, delta_bias: (d,).
        B, C: (b, n, l), (b, g, n, l), or (d, n) for what does not change with the token (each channel is then a group of its own).
        return_last_state: return (out, last state (b, d, n) in float32), differentiable in both.

    With a complex A the state is complex, and B and C are as in `complex_scan`, which is slow: it computes a token at a time in PyTorch.

    Returns out (b, d, l), contiguous, in u's dtype. Raises ValueError or TypeError as medssm.ops.selective_scan.
    """
    if A.is_complex():
        both = complex_scan.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return both if return_last_state else both[0]
    B, C = grouped(B, C, u)
    out = ops.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_final_state=return_last_state, layout="bdl")
    return (out[0].contiguous(), out[1]) if return_last_state else out.contiguous()


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """All of a Mamba mixer behind in_proj: convolution, projections, scan, gate and out_proj; (b, l, d_model).

    Args:
        xz: (b, 2d, l). conv1d_weight: (d, 1, w). x_proj_weight: (r + n + n, d), less the rows of a B or C that is given.
        delta_proj_weight: (d, r). out_proj_weight: (d_model, d). A: (d, n). B, C: None where they come from x_proj, else as selective_scan_fn.
        B_proj_bias, C_proj_bias: (n,). D, delta_bias: (d,). checkpoint_lvl: of no effect.
        b_rms_weight, c_rms_weight (n,), dt_rms_weight (d,): of an RMS norm of B, C and the projected delta before its bias, with b_c_dt_rms_eps.
    """
    u, delta, B, C, z = _project(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias)
    B, C = (t if w is None else rms_norm_forward(t, w, None, b_c_dt_rms_eps) for t, w in ((B, b_rms_weight), (C, c_rms_weight)))
    project: Tensor | None = delta_proj_weight
    if dt_rms_weight is not None:
        delta, project = rms_norm_forward(linear(delta, delta_proj_weight), dt_rms_weight, None, b_c_dt_rms_eps), None
    y = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, project)
    return linear(y, out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """mamba_inner_fn without out_proj, as Vim's and SegMamba's forks have it; (b, d, l), contiguous."""
    u, delta, B, C, z = _project(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias)
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj_weight).movedim(-1, 1).contiguous()


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """Vim's first bidirectional mixer: mamba_inner_fn with a second, reversed scan that has its own A_b (d, n) and shares the rest."""
    u, delta, B, C, z = _project(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias)
    y, back = (_scan(u, delta, a, B, C, D, z, delta_bias, delta_softplus, delta_proj_weight, reverse) for a, reverse in ((A, False), (A_b, True)))
    return linear(y + back, out_proj_weight, out_proj_bias)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of the scan; `state` is updated in place. Differentiable, through the state too.

    Args:
        state: (b, d, n), or with heads (b, h, p, n). x, dt, z: (b, d) or (b, h, p). A: (d, n) or (h, p, n). D, dt_bias: (d,) or (h, p).
        B, C: (b, n) or (b, g, n).
        state_batch_indices: (b,), which rows of a longer `state` are the batch's; at a negative one nothing is updated and out is zero.

    Returns out in x's shape and dtype.
    """
    tokens = x
    if state.dim() == 4:  # heads are neighbouring channels
        tokens, dt, z = x.flatten(1), dt.flatten(1), None if z is None else z.flatten(1)
        A, (D, dt_bias) = A.flatten(0, 1), (None if t is None else t.flatten(0, 1) for t in (D, dt_bias))
    old = states.before(state, state_batch_indices)
    out, new = ops.selective_scan_step(old.reshape(len(x), -1, state.shape[-1]), tokens, dt, A, B, C, D, z, dt_bias, dt_softplus)
    states.update(state, new.reshape(old.shape), state_batch_indices)
    return states.served(out.reshape(x.shape), state_batch_indices)


def grouped(B: Tensor, C: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """B and C of selective_scan_fn as (b, g, n, l) with the same number of groups; u (b, d, l) tells batch and length."""
    forms = {2: lambda t: t[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[-1]), 3: lambda t: t.unsqueeze(1)}
    B, C = (forms[t.dim()](t) if t.dim() in forms else t for t in (B, C))
    groups = max(B.shape[1], C.shape[1])
    B, C = (t if groups % t.shape[1] else t.repeat_interleave(groups // t.shape[1], dim=1) for t in (B, C))
    return B, C


def _project(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u (b, l, d), the low-rank delta (b, l, r), B and C (b, l, g, n), z (b, l, d); with a complex A, B and C as `complex_scan` takes them."""
    u, z = xz.movedim(1, -1).chunk(2, dim=-1)
    u = ops.causal_conv1d(u, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    rows, rank, state = linear(u, x_proj_weight), delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    along = _pairs_along if A.is_complex() else lambda t: t.movedim(-1, 1)
    if B is None:
        B = rows[..., rank : rank + state]
        B = along(B if B_proj_bias is None else B + B_proj_bias.to(B.dtype))
    if C is None:
        C = rows[..., -state:]
        C = along(C if C_proj_bias is None else C + C_proj_bias.to(C.dtype))
    if not A.is_complex():
        B, C = (t.movedim(-1, 1) for t in grouped(B, C, xz))
    return u, rows[..., :rank], B, C, z


def _pairs_along(t: Tensor) -> Tensor:
    """(b, l, 2 n), pairs of real and imaginary parts, as (b, n, 2 l)."""
    return t.unflatten(-1, (-1, 2)).movedim(1, 2).flatten(2)


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    delta_proj: Tensor | None,
    reverse: bool = False,
) -> Tensor:
    """The scan (b, l, d) of what `_project` gives."""
    if not A.is_complex():
        return ops.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj=delta_proj, reverse=reverse)
    delta = delta if delta_proj is None else linear(delta, delta_proj)
    u, delta, z = (t.movedim(-1, 1) for t in (u, delta, z))
    return complex_scan.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)[0].movedim(1, -1)
