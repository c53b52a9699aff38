"""Upstream's mixers alone, from upstream's keywords: mamba_ssm's Mamba, Vim's and SegMamba's forks of it, VMamba's SS2D, UNETR++'s block."""

from __future__ import annotations

from typing import Any

from medssm.models.options import only
from medssm.models.registry import register_upstream
from medssm.models.weights import Map
from medssm.nn import SSND, BiMamba, Mamba, TriMamba
from medssm.nn.epa import PairedBlock

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


PAIRED = (
    (r"\bepa_block\.EF$", "epa.projections.E"),
    (r"\bepa_block\.([EF])\.weight$", r"epa.projections.\1"),
    (r"\bepa_block\.([EF])\.bias$", r"epa.biases.\1"),
    (r"\bepa_block\.", "epa."),
    (r"\bconv5(\d)\.", lambda m: f"local.{int(m[1]) - 1}."),
    (r"\bconv8\.", "out."),
    (r"\b(conv\d|transp_conv|conv)\.conv\.", r"\1."),
)
TRANSPOSED = (r"\bepa_block\.[EF]\.weight$",)
TWICE = (r"\bepa_block\.F\.",)  # E again, where keys and values are projected alike


@register_upstream("unetr_pp_block", map=Map(TWICE, PAIRED, TRANSPOSED))
def paired(input_size: int, hidden_size: int, proj_size: int, num_heads: int, dropout_rate: float = 0, pos_embed: bool = True) -> PairedBlock:
    """UNETR++'s TransformerBlock for Synapse: (b, hidden_size, *spatial) of input_size voxels."""
    only("pos_embed", pos_embed, True)
    return PairedBlock(hidden_size, (input_size,), num_heads, proj_size, dropout=dropout_rate, scrambled=True)
