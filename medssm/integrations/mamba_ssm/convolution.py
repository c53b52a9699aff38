"""causal_conv1d on medssm's op: causal_conv1d's layout and arguments, gradients by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medssm import ops
from medssm.integrations.mamba_ssm import states
from medssm.integrations.mamba_ssm.packing import packing

_ACTIVATIONS = {None: None, "silu": "silu", "swish": "silu"}


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The causal depthwise convolution in causal_conv1d's layout, `medssm.ops.causal_conv1d(..., layout="bdl")`.

    Args:
        x: (b, d, l). weight: (d, w), any width. bias: (d,). initial_states, final_states_out (written to): (b, d, w-1).
        seq_idx: (b, l), packed sequences: the taps begin anew where it changes, out is zero where it is negative. A row's initial state enters its
            first sequence, its final state leaves its last one.
        activation: None, "silu" or "swish"; the first releases of causal_conv1d took it in seq_idx's place, and so may a call here.

    Returns out (b, d, l), contiguous, in x's dtype, or (out, final states). Raises ValueError as the op.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    name, pack = activation_name(activation), packing(seq_idx, None, x.shape[0], x.shape[-1])
    out: Any
    final: Any = None
    if pack is None:
        out = ops.causal_conv1d(x, weight, bias, name, initial_state=initial_states, return_final_state=return_final_states, layout="bdl")
        if return_final_states:
            out, final = out
    else:
        tokens, initial = pack.flat(x.movedim(1, -1)), pack.entering(initial_states)
        out, final = ops.causal_conv1d(tokens, weight, bias, name, initial_state=initial, return_final_state=True, cu_seqlens=pack.bounds)
        out, final = pack.back(out).movedim(-1, 1), pack.leaving(final)
    if seq_idx is not None:
        out = out.masked_fill((seq_idx < 0)[:, None], 0)
    if not return_final_states:
        return out.contiguous()
    return out.contiguous(), final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution of the next tokens; `conv_state` is updated in place. Differentiable, through the state too.

    Args:
        x: (b, d) or (b, d, l). weight: (d, w). bias: (d,). activation: as causal_conv1d_fn.
        conv_state: (b, d, k), k at least w-1: the tokens before, oldest first.
        cache_seqlens: (b,), tokens before these: conv_state is then a ring, in which token t stands at t % k.
        conv_state_indices: (b,), which rows of a longer conv_state are the batch's; at a negative one nothing is updated and out is zero.

    Returns out in x's shape and dtype. Raises ValueError for a conv_state that is too short.
    """
    taps, kept = weight.shape[1] - 1, conv_state.shape[-1]
    if kept < taps:
        raise ValueError(f"conv_state: expected (b, d, at least {taps}), got {tuple(conv_state.shape)}")
    tokens = x.unsqueeze(-1) if x.dim() == 2 else x
    old = states.before(conv_state, conv_state_indices)
    old = old if cache_seqlens is None else _turned(old, cache_seqlens)
    out = ops.causal_conv1d(tokens, weight, bias, activation_name(activation), initial_state=old[..., kept - taps :], layout="bdl")
    new = torch.cat([old, tokens.to(old.dtype)], dim=-1)[..., tokens.shape[-1] :]
    new = new if cache_seqlens is None else _turned(new, -(cache_seqlens + tokens.shape[-1]))
    states.update(conv_state, new, conv_state_indices)
    return states.served(out.reshape(x.shape), conv_state_indices)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """causal_conv1d_fn in the order of its twin's arguments."""
    return causal_conv1d_fn(x, weight, bias, None, initial_states, return_final_states, final_states_out, activation)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last state_len tokens of each packed sequence, oldest first, zeros before its first: (sequences, d, state_len) in x's dtype.

    x: (l, d), sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1]. Differentiable.
    """
    at = cu_seqlens[1:, None] + torch.arange(-state_len, 0, device=x.device)
    outside = at < cu_seqlens[:-1, None]
    return x[at.masked_fill(outside, 0)].masked_fill(outside[..., None], 0).transpose(1, 2)


def _turned(ring: Tensor, by: Tensor) -> Tensor:
    """(b, d, k) with place `by` (b,) of each ring first."""
    at = (torch.arange(ring.shape[-1], device=ring.device) + by[:, None]) % ring.shape[-1]
    return ring.gather(-1, at[:, None].expand_as(ring))


def activation_name(name: str | None) -> str | None:
    """Upstream's name of an activation as ops.causal_conv1d has it."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {name!r}")
    return _ACTIVATIONS[name]
