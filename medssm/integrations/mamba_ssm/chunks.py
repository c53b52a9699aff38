"""The parts of Mamba-2's chunked scan on PyTorch: mamba_ssm.ops.triton.ssd_bmm, ssd_chunk_state, ssd_state_passing and ssd_chunk_scan.

Of b sequences of l tokens in c chunks of q: dt and dA_cumsum (b, h, c, q), the steps and, from each chunk's start on, the sum of dt A;
x (b, l, h, p); B, C (b, l, g, n), head j uses group j // (h // g); chunk states (b, c, h, p, n).
seq_idx (b, l): tokens of different numbers do not see each other. In float32 at least. The op for a whole scan is `medssm.ops.ssd`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from medssm.kernels.dtypes import compute_dtype


def chunk_cumsum(
    dt: Tensor, A: Tensor, chunk_size: int, dt_bias: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, math.inf)
) -> tuple[Tensor, Tensor]:
    """(dA_cumsum, dt), of dt (b, l, h) and A, dt_bias (h,): the steps clamped to dt_limit, 0 behind the last token."""
    steps = dt.to(compute_dtype(dt, A))
    steps = steps if dt_bias is None else steps + dt_bias
    steps = (F.softplus(steps) if dt_softplus else steps).clamp(*dt_limit)
    steps = _chunked(steps, chunk_size).permute(0, 3, 1, 2)
    return (steps * A[:, None, None]).cumsum(-1), steps.contiguous()


def chunk_products(
    a: Tensor, b: Tensor, chunk_size: int, seq_idx: Tensor | None = None, causal: bool = False, output_dtype: torch.dtype | None = None
) -> Tensor:
    """Every token of a with every one of b in its chunk, (b, c, g, q, q) of (b, l, g, k), without g of (b, l, k); causal: no later ones."""
    wide = compute_dtype(a, b)
    one = a.dim() == 3
    a_, b_ = (_chunked(t.unsqueeze(2) if one else t, chunk_size).to(wide) for t in (a, b))
    out = torch.einsum("bclgk,bcsgk->bcgls", a_, b_)
    if seq_idx is not None:
        numbers = _chunked(seq_idx, chunk_size)
        out = out * (numbers[:, :, None, :, None] == numbers[:, :, None, None, :])
    out = (out.tril() if causal else out).to(output_dtype or a.dtype)
    return out.squeeze(2) if one else out


def chunk_state(B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, states_in_fp32: bool = True) -> Tensor:
    """What each chunk adds to the state, in float32, else in B's dtype."""
    return chunk_state_packed(B, x, dt, dA_cumsum, states_in_fp32=states_in_fp32)


