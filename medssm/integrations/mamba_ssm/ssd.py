"""mamba_ssm.ops.triton.ssd_combined and ssd_minimal on medssm's ops: mamba_ssm's arguments, gradients by autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear, silu, softplus

from medssm import ops
from medssm.integrations.mamba_ssm.absent import refuse
from medssm.integrations.mamba_ssm.convolution import activation_name
from medssm.integrations.mamba_ssm.norm_gated import rmsnorm_fn
from medssm.integrations.mamba_ssm.packing import packing
from medssm.ops import shapes


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-2's scan, `medssm.ops.ssd` under upstream's arguments.

    Args:
        x, z: (b, l, h, p). dt: (b, l, h). A, dt_bias: (h,). B, C: (b, l, g, n). D: (h,) or (h, p). initial_states: (b, h, p, n).
        seq_idx: (b, l), packed sequences: the state begins anew where it changes. A row's initial state enters its first sequence, its final state
            leaves its last one.
        cu_seqlens: (sequences + 1,), of a batch of 1: the same by the sequences' bounds; upstream reads it for return_varlen_states alone.
        return_varlen_states: return the last state of each of cu_seqlens' sequences as well, zero for an empty one.
        chunk_size, state_dtype: of no effect.

    Returns out (b, l, h, p) in x's dtype, the final states (b, h, p, n) and those of the sequences (sequences, h, p, n) in float32, as asked for.
    """
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("cu_seqlens: expected the sequences' bounds, since return_varlen_states is True, got None")
    pack = packing(seq_idx, cu_seqlens, x.shape[0], x.shape[1])
    if pack is None:
        return ops.ssd(
            x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit=dt_limit, initial_state=initial_states, return_final_state=return_final_states
        )
    out, states = ops.ssd(
        pack.flat(x),
        pack.flat(dt),
        A,
        pack.flat(B),
        pack.flat(C),
        D,
        None if z is None else pack.flat(z),
        dt_bias,
        dt_softplus,
        dt_limit=dt_limit,
        initial_state=pack.entering(initial_states),
        return_final_state=True,
        cu_seqlens=pack.bounds,
    )
    asked = [pack.leaving(states)] * return_final_states
    if return_varlen_states:
        asked.append(pack.final(states))
    return (pack.back(out), *asked) if asked else pack.back(out)


def mamba_chunk_scan_combined_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    cu_seqlens: Tensor,
    cu_chunk_seqlens: Tensor | None,
    last_chunk_indices: Tensor | None,
    seq_idx: Tensor | None,
    out: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_intermediate_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor:
    """Mamba-2's scan of packed sequences without a batch, written to `out`, as vLLM has it.

    Args:
        x, z, out: (l, h, p). dt: (l, h). A, dt_bias: (h,). B, C: (l, g, n). D: (h,) or (h, p). cu_seqlens: (sequences + 1,).
        initial_states: (sequences, h, p, n). chunk_size, cu_chunk_seqlens, last_chunk_indices, seq_idx: of no effect, they tell the chunks.
        return_intermediate_states: the states of chunks, refused.

    Returns the last state of each sequence (sequences, h, p, n) in state_dtype, C's if None.
    """
    refuse(return_intermediate_states=return_intermediate_states)
    y, states = ops.ssd(
        x.unsqueeze(0),
        dt.unsqueeze(0),
        A,
        B.unsqueeze(0),
        C.unsqueeze(0),
        D,
        None if z is None else z.unsqueeze(0),
        dt_bias,
        dt_softplus,
        dt_limit=dt_limit,
        initial_state=initial_states,
        return_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    out.copy_(y.squeeze(0))
    return states.to(state_dtype or C.dtype)


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """mamba_chunk_scan_combined without states, whose steps may have any sign."""
    return ops.ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit=(-math.inf, math.inf))


def ssd_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """The same scan as a selective scan with a state per channel, which may also be each channel's own.

    Args:
        x, z: (b, l, h, p). dt: (b, l, h) or (b, l, h, p). A: (h,) or (h p, n). B, C: (b, l, g, n). D, dt_bias: (h,) or (h, p).
        dt_limit: what the step is clamped to; unlike in mamba_chunk_scan_combined the default leaves a negative step as it is.

    Returns out (b, l, h, p) in x's dtype.
    """
    size = x.shape[3]
    dt = (dt[..., None].expand(x.shape) if dt.dim() == 3 else dt).flatten(2)
    A = A[:, None, None].expand(-1, size, B.shape[3]).flatten(0, 1) if A.dim() == 1 else A
    D, dt_bias = (None if t is None else (t[:, None].expand(-1, size) if t.dim() == 1 else t).flatten() for t in (D, dt_bias))
    if tuple(dt_limit) != (0.0, math.inf):
        dt = dt if dt_bias is None else dt + dt_bias
        dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
        dt_bias, dt_softplus = None, False
    out = ops.selective_scan(x.flatten(2), dt, A, B, C, D, None if z is None else z.flatten(2), dt_bias, dt_softplus)
    return out.unflatten(2, (-1, size))


def mamba_conv1d_scan_ref(
    xBC: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    activation: str | None = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
) -> Tensor:
    """The convolution and ssd_selective_scan behind it, (b, l, d) with d = h p.

    xBC: (b, l, d + 2gn). conv1d_weight: (d + 2gn, w). dt: (b, l, h) or (b, l, h, p). z: (b, l, d). D: (h,) or (h, p). headdim: p, where neither z nor
    D tells it. ngroups: g. chunk_size: of no effect.
    """
    heads = dt.shape[2]
    size = z.shape[2] // heads if z is not None else D.shape[1] if D is not None and D.dim() == 2 else headdim
    if size is None:
        raise ValueError("headdim: expected the size of a head, which neither z nor D tells, got None")
    u = ops.causal_conv1d(xBC, conv1d_weight, conv1d_bias, activation_name(activation))
    rows = (u.shape[2] - heads * size) // 2
    x, B, C = u.split([heads * size, rows, rows], dim=-1)
    x, z = x.unflatten(-1, (heads, -1)), None if z is None else z.unflatten(-1, (heads, -1))
    B, C = (t.unflatten(-1, (ngroups, -1)) for t in (B, C))
    return ssd_selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit).flatten(2)


