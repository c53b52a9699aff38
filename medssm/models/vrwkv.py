"""Vision-RWKV (Duan et al., arXiv 2403.02308): a plain stack of RWKV layers over patches; 2D, here 3D too.

Upstream's class is the backbone alone, whose feature maps go to a head of another library; here `vrwkv` classifies by the last map's mean.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medssm.models.facts import Facts
from medssm.models.options import only, preset, sides
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import ChannelMix, Classifier, Encoder, SpatialMix, positions, sizes
from medssm.nn.blocks import CONV, CUBIC, check_dims, image, tokens
from medssm.nn.vss import DropPath

SIZES = {"tiny": 192, "small": 384, "base": 768}


@register_model(
    "vrwkv",
    facts=Facts(
        "2403.02308",
        "OpenGVLab/Vision-RWKV",
        "Apache-2.0",
        "classify",
        small={"features": 16, "depth": 2, "image_size": 32, "patch": 8},
        sizes=tuple(SIZES),
        input=(3, 224, 224),
        classes=1000,
    ),
)
def vrwkv(
    *,
    spatial_dims: int = 2,
    in_channels: int = 3,
    out_channels: int = 1000,
    size: str = "tiny",
    features: int | None = None,
    depth: int = 12,
    image_size: int | Sequence[int] = 224,
    patch: int = 16,
    mode: str = "exact",
    drop_path: float = 0.0,
    key_norm: bool = False,
) -> Classifier:
    """Vision-RWKV; class logits (b, out_channels) from an image or a volume of any size.

    Args:
        size: "tiny" (6 M parameters in 2D), "small", "base": presets of features, the channels of a token. depth: number of layers.
        image_size: that positions are learned for, one number or one per axis; others are interpolated. patch: the side of the patches.
        mode: of ops.bi_wkv; "upstream" for weights that the published kernels trained. key_norm: of both mixes. drop_path: of the last layer.
    """
    width = features or preset(SIZES, size)
    sizes = sides("image_size", image_size, spatial_dims)
    encoder = VRWKVEncoder(spatial_dims, in_channels, width, depth, sizes, patch, [depth - 1], mode=mode, drop_path=drop_path, key_norm=key_norm)
    return Classifier(encoder, out_channels, norm=False)


class VRWKVEncoder(Encoder):
    """Patches through the layers; forward gives the maps behind the layers `taps`, all at the resolution of the patches, the last layer's
    normalised. What patches do not divide is padded with zeros."""

    def __init__(
        self,
        dims: int,
        in_channels: int,
        features: int,
        depth: int,
        image_size: Sequence[int],
        patch: int,
        taps: Sequence[int],
        *,
        share: float | None = None,
        pixels: int = 1,
        hidden_rate: float = 4,
        post_norm: bool = False,
        key_norm: bool = False,
        layer_scale: float | None = None,
        final_norm: bool = True,
        mode: str = "exact",
        drop_path: float = 0.0,
        dropout: float = 0.0,
        interpolation: str | None = None,
    ) -> None:
        check_dims(dims)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        common: dict[str, Any] = {"pixels": pixels, "share": share, "key_norm": key_norm, "layers": depth}
        layers = [VRWKVLayer(features, int(hidden_rate * features), i, rates[i], post_norm, layer_scale, mode, **common) for i in range(depth)]
        super().__init__(
            CONV[dims](in_channels, features, patch, patch), layers, [features] * len(taps), [(patch,) * dims] + [(1,) * dims] * (len(taps) - 1)
        )
        self.patch, self.taps, self.interpolation = patch, list(taps), interpolation or CUBIC[dims]
        self.grid = tuple(n // patch for n in image_size)
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid), features).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(features) if final_norm else nn.Identity()

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, c, *spatial) -> maps (b, features, *(spatial / patch))."""
        last = len(self.stages) - 1
        final, maps = self.maps(x, [i for i in self.taps if i != last])
        return [*maps, final] if last in self.taps else maps

    def maps(self, x: Tensor, taps: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """The last layer's map, normalised, and the maps behind the layers `taps` as they are."""
        t = tokens(self.stem(sizes.pad_to(x, (self.patch,) * (x.dim() - 2))))
        t = self.dropout(t + positions.resize_positions(self.pos_embed.unflatten(1, self.grid), t, self.interpolation))
        maps = []
        for i, layer in enumerate(self.stages):
            t = layer(t)
            if i in taps:
                maps.append(image(t))
        return image(self.norm(t)), maps


class VRWKVLayer(nn.Module):
    """x + att(ln1(x)), then x + ffn(ln2(x)); with post_norm x + ln1(att(x)) and so on. The first layer normalises its input before all."""

    def __init__(
        self, features: int, hidden: int, layer: int, drop_path: float, post_norm: bool, layer_scale: float | None, mode: str, **common: Any
    ) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(features), nn.LayerNorm(features)
        if layer == 0:
            self.ln0 = nn.LayerNorm(features)
        self.att = SpatialMix(features, layer=layer, mode=mode, **common)
        self.ffn = ChannelMix(features, hidden, layer=layer, **common)
        self.post_norm, self.drop_path = post_norm, DropPath(drop_path)
        for name in ("gamma1", "gamma2"):
            self.register_parameter(name, None if layer_scale is None else nn.Parameter(torch.full((features,), float(layer_scale))))

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, features) -> the same shape."""
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        for norm, mix, gamma in ((self.ln1, self.att, self.gamma1), (self.ln2, self.ffn, self.gamma2)):
            y = norm(mix(x)) if self.post_norm else mix(norm(x))
            x = x + self.drop_path(y if gamma is None else gamma * y)
        return x


class SequenceSpatialMix(SpatialMix):
    """SpatialMix on (b, l, c) tokens of an image of `resolution`, as upstream calls it."""

    def forward(self, x: Tensor, resolution: Sequence[int]) -> Tensor:  # type: ignore[override]
        """(b, l, d_model) -> the same shape."""
        return super().forward(x.unflatten(1, tuple(resolution))).flatten(1, -2)


class SequenceChannelMix(ChannelMix):
    """ChannelMix on (b, l, c) tokens of an image of `resolution`, as upstream calls it."""

    def forward(self, x: Tensor, resolution: Sequence[int]) -> Tensor:  # type: ignore[override]
        """(b, l, d_model) -> the same shape."""
        return super().forward(x.unflatten(1, tuple(resolution))).flatten(1, -2)


MAP = Map(rename=((r"^layers\.", "stages."), (r"^patch_embed\.projection\.", "stem."), (r"^ln1\.", "norm.")))


@register_upstream("vrwkv", map=MAP)
def upstream(
    *,
    img_size: int | Sequence[int] = 224,
    patch_size: int = 16,
    in_channels: int = 3,
    out_indices: int | Sequence[int] = -1,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    embed_dims: int = 256,
    depth: int = 12,
    channel_gamma: float = 1 / 4,
    shift_pixel: int = 1,
    shift_mode: str = "q_shift",
    init_mode: str = "fancy",
    post_norm: bool = False,
    key_norm: bool = False,
    init_values: float | None = None,
    hidden_rate: float = 4,
    final_norm: bool = True,
    interpolate_mode: str = "bicubic",
    with_cp: bool = False,
    wkv_mode: str = "upstream",
) -> VRWKVEncoder:
    """The backbone from the keywords of upstream's VRWKV: a list of feature maps. wkv_mode, which upstream has not, is bi_wkv's mode: "upstream", as
    the published weights were trained, or "exact", the paper's formula; init_mode and with_cp change no output of given weights."""
    only("shift_mode", shift_mode, "q_shift")
    sizes = sides("img_size", img_size, 2)
    taps = [i + depth if i < 0 else i for i in ([out_indices] if isinstance(out_indices, int) else out_indices)]
    return VRWKVEncoder(
        2,
        in_channels,
        embed_dims,
        depth,
        sizes,
        patch_size,
        taps,
        share=channel_gamma,
        pixels=shift_pixel,
        hidden_rate=hidden_rate,
        post_norm=post_norm,
        key_norm=key_norm,
        layer_scale=init_values,
        final_norm=final_norm,
        mode=wkv_mode,
        drop_path=drop_path_rate,
        dropout=drop_rate,
        interpolation=interpolate_mode,
    )