def chunk_state_packed(
    B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, seq_idx: Tensor | None = None, states: Tensor | None = None, states_in_fp32: bool = True
) -> Tensor:
    """chunk_state of each chunk's last sequence; written to `states` if given."""
    size, wide = dt.shape[-1], compute_dtype(B, x, dt)
    weights = torch.exp(dA_cumsum[..., -1:] - dA_cumsum) * dt
    if seq_idx is not None:
        last = _last(seq_idx, size)
        weights = weights * (_chunked(seq_idx, size) == last[..., None])[:, None]
    x_, B_ = _chunked(x, size).to(wide), _chunked(B, size).to(wide)
    B_ = B_.repeat_interleave(x.shape[2] // B.shape[2], 3)
    out = torch.einsum("bclhp,bclhn->bchpn", x_ * weights.to(wide).permute(0, 2, 3, 1)[..., None], B_)
    out = out if states_in_fp32 else out.to(B.dtype)
    return out if states is None else states.copy_(out)


def chunk_state_varlen(B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, cu_seqlens: Tensor, chunk_states: Tensor) -> Tensor:
    """The last state of each sequence, (sequences, h, p, n) in chunk_states' dtype; an empty one's is zero.

    B (l, g, n), x (l, h, p), dt and dA_cumsum (h, c, q): sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1]. chunk_states (c, h, p, n): before
    each chunk.
    """
    size, heads, states = dt.shape[-1], x.shape[1], []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        chunk = max(end - 1, 0) // size
        first = max(start, chunk * size)
        inside = slice(first - chunk * size, end - chunk * size)
        sums = dA_cumsum[:, chunk, inside]  # (h, tokens)
        if end == start:
            states.append(torch.zeros_like(chunk_states[0]))
            continue
        weights = (torch.exp(sums[:, -1:] - sums) * dt[:, chunk, inside]).T[..., None]
        rows = B[first:end].repeat_interleave(heads // B.shape[1], 1).to(weights.dtype)
        state = torch.einsum("lhp,lhn->hpn", x[first:end].to(weights.dtype) * weights, rows)
        if start < chunk * size:
            state = state + chunk_states[chunk] * torch.exp(sums[:, -1])[:, None, None]
        states.append(state.to(chunk_states.dtype))
    return torch.stack(states)


def state_passing(states: Tensor, dA_chunk_cumsum: Tensor, initial_states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(the state before each chunk (b, c, h, d) in states' dtype, the last state (b, h, d) in float32).

    states (b, c, h, d): what each chunk adds. dA_chunk_cumsum (b, h, c): the sum of dt A over each chunk. initial_states (b, h, d).
    """
    return state_passing_packed(states, dA_chunk_cumsum, initial_states)


def state_passing_packed(
    states: Tensor,
    dA_chunk_cumsum: Tensor,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """state_passing of packed sequences (seq_idx, with chunk_size): states are each chunk's last one's. out_dtype: of the states before chunks."""
    wide = compute_dtype(states, dA_chunk_cumsum)
    decays = torch.exp(dA_chunk_cumsum).to(wide)
    if seq_idx is not None:
        if chunk_size is None:
            raise ValueError("chunk_size: expected the tokens of a chunk, since seq_idx is given, got None")
        last = F.pad(_last(seq_idx, chunk_size), (1, 0))  # the sequence before the first chunk has number 0
        decays = decays * (last[:, 1:] == last[:, :-1])[:, None]
    state = torch.zeros_like(states[:, 0], dtype=wide) if initial_states is None else initial_states.to(wide)
    before = []
    for chunk in range(states.shape[1]):
        before.append(state)
        state = decays[:, :, chunk, None] * state + states[:, chunk]
    return torch.stack(before, 1).to(out_dtype or states.dtype), state


def chunk_scan(
    B: Tensor, C: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, prev_states: Tensor, D: Tensor | None = None, z: Tensor | None = None
) -> Tensor:
    """The scan's output (b, l, h, p) in x's dtype, from the states before each chunk. D (h,) or (h, p), z (b, l, h, p): as medssm.ops.ssd."""
    products = chunk_products(C, B, dt.shape[-1], output_dtype=compute_dtype(B, C))
    return chunk_scan_packed(products, x, dt, dA_cumsum, C, prev_states, D, z)[0]


def chunk_scan_packed(
    cb: Tensor,
    x: Tensor,
    dt: Tensor,
    dA_cumsum: Tensor,
    C: Tensor,
    states: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(chunk_scan, the same without the gate, None where there is no z); cb: chunk_products of C and B, with the same seq_idx."""
    size, length, heads = dt.shape[-1], x.shape[1], x.shape[2]
    wide = compute_dtype(x, dt, cb)
    x_, C_ = _chunked(x, size).to(wide), _chunked(C, size).to(wide).repeat_interleave(heads // C.shape[2], 3)
    sums = dA_cumsum.permute(0, 2, 1, 3).to(wide)  # (b, c, h, q)
    decays = (sums[..., :, None] - sums[..., None, :]).masked_fill(~_triangle(size, x.device), -math.inf).exp()
    scores = cb.to(wide).repeat_interleave(heads // cb.shape[2], 2) * decays * dt.permute(0, 2, 1, 3)[..., None, :]
    entered = sums.exp()
    if seq_idx is not None:
        came = F.pad(_last(seq_idx, size), (1, 0))[:, :-1]  # the sequence that the state before the chunk belongs to
        entered = entered * (_chunked(seq_idx, size) == came[..., None])[:, :, None]
    out = torch.einsum("bchls,bcshp->bclhp", scores, x_)
    out = out + torch.einsum("bclhn,bchpn->bclhp", C_, states.to(wide)) * entered.transpose(2, 3)[..., None]
    out = out.flatten(1, 2)[:, :length]
    if D is not None:
        out = out + x * (D if D.dim() == 2 else D[:, None])
    return (out.to(x.dtype), None) if z is None else ((out * F.silu(z.to(wide))).to(x.dtype), out.to(x.dtype))


def segsum(x: Tensor) -> Tensor:
    """(*, l) -> (*, l, l): the sum of x over the steps j + 1 to i at (i, j), -inf where j > i."""
    length = x.shape[-1]
    kept = _triangle(length, x.device)
    steps = x[..., None].expand(*x.shape, length).masked_fill(~kept.tril(-1), 0)
    return steps.cumsum(-2).masked_fill(~kept, -math.inf)


def segsum_unstable(x: Tensor) -> Tensor:
    """segsum as the difference of two sums from the start, which loses digits."""
    sums = x.cumsum(-1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(~_triangle(x.shape[-1], x.device), -math.inf)


def _chunked(t: Tensor, size: int) -> Tensor:
    """(b, l, *) -> (b, c, size, *), zeros behind the last token."""
    missing = -t.shape[1] % size
    t = torch.cat([t, t.new_zeros(t.shape[0], missing, *t.shape[2:])], 1) if missing else t
    return t.unflatten(1, (-1, size))


def _last(seq_idx: Tensor, size: int) -> Tensor:
    """The number of each chunk's last token, (b, c)."""
    length = seq_idx.shape[1]
    ends = torch.arange(size, length + size, size, device=seq_idx.device).clamp(max=length) - 1
    return seq_idx[:, ends]


def _triangle(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()
