"""MedMamba (Yue and Li, arXiv 2403.03849): half of the channels convolved, half scanned, then shuffled; for classification, in 3D too.

Upstream has no norm before the head and drops the last row or column of an odd map; both are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssm.models.facts import Facts
from medssm.models.options import doubled, only, preset
from medssm.models.registry import register_model, register_upstream
from medssm.models.vmamba import EARLY, ENCODER
from medssm.models.weights import Map
from medssm.nn import SSND, Classifier
from medssm.nn.blocks import BATCH_NORM, CONV, image, tokens
from medssm.nn.vss import DropPath, start_linears, vss_encoder

SIZES = {"tiny": ((96, 192, 384, 768), (2, 2, 4, 2)), "small": ((96, 192, 384, 768), (2, 2, 8, 2)), "base": ((128, 256, 512, 1024), (2, 2, 12, 2))}


@register_model(
    "medmamba",
    facts=Facts(
        "2403.03849",
        "YubiaoYue/MedMamba",
        "none given",
        "classify",
        small={"features": (8, 16), "depths": (1, 1)},
        sizes=tuple(SIZES),
        input=(3, 224, 224),
        classes=1000,
    ),
)
def medmamba(
    *,
    spatial_dims: int = 2,
    in_channels: int = 3,
    out_channels: int = 1000,
    size: str = "tiny",
    features: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    d_state: int = 16,
    drop_path: float = 0.1,
) -> Classifier:
    """MedMamba; class logits (b, out_channels) from an image or a volume of any size.

    Args:
        size: "tiny" (14 M parameters in 2D), "small" or "base": presets of features (channels per stage, even) and depths (blocks per stage).
        d_state: of the scans. drop_path: stochastic depth at the last block.
    """
    preset_features, preset_depths = preset(SIZES, size)
    features, depths = features or preset_features, depths or preset_depths

    def block(channels: int, rate: float) -> nn.Module:
        return SplitBlock(channels, spatial_dims, rate, d_state)

    model = Classifier(vss_encoder(in_channels, features, depths, spatial_dims, drop_path, block=block), out_channels, norm=False)
    start_linears(model)
    return model


MAP = Map(rename=(*EARLY, (r"\.conv33conv33conv11\.", ".local."), *ENCODER))


@register_upstream("medmamba", map=MAP)
def upstream(
    *,
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,
    depths: Sequence[int] = (2, 2, 4, 2),
    depths_decoder: Sequence[int] | None = None,
    dims: int | Sequence[int] = (96, 192, 384, 768),
    dims_decoder: Sequence[int] | None = None,
    d_state: int = 16,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    patch_norm: bool = True,
    use_checkpoint: bool = False,
) -> Classifier:
    """MedMamba from the keywords of upstream's VSSM; depths_decoder, dims_decoder and use_checkpoint change no output."""
    only("patch_size", patch_size, 4)
    only("drop_rate", drop_rate, 0)
    only("attn_drop_rate", attn_drop_rate, 0)
    only("patch_norm", patch_norm, True)
    return medmamba(
        in_channels=in_chans, out_channels=num_classes, features=doubled(dims, len(depths)), depths=depths, d_state=d_state, drop_path=drop_path_rate
    )


class SplitBlock(nn.Module):
    """x + shuffle(local(first half of x), op(norm(second half))), the channels of the halves taking turns (SS-Conv-SSM of the paper).

    local: two 3 x 3 (x 3) convolutions and a 1 x 1 one, with batch norms and ReLU; op: SSND. On (b, c, *spatial), c even.
    """

    def __init__(self, channels: int, spatial_dims: int = 2, drop_path: float = 0.0, d_state: int = 16) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(f"features: expected even numbers of channels, got {channels}")
        half, conv, norm = channels // 2, CONV[spatial_dims], BATCH_NORM[spatial_dims]
        self.norm = nn.LayerNorm(half)
        self.op = SSND(half, d_state, spatial_dims=spatial_dims)
        self.drop_path = DropPath(drop_path)
        self.local = nn.Sequential(
            norm(half),
            conv(half, half, 3, padding=1),
            norm(half),
            nn.ReLU(),
            conv(half, half, 3, padding=1),
            norm(half),
            nn.ReLU(),
            conv(half, half, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        left, right = x.chunk(2, 1)
        scanned = image(self.drop_path(self.op(self.norm(tokens(right)))))
        return x + torch.stack((self.local(left), scanned), 2).flatten(1, 2)


class ChannelLastBlock(SplitBlock):
    """A SplitBlock on (b, *spatial, c), as upstream's."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> the same shape."""
        return tokens(super().forward(image(x)))


BLOCK_MAP = Map(rename=((r"^", "."), *EARLY[2:], (r"\.conv33conv33conv11\.", ".local."), (r"^\.", "")))


@register_upstream("medmamba_block", map=BLOCK_MAP)
def upstream_block(hidden_dim: int, norm: object = None, d_state: int = 16, drop_path: float = 0.0) -> ChannelLastBlock:
    """Upstream's SS_Conv_SSM; `norm` may name the layer norm that its network passes."""
    return ChannelLastBlock(hidden_dim, 2, drop_path, d_state)