@register_upstream("vrwkv_spatialmix")
def upstream_spatial_mix(
    n_embd: int,
    n_layer: int,
    layer_id: int,
    shift_mode: str = "q_shift",
    channel_gamma: float = 1 / 4,
    shift_pixel: int = 1,
    init_mode: str = "fancy",
    key_norm: bool = False,
    wkv_mode: str = "upstream",
) -> SequenceSpatialMix:
    """Upstream's VRWKV_SpatialMix, (b, l, c) tokens and the image's size in; wkv_mode and init_mode as in `upstream`."""
    only("shift_mode", shift_mode, "q_shift")
    return SequenceSpatialMix(n_embd, pixels=shift_pixel, share=channel_gamma, key_norm=key_norm, layer=layer_id, layers=n_layer, mode=wkv_mode)


@register_upstream("vrwkv_channelmix")
def upstream_channel_mix(
    n_embd: int,
    n_layer: int,
    layer_id: int,
    shift_mode: str = "q_shift",
    channel_gamma: float = 1 / 4,
    shift_pixel: int = 1,
    hidden_rate: float = 4,
    init_mode: str = "fancy",
    key_norm: bool = False,
) -> SequenceChannelMix:
    """Upstream's VRWKV_ChannelMix, (b, l, c) tokens and the image's size in."""
    only("shift_mode", shift_mode, "q_shift")
    return SequenceChannelMix(
        n_embd, int(hidden_rate * n_embd), pixels=shift_pixel, share=channel_gamma, key_norm=key_norm, layer=layer_id, layers=n_layer
    )
