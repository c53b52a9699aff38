"""causal_conv1d on medssm's op: causal_conv1d's layout and arguments, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from medssm import ops
from medssm.integrations.mamba_ssm.absent import refuse

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
        activation: None, "silu" or "swish"; the first releases of causal_conv1d took it in seq_idx's place, and so may a call here.

    Returns out (b, d, l), contiguous, in x's dtype, or (out, final states). Raises NotImplementedError for seq_idx, ValueError as the op.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    refuse(seq_idx=seq_idx)
    out = ops.causal_conv1d(
        x, weight, bias, activation_name(activation), initial_state=initial_states, return_final_state=return_final_states, layout="bdl"
    )
    if not return_final_states:
        return out.contiguous()
    out, states = out
    return out.contiguous(), states if final_states_out is None else final_states_out.copy_(states)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution of the next tokens; `conv_state` (b, d, at least w-1), oldest first, is updated in place. No gradients, as upstream.

    Args: x (b, d) or (b, d, l); weight (d, w); bias (d,); activation as causal_conv1d_fn.
    Returns out in x's shape and dtype. Raises NotImplementedError for cache_seqlens and conv_state_indices.
    """
    refuse(cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices)
    taps, kept = weight.shape[1] - 1, conv_state.shape[-1]
    if kept < taps:
        raise ValueError(f"conv_state: expected (b, d, at least {taps}), got {tuple(conv_state.shape)}")
    tokens = x.unsqueeze(-1) if x.dim() == 2 else x
    out = ops.causal_conv1d(tokens, weight, bias, activation_name(activation), initial_state=conv_state[..., kept - taps :], layout="bdl")
    conv_state.copy_(torch.cat([conv_state, tokens.to(conv_state.dtype)], dim=-1)[..., -kept:])
    return out.reshape(x.shape)


def activation_name(name: str | None) -> str | None:
    """Upstream's name of an activation as ops.causal_conv1d has it."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {name!r}")
    return _ACTIVATIONS[name]
