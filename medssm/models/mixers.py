"""Upstream's mixers alone, from upstream's keywords: mamba_ssm's Mamba, Vim's and SegMamba's forks of it, VMamba's SS2D."""

from __future__ import annotations

from typing import Any

from medssm.models.options import only
from medssm.models.registry import register_upstream
from medssm.nn import SSND, BiMamba, Mamba, TriMamba

# What upstream takes for its kernels and its language-model cache, and what has no meaning here.
_IGNORED = ("use_fast_path", "layer_idx", "device", "dtype", "init_layer_scale")


def _kept(kwargs: dict[str, Any], bimamba_type: str) -> dict[str, Any]:
    only("bimamba_type", kwargs.pop("bimamba_type", bimamba_type), bimamba_type)
    return {k: v for k, v in kwargs.items() if k not in _IGNORED}


@register_upstream("mamba")
def mamba(d_model: int, **kwargs: Any) -> Mamba:
    """mamba_ssm.Mamba."""
    return Mamba(d_model, **_kept(kwargs, "none"))


@register_upstream("bimamba_v2", "mamba_v2_mixer")
def vim(d_model: int, if_divide_out: bool = False, **kwargs: Any) -> BiMamba:
    """Vim's Mamba with bimamba_type="v2"."""
    return BiMamba(d_model, divide_out=if_divide_out, **_kept(kwargs, "v2"))


@register_upstream("bimamba_v3", "mamba_v3_mixer")
def segmamba(d_model: int, nslices: int = 5, **kwargs: Any) -> TriMamba:
    """SegMamba's Mamba with bimamba_type="v3"; the sequence length must be a multiple of nslices, as upstream's reshape demands."""
    return TriMamba(d_model, slices=nslices, **_kept(kwargs, "v3"))


@register_upstream("ss2d", "ss2d_corev0_mixer")
def ss2d(d_model: int, **kwargs: Any) -> SSND:
    """VMamba's first SS2D ("corev0"), as VM-UNet and its kin carry it: (b, h, w, d_model)."""
    return SSND(d_model, spatial_dims=2, **{k: v for k, v in kwargs.items() if k not in _IGNORED})
