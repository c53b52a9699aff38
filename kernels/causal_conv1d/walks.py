"""What the GPU kernels of causal_conv1d share in PyTorch: the earliest step that each step sees, and the final state."""

from __future__ import annotations

import torch


def begins(starts: torch.Tensor | None, length: int, width: int, reverse: bool) -> torch.Tensor | None:
    """(l,) the earliest step that each step sees; 1 - width is the initial state's oldest token. None if that is so for all steps."""
    if starts is None or not length:
        return None
    fresh = length - starts if reverse else starts
    begin = torch.full((length + 1,), 1 - width, dtype=torch.int64, device=starts.device).scatter_(0, fresh, fresh)
    begin[0] = 1 - width  # the initial state precedes step 0
    return begin[:length].cummax(0).values


def state(
    x: torch.Tensor,  # (b,l,d)
    width: int,
    index: torch.Tensor | None,  # (l,)
    begin: torch.Tensor | None,  # (l,), from `begins`
    reverse: bool,
    initial_state: torch.Tensor | None,  # (b,d,w-1)
) -> torch.Tensor:
    """(b,d,w-1): the last w - 1 steps before the walk's end, oldest first; zeros for steps before the last new beginning."""
    batch, length, channels = x.shape
    last = x.new_zeros((batch, channels, width - 1))
    for tap in range(width - 1):
        step = length - (width - 1) + tap
        if step >= 0:
            token = length - 1 - step if reverse else step
            kept = x[:, token] if index is None else x.index_select(1, index[token : token + 1])[:, 0]
        elif initial_state is not None:
            kept = initial_state[:, :, step + width - 1]
        else:
            continue
        last[:, :, tap] = kept if begin is None else torch.where(begin[-1] <= step, kept, 0)
    return last
