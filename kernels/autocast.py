"""The recurrences keep their own precision under autocast."""

from __future__ import annotations

import contextlib

import torch


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast switched off for a device's type; nothing where that type has none (tensors on "meta")."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
