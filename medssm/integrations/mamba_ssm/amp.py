"""mamba_ssm.utils.torch: torch's decorators of autograd functions under autocast, for the device of the tensors they are given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def custom_fwd(fwd: Callable[..., Any] | None = None, *, cast_inputs: torch.dtype | None = None) -> Callable[..., Any]:
    """torch.amp.custom_fwd of the first tensor's device, which upstream takes to be a GPU."""
    if fwd is None:
        return functools.partial(custom_fwd, cast_inputs=cast_inputs)

    @functools.wraps(fwd)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return torch.amp.custom_fwd(fwd, device_type=_device(args), cast_inputs=cast_inputs)(*args, **kwargs)

    return forward


def custom_bwd(bwd: Callable[..., Any]) -> Callable[..., Any]:
    """torch.amp.custom_bwd of the first tensor's device."""

    @functools.wraps(bwd)
    def backward(*args: Any, **kwargs: Any) -> Any:
        return torch.amp.custom_bwd(bwd, device_type=_device(args))(*args, **kwargs)

    return backward


def custom_amp_decorator(dec: Callable[..., Any], cuda_amp_deprecated: bool) -> Callable[..., Any]:
    """A decorator of torch.amp for a GPU; of torch.cuda.amp (cuda_amp_deprecated False) as it is."""
    return functools.partial(dec, device_type="cuda") if cuda_amp_deprecated else dec


def _device(args: tuple[Any, ...]) -> str:
    return next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
