"""Vision Mamba, Vim (Zhu et al., arXiv 2401.09417): a plain stack of bidirectional Mamba over patches, with a class token; 2D, here 3D too.

Upstream's patches and positions are made for one image size; here positions of another size are interpolated. The class token's answer goes to
the head wherever there is one, also in the models whose names say final_pool_mean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from medssm.models.facts import Facts
from medssm.models.options import only, preset, sides
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn.vim import VimEncoder, at_places

SIZES = {"tiny": 192, "small": 384, "base": 768}


@register_model(
    "vim",
    facts=Facts(
        "2401.09417",
        "hustvl/Vim",
        "Apache-2.0",
        "classify",
        small={"features": 16, "depth": 2, "image_size": 32, "patch": 8},
        sizes=tuple(SIZES),
        input=(3, 224, 224),
        classes=1000,
    ),
)
class Vim(nn.Module):
    """Class logits (b, out_channels) from an image or a volume of any size; one smaller than a patch is padded with zeros.

    Args:
        size: "tiny" (7 M parameters in 2D), "small", "base": presets of features, the channels of a token. depth: number of layers.
        image_size: that positions are learned for, one number or one per axis. patch, stride: of the patches, stride None for side by side.
        cls: where the class token stands: "middle", "first", "both" (two of them, averaged), or None: `pool` "mean" or "last" then.
        d_state, divide_out: of the mixers (BiMamba). drop_path: stochastic depth at the last layer. dropout: on the tokens. rms: RMS norms,
            else layer norms. positions: learned ones are added.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1000,
        size: str = "tiny",
        features: int | None = None,
        depth: int = 24,
        image_size: int | Sequence[int] = 224,
        patch: int = 16,
        stride: int | None = None,
        d_state: int = 16,
        cls: str | None = "middle",
        pool: str = "mean",
        divide_out: bool = True,
        drop_path: float = 0.1,
        dropout: float = 0.0,
        rms: bool = True,
        positions: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        width = features or preset(SIZES, size)
        only("pool", pool, "mean", "last")
        self.encoder = VimEncoder(
            spatial_dims,
            in_channels,
            width,
            depth,
            sides("image_size", image_size, spatial_dims),
            patch,
            stride or patch,
            d_state=d_state,
            cls=cls,
            divide_out=divide_out,
            drop_path=drop_path,
            dropout=dropout,
            rms=rms,
            positions=positions,
            eps=eps,
        )
        self.pool = pool
        self.head = nn.Linear(width, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, *spatial) -> (b, out_channels)."""
        tokens, _, at = self.encoder.tokens(x)
        pooled = at_places(tokens, at).mean(1) if at else tokens.mean(1) if self.pool == "mean" else tokens[:, -1]
        logits: Tensor = self.head(pooled)
        return logits


MAP = Map(
    rename=(
        (r"^layers\.", "encoder.stages."),
        (r"^patch_embed\.proj\.", "encoder.stem."),
        (r"^(cls_token|pos_embed)$", r"encoder.\1"),
        (r"^norm_f\.", "encoder.norm."),
    )
)


@register_upstream("vim", map=MAP)
def upstream(
    fn: str | None = None,
    *,
    img_size: int | Sequence[int] = 224,
    patch_size: int = 16,
    stride: int | None = None,
    depth: int = 24,
    embed_dim: int = 192,
    d_state: int = 16,
    channels: int = 3,
    num_classes: int = 1000,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = True,
    fused_add_norm: bool = True,
    residual_in_fp32: bool = True,
    final_pool_type: str = "mean",
    if_abs_pos_embed: bool = True,
    if_rope: bool = False,
    if_rope_residual: bool = False,
    if_bidirectional: bool = False,
    flip_img_sequences_ratio: float = -1.0,
    bimamba_type: str = "v2",
    if_cls_token: bool = True,
    if_divide_out: bool = True,
    init_layer_scale: float | None = None,
    use_double_cls_token: bool = False,
    use_middle_cls_token: bool = True,
) -> Vim:
    """Vim from the keywords of upstream's VisionMamba, or from the name of one of its registered models with further keywords.

    Not in this release: rotary positions, flipped sequences, layers in pairs, mixers of one direction, a layer scale.
    """
    if fn is not None:
        found = re.match(r"vim_(tiny|small|base)_patch(\d+)_(?:stride(\d+)_)?(\d+)_bimambav2_", fn)
        if not found:
            raise ValueError(f"fn: expected the name of one of upstream's models, vim_tiny_patch16_224_bimambav2_…, got {fn!r}")
        embed_dim, patch_size, img_size = SIZES[found[1]], int(found[2]), int(found[4])
        stride = int(found[3]) if found[3] else patch_size
    only("if_rope", if_rope, False)
    only("if_rope_residual", if_rope_residual, False)
    only("if_bidirectional", if_bidirectional, False)
    only("bimamba_type", bimamba_type, "v2")
    only("init_layer_scale", init_layer_scale, None)
    only("flip_img_sequences_ratio", max(flip_img_sequences_ratio, -1.0), -1.0)
    cls = None if not if_cls_token else "both" if use_double_cls_token else "middle" if use_middle_cls_token else "first"
    return Vim(
        in_channels=channels,
        out_channels=num_classes,
        features=embed_dim,
        depth=depth,
        image_size=img_size,
        patch=patch_size,
        stride=stride or 16,
        d_state=d_state,
        cls=cls,
        pool="last" if final_pool_type == "none" else final_pool_type,
        divide_out=if_divide_out,
        drop_path=drop_path_rate,
        dropout=drop_rate,
        rms=rms_norm,
        positions=if_abs_pos_embed,
        eps=norm_epsilon,
    )
