"""The states that mixers of the stand-in keep from token to token: found, checked and moved on in place, with gradients through them.

A step's output depends on the states, and they on all tokens before, so that a loss over steps reaches every weight as the scan's does. Under
torch.no_grad() nothing is kept; detach() of a state cuts the history.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medssm import ops
from medssm.nn.inner import plain


def kept(mixer: Any, batch: int, inference_params: Any) -> Any:
    """The states, (conv_state, ssm_state) or Mamba3's four, that inference_params keeps for this mixer under its layer_idx; at first zeros.

    Raises ValueError without a layer_idx, and for another batch than the states'.
    """
    cache, layer = inference_params.key_value_memory_dict, mixer.layer_idx
    if layer is None:
        raise ValueError("layer_idx: expected a number of its own for each mixer whose state inference_params keeps, got None")
    if layer not in cache:
        cache[layer] = mixer.allocate_inference_cache(batch, None)
    elif inference_params.seqlen_offset == 0:
        cache[layer] = tuple(state.detach() for state in cache[layer])  # the same memory, without an earlier sequence's history
    if batch != len(cache[layer][0]):
        raise ValueError(f"hidden_states: expected a batch of {len(cache[layer][0])}, whose states layer {layer} keeps, got a batch of {batch}")
    return cache[layer]


def one_token(mixer: Any, x: Tensor, *states: Tensor) -> Tensor:
    """(b, d_model) of (b, 1, d_model), for states of the same batch."""
    if x.dim() != 3 or x.shape[1] != 1:
        raise ValueError(f"hidden_states: expected (b, 1, {mixer.d_model}), one token, got {tuple(x.shape)}")
    for state in states:
        if len(state) != len(x):
            raise ValueError(f"hidden_states: expected a batch of {len(state)}, as the states have, got a batch of {len(x)}")
    return x.squeeze(1)


def convolve(
    conv: nn.Conv1d,
    u: Tensor,  # (b, c)
    state: Tensor,  # (b, c, w): the last w tokens, oldest first
) -> Tensor:
    """silu of the causal convolution's next value (b, c); the state moves on by the token."""
    window = torch.cat([state[..., 1:], u.unsqueeze(-1).to(state.dtype)], dim=-1)
    if plain(conv):
        out, _ = ops.causal_conv1d_step(window[..., :-1], u, conv.weight.squeeze(1), conv.bias, "silu")
    else:
        out = F.silu(conv(window)[..., state.shape[-1] - 1])
    state.copy_(window)
    return out


def before(state: Tensor, indices: Tensor | None = None) -> Tensor:
    """The state for an op that may save it for its gradient, while the state itself is written to.

    indices (b,): of a state with more rows the batch's; a negative one takes any.
    """
    if indices is not None:
        return state[indices.clamp(min=0)]
    return state.clone() if torch.is_grad_enabled() else state


def update(state: Tensor, new: Tensor, indices: Tensor | None) -> None:
    """The state becomes the new one, or its rows at the indices do, none for a negative index."""
    if indices is None:
        state.copy_(new)
    else:
        served = indices >= 0
        state[indices[served]] = new[served].to(state.dtype)


def served(out: Tensor, indices: Tensor | None) -> Tensor:
    """out (b, …), zero where the index is negative: a place of the batch that nobody uses."""
    return out if indices is None else out.masked_fill((indices < 0).view(-1, *[1] * (out.dim() - 1)), 0)


def last_tokens(u: Tensor, state: Tensor) -> None:
    """The state (b, c, w) becomes the last w of the tokens (b, l, c), zeros before them."""
    state.copy_(F.pad(u.movedim(-1, 1), (state.shape[-1] - u.shape[1], 0)))
