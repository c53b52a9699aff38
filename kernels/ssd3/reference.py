"""Mamba-3's recurrence in plain PyTorch: the specification of every other backend.

For each batch and head, along the walk p through the tokens (Lahoti et al., Mamba-3, arXiv 2603.15569), R(w) the rotation of the pairs of channels:

    w_t = w_{t-1} + pi tanh(angles_t) dt_t
    k_t = R(w_t) (B_t + B_bias),    q_t = R(w_t) (C_t + C_bias)
    a_t = exp(dt_t A_t),    m_t = sigmoid(trap_t)
    S_t = a_t S_{t-1} + (1 - m_t) dt_t a_t x_{t-1} k_{t-1}^T + m_t dt_t x_t k_t^T
    y_t = S_t q_t + D x_t,    out_t = y_t silu(z_t)

of rank r (MIMO) with v_rt = mimo_x_r x_t in the place of x_t, the sum over the ranks in S, and out_t = sum_r mimo_o_r y_rt silu(mimo_z_r z_t).
"""

from __future__ import annotations

import math

import torch

from medssm.kernels.autocast import without_autocast
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.walks import over_sequences, walk_steps


@over_sequences("x dt A B C trap angles z", states="initial_angle initial_state initial_k initial_v")
def ssd3(
    x,
    dt,
    A,
    B,
    C,
    trap,
    angles,
    D=None,
    z=None,
    B_bias=None,
    C_bias=None,
    mimo_x=None,
    mimo_z=None,
    mimo_o=None,
    initial_angle=None,
    initial_state=None,
    initial_k=None,
    initial_v=None,
    pairs="adjacent",
    per_rank=False,
    index=None,
    starts=None,
    reverse=False,
):
    """x, z (b,l,h,p); dt, A, trap (b,l,h); B, C (b,l,r,g,n); angles (b,l,h,a) or (b,l,a); D (h,); biases (h,r,n); mimo (h,r,p).

    Returns out (b,l,h,p), (b,l,r,h,p) with per_rank, in x's dtype, and the states: angle (b,h,a), S (b,h,p,n), k (b,r,h,n), x (b,h,p), in the compute
    dtype: float64 if any input is, else float32.
    """
    inputs = (x, dt, A, B, C, trap, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o, initial_angle, initial_state, initial_k, initial_v)
    dtype, out_dtype = compute_dtype(*inputs), x.dtype
    with without_autocast(x.device):
        x, dt, A, B, C, trap, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o, *initial = (None if t is None else t.to(dtype) for t in inputs)
        batch, length, heads, size = x.shape
        ranks, groups, state_size = B.shape[2:]
        angles = angles if angles.dim() == 4 else angles.unsqueeze(2).expand(-1, -1, heads, -1)
        k, q = (t.repeat_interleave(heads // groups, dim=3) for t in (B, C))  # head j reads group j // (h / g)
        k, q = (t if bias is None else t + bias.transpose(0, 1) for t, bias in ((k, B_bias), (q, C_bias)))
        ones = x.new_ones(ranks, heads, size)
        weights = [ones if m is None else m.transpose(0, 1) for m in (mimo_x, mimo_z, mimo_o)]
        v, gate = (None if t is None else t.unsqueeze(2) * m for t, m in ((x, weights[0]), (z, weights[1])))
        turns, mix = math.pi * torch.tanh(angles) * dt[..., None], torch.sigmoid(trap)

        shapes = (heads, angles.shape[3]), (heads, size, state_size), (ranks, heads, state_size), (heads, size)
        zeros = [x.new_zeros(batch, *shape) for shape in shapes]
        angle, S, k_before, x_before = zeros if initial[0] is None else [t.clone() for t in initial]
        steps, fresh = walk_steps(length, index, starts, reverse, x.device)
        y = []
        for t, token in enumerate(steps.tolist()):
            if t in fresh:
                angle, S, k_before, x_before = zeros
            angle = torch.remainder(angle + turns[:, token], 2 * math.pi)
            q_t, k_t = (rotated(row[:, token], angle.unsqueeze(1), pairs) for row in (q, k))
            v_before = x_before.unsqueeze(1) * weights[0]
            step, mixed, decay = dt[:, token], mix[:, token], torch.exp(dt[:, token] * A[:, token])
            S = decay[..., None, None] * S
            S = S + ((1 - mixed) * step * decay)[..., None, None] * torch.einsum("brhp,brhn->bhpn", v_before, k_before)
            S = S + (mixed * step)[..., None, None] * torch.einsum("brhp,brhn->bhpn", v[:, token], k_t)
            y.append(torch.einsum("bhpn,brhn->brhp", S, q_t))
            k_before, x_before = k_t, x[:, token]
        states = tuple(t.clone() for t in (angle, S, k_before, x_before))
        if not y:
            return x.new_empty(batch, 0, *([ranks] if per_rank else []), heads, size).to(out_dtype), *states

        y = torch.stack(y, 1).index_select(1, torch.argsort(steps))
        if D is not None:
            y = y + D[:, None] * v
        if gate is not None:
            y = y * torch.nn.functional.silu(gate)
        y = y * weights[2]
        return (y if per_rank else y.sum(2)).to(out_dtype), *states


def rotated(
    t: torch.Tensor,  # (*, n)
    angle: torch.Tensor,  # (*, a), in radians
    pairs: str,
) -> torch.Tensor:
    """t with pair i of its channels turned by angle i, for the first a pairs: (2i, 2i+1), or (i, i + n/2) where they are "halves"."""
    one, two = paired(pairs, angle.shape[-1], t.shape[-1])
    cos, sin = torch.cos(angle), torch.sin(angle)
    out = t.clone()
    out[..., one], out[..., two] = t[..., one] * cos - t[..., two] * sin, t[..., one] * sin + t[..., two] * cos
    return out


def paired(pairs: str, angles: int, channels: int) -> tuple[slice, slice]:
    """The first and the second channels of so many pairs."""
    if pairs == "adjacent":
        return slice(0, 2 * angles, 2), slice(1, 2 * angles, 2)
    half = channels // 2
    return slice(0, angles), slice(half, half + angles)
