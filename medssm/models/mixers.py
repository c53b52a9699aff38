"""Upstream's mixers alone, from upstream's keywords: mamba_ssm's Mamba, Vim's and SegMamba's forks of it, VMamba's SS2D."""

from __future__ import annotations

from medssm.nn import SSND, BiMamba, Mamba, TriMamba

# What upstream takes for its kernels and its language-model cache, and what has no meaning here.
_IGNORED = ("use_fast_path", "layer_idx", "device", "dtype", "init_layer_scale")


def _kept(kwargs: dict, bimamba_type: str) -> dict:
    given = kwargs.pop("bimamba_type", bimamba_type)
    if given != bimamba_type:
        raise ValueError(f"bimamba_type: expected {bimamba_type!r}, got {given!r}")
    return {k: v for k, v in kwargs.items() if k not in _IGNORED}


def mamba(d_model: int, **kwargs) -> Mamba:
    """mamba_ssm.Mamba."""
    return Mamba(d_model, **_kept(kwargs, "none"))


def vim(d_model: int, if_divide_out: bool = False, **kwargs) -> BiMamba:
    """Vim's Mamba with bimamba_type="v2"."""
    return BiMamba(d_model, divide_out=if_divide_out, **_kept(kwargs, "v2"))


def segmamba(d_model: int, nslices: int = 5, **kwargs) -> TriMamba:
    """SegMamba's Mamba with bimamba_type="v3"; the sequence length must be a multiple of nslices, as upstream's reshape demands."""
    return TriMamba(d_model, slices=nslices, **_kept(kwargs, "v3"))


def ss2d(d_model: int, **kwargs) -> SSND:
    """VMamba's first SS2D ("corev0"), as VM-UNet and its kin carry it: (b, h, w, d_model)."""
    return SSND(d_model, spatial_dims=2, **{k: v for k, v in kwargs.items() if k not in _IGNORED})
