"""Where the segments of a walk begin and end, for every kernel of bi_wkv."""

from __future__ import annotations

import torch


def bounds(starts: torch.Tensor | None, length: int, reverse: bool) -> torch.Tensor | None:
    """(segments + 1,) the first step of each segment in the walk as it is made, then the length; None for one segment."""
    if starts is None:
        return None
    ends = torch.cat([starts, starts.new_tensor([length])])  # starts has step 0
    return length - ends.flip(0) if reverse else ends