def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """mamba_split_conv1d_scan_combined in the order of its twin's arguments."""
    return mamba_split_conv1d_scan_combined(
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        chunk_size,
        dt_limit=dt_limit,
        activation=activation,
        rmsnorm_weight=rmsnorm_weight,
        rmsnorm_eps=rmsnorm_eps,
        outproj_weight=outproj_weight,
        outproj_bias=outproj_bias,
        headdim=headdim,
        ngroups=ngroups,
        norm_before_gate=norm_before_gate,
    )


def ensure_stride(inp: Tensor) -> Tensor:
    """inp (b, l, d), contiguous unless its tokens are a multiple of eight numbers apart."""
    return inp if inp.stride(1) % 8 == 0 else inp.contiguous()


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """All of a Mamba-2 mixer behind in_proj: convolution, scan, gated RMS norm of each group's channels, out_proj.

    Args, with d = h p:
        zxbcdt: (b, l, 2m + 2d + 2gn + h): two halves m of a gated MLP beside the scan (silu(first) second; m is 0 in most models), z, x, B, C, dt.
        conv1d_weight: (d + 2gn, w), over x, B and C. conv1d_bias: (d + 2gn,) or None. dt_bias, A: (h,). D: (h,) with headdim = p, or (h, p).
        initial_states: (b, h, p, n). activation: None, "silu" or "swish". rmsnorm_weight: (d,); None gates with silu(z) alone.
        outproj_weight: (out, m + d), outproj_bias: (out,). ngroups: g. chunk_size, state_dtype: of no effect.
        seq_idx: (b, l), packed sequences: taps and state begin anew where it changes, as in mamba_chunk_scan_combined.

    Returns (b, l, out), without outproj_weight (b, l, m + d); or (that, final states (b, h, p, n)).
    """
    heads, size = len(D), headdim if D.dim() == 1 else D.shape[1]
    if size is None:
        raise ValueError(f"headdim: expected the size of a head, which D of shape {tuple(D.shape)} does not tell, got None")
    inner, channels = heads * size, conv1d_weight.shape[0]
    beside = zxbcdt.shape[-1] - inner - channels - heads
    if (channels - inner) % (2 * ngroups) or beside < 0 or beside % 2:
        raise ValueError(
            f"zxbcdt: expected (b, l, 2m + {inner} + {channels} + {heads}), of z, the convolution's channels (the {inner} of x, "
            f"and B and C by {ngroups} groups) and dt, got {tuple(zxbcdt.shape)} and conv1d_weight {tuple(conv1d_weight.shape)}"
        )
    pack = packing(seq_idx, None, zxbcdt.shape[0], zxbcdt.shape[1])
    bounds = None if pack is None else pack.bounds
    if pack is not None:
        zxbcdt, initial_states = pack.flat(zxbcdt), pack.entering(initial_states)
    mlp, z, u, dt = zxbcdt.split([beside, inner, channels, heads], dim=-1)
    u = ops.causal_conv1d(u, conv1d_weight, conv1d_bias, activation_name(activation), cu_seqlens=bounds)
    x, B, C = u.split([inner, (channels - inner) // 2, (channels - inner) // 2], dim=-1)
    x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))
    y, states = ops.ssd(
        x,
        dt,
        A,
        B,
        C,
        D,
        z.unflatten(-1, (heads, -1)) if rmsnorm_weight is None else None,
        dt_bias,
        True,
        dt_limit=dt_limit,
        initial_state=initial_states,
        return_final_state=True,
        cu_seqlens=bounds,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if beside:
        first, second = mlp.chunk(2, dim=-1)
        y = torch.cat([silu(first) * second, y], dim=-1)
    if outproj_weight is not None:
        y = linear(y, outproj_weight, outproj_bias)
    if pack is not None:
        y, states = pack.back(y), pack.leaving(states)
    return (y, states) if return_final_states else y


def ssd_minimal_discrete(X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scan of steps that are already taken in: S_t = exp(A_t) S_{t-1} + X_t B_t^T, Y_t = S_t C_t.

    Args:
        X: (b, l, h, p), x dt. A: (b, l, h), dt A, at most 0. B, C: (b, l, h, n). block_len: of no effect. initial_states: (b, 1, h, p, n).

    Returns (Y (b, l, h, p), the last state (b, h, p, n)), both in X's dtype. This is `medssm.ops.gated_linear_attention` of q = C, k = B, v = X.
    """
    forms = {"X": "b l h p", "A": "b l h", "B": "b l h n", "C": "b l h n", "initial_states?": "b 1 h p n"}
    shapes.agree(forms, X, A, B, C, initial_states)
    state = None if initial_states is None else initial_states.squeeze(1).transpose(-1, -2)
    out, state = ops.gated_linear_attention(C, B, X, A, scale=1.0, initial_state=state, return_final_state=True)
    return out, state.transpose(-1, -2).to(X.dtype).contiguous()


def swiglu(xy: Tensor) -> Tensor:
    """silu(x) y of the two halves of the last dimension."""
    x, y = xy.chunk(2, dim=-1)
    return silu(x) * y
