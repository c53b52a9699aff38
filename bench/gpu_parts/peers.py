"""What a user would run instead, where it is installed; a peer that does not import is absent, and never counted as beaten."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import torch


def selective_scan_fn():
    """mamba_ssm's CUDA scan (u, delta, A, B, C, D, z, delta_bias, delta_softplus), channels first; None and why not."""
    try:
        importlib.import_module("selective_scan_cuda")
        return _mamba_ssm("ops.selective_scan_interface").selective_scan_fn, None
    except Exception as error:
        return None, f"mamba_ssm: {type(error).__name__}: {error}"


def mamba_chunk_scan():
    """mamba_ssm's Triton kernels of SSD (x, dt, A, B, C, chunk_size, D, z, dt_bias, …, dt_softplus); None and why not."""
    try:
        return _mamba_ssm("ops.triton.ssd_combined").mamba_chunk_scan_combined, None
    except Exception as error:
        return None, f"mamba_ssm: {type(error).__name__}: {error}"


def _mamba_ssm(module: str):
    """A module of mamba_ssm without its __init__, which imports far more than an op."""
    if "mamba_ssm" not in sys.modules:
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(importlib.util.find_spec("mamba_ssm").submodule_search_locations)
        sys.modules["mamba_ssm"] = package
    return importlib.import_module(f"mamba_ssm.{module}")


def causal_conv1d_fn():
    """causal_conv1d's kernel (x (b, d, l), weight, bias, activation); None and why not."""
    try:
        return importlib.import_module("causal_conv1d").causal_conv1d_fn, None
    except Exception as error:
        return None, f"causal_conv1d: {type(error).__name__}: {error}"


def fla(module: str, name: str):
    """A kernel of flash-linear-attention, fla.ops.<module>.<name>; None and why not."""
    try:
        return getattr(importlib.import_module(f"fla.ops.{module}"), name), None
    except Exception as error:
        return None, f"fla: {type(error).__name__}: {error}"


def cross_scan(x: torch.Tensor) -> torch.Tensor:
    """VMamba's four directions of (b, d, h, w) as (b, 4, d, h w): rows, columns, and both backwards."""
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    both = torch.stack([rows, columns], 1)
    return torch.cat([both, both.flip(-1)], 1)


def cross_merge(y: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(b, 4, d, l) back to the image and added: (b, d, l)."""
    both = y[:, :2] + y[:, 2:].flip(-1)
    return both[:, 0] + both[:, 1].unflatten(-1, (width, height)).transpose(2, 3).flatten(2)
