"""Vision Mamba, Vim (Zhu et al., arXiv 2401.09417): a plain stack of bidirectional Mamba over patches, with a class token; 2D, here 3D too.

Upstream's patches and positions are made for one image size; here positions of another size are interpolated. The class token's answer goes to
the head wherever there is one, also in the models whose names say final_pool_mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssm.models.weights import Map
from medssm.nn import BiMamba, Encoder
from medssm.nn.blocks import CONV, check_dims
from medssm.nn.vss import DropPath

_SIZES = {"tiny": 192, "small": 384, "base": 768}
_CUBIC = {2: "bicubic", 3: "trilinear"}


class Vim(nn.Module):
    """Class logits (b, out_channels) from an image or a volume of any size that has a patch.

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
    ):
        super().__init__()
        if size not in _SIZES:
            raise ValueError(f"size: expected one of {', '.join(_SIZES)}, got {size!r}")
        sizes = [image_size] * spatial_dims if isinstance(image_size, int) else list(image_size)
        self.encoder = VimEncoder(
            spatial_dims,
            in_channels,
            features or _SIZES[size],
            depth,
            sizes,
            patch,
            stride or patch,
            d_state,
            cls,
            divide_out,
            drop_path,
            dropout,
            rms,
            positions,
            eps,
        )
        if pool not in ("mean", "last"):
            raise ValueError(f"pool: expected 'mean' or 'last', got {pool!r}")
        self.pool = pool
        self.head = nn.Linear(features or _SIZES[size], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens, _, at = self.encoder.tokens(x)
        if at:
            return self.head(tokens[:, at].mean(1))
        return self.head(tokens.mean(1) if self.pool == "mean" else tokens[:, -1])


class VimEncoder(Encoder):
    """Patches through the layers; forward gives one map, at the resolution of the patches, without the class token."""

    def __init__(
        self, dims, in_channels, features, depth, image_size, patch, stride, d_state, cls, divide_out, drop_path, dropout, rms, positions, eps
    ):
        check_dims(dims)
        if cls not in ("middle", "first", "both", None):
            raise ValueError(f"cls: expected 'middle', 'first', 'both' or None, got {cls!r}")
        rates = [0.0, *torch.linspace(0, drop_path, depth, device="cpu").tolist()][:depth]
        layers = [VimLayer(features, d_state, rate, divide_out, rms, eps) for rate in rates]
        super().__init__(CONV[dims](in_channels, features, patch, stride), layers, [features], [(stride,) * dims])
        self.cls, self.grid = cls, tuple((n - patch) // stride + 1 for n in image_size)
        self.cls_token = nn.Parameter(torch.empty({"both": 2, None: 0}.get(cls, 1), 1, features).normal_(std=0.02))
        count = math.prod(self.grid) + len(self.cls_token)
        self.pos_embed = nn.Parameter(torch.empty(1, count, features).normal_(std=0.02)) if positions else None
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)
        self.norm = _norm(features, rms, eps)

    def forward(self, x: Tensor) -> list[Tensor]:
        tokens, grid, at = self.tokens(x)
        kept = [i for i in range(tokens.shape[1]) if i not in at]
        return [tokens[:, kept].transpose(1, 2).unflatten(2, grid)]

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, ...], list[int]]:
        """Tokens (b, l, c) behind the last norm, the grid of patches, and where the class tokens stand."""
        patches = self.stem(x)
        grid = tuple(patches.shape[2:])
        t, at = self._with_cls(patches.flatten(2).transpose(1, 2), [token.expand(len(x), -1, -1) for token in self.cls_token])
        if self.pos_embed is not None:
            t = t + self._positions(grid)
        t = self.dropout(t)
        residual = None
        for layer in self.stages:
            t, residual = layer(t, residual)
        return self.norm(residual + self.drop_path(t)), grid, at

    def _with_cls(self, t: Tensor, cls: list[Tensor]) -> tuple[Tensor, list[int]]:
        """Tokens with the class tokens among them, and where those stand."""
        n = t.shape[1]
        if not cls:
            return t, []
        if self.cls == "both":
            return torch.cat((cls[0], t, cls[1]), 1), [0, n + 1]
        at = n // 2 if self.cls == "middle" else 0
        return torch.cat((t[:, :at], cls[0], t[:, at:]), 1), [at]

    def _positions(self, grid: tuple[int, ...]) -> Tensor:
        """The learned positions, interpolated where the grid is another than they were learned for."""
        if grid == self.grid:
            return self.pos_embed
        _, at = self._with_cls(self.pos_embed[:, len(self.cls_token) :], [self.pos_embed[:, :1]] * len(self.cls_token))
        kept = [i for i in range(self.pos_embed.shape[1]) if i not in at]
        learned = self.pos_embed[:, kept].transpose(1, 2).unflatten(2, self.grid)
        fitted = nn.functional.interpolate(learned, grid, mode=_CUBIC[len(grid)], align_corners=False).flatten(2).transpose(1, 2)
        return self._with_cls(fitted, [self.pos_embed[:, i : i + 1] for i in at])[0]


class VimLayer(nn.Module):
    """residual + y, its norm, the mixer: (y, residual) -> (mixer(norm(residual + y)), residual + y), the residual in float32."""

    def __init__(self, features: int, d_state: int, drop_path: float, divide_out: bool, rms: bool, eps: float):
        super().__init__()
        self.mixer = BiMamba(features, d_state, divide_out=divide_out)
        self.norm, self.drop_path = _norm(features, rms, eps), DropPath(drop_path)

    def forward(self, y: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = y.float() if residual is None else residual + self.drop_path(y)
        return self.mixer(self.norm(residual.to(self.norm.weight.dtype))), residual


def upstream(
    fn: str | None = None,
    *,
    img_size=224,
    patch_size=16,
    stride=None,
    depth=24,
    embed_dim=192,
    d_state=16,
    channels=3,
    num_classes=1000,
    drop_rate=0.0,
    drop_path_rate=0.1,
    norm_epsilon=1e-5,
    rms_norm=True,
    fused_add_norm=True,
    residual_in_fp32=True,
    final_pool_type="mean",
    if_abs_pos_embed=True,
    if_rope=False,
    if_rope_residual=False,
    if_bidirectional=False,
    flip_img_sequences_ratio=-1.0,
    bimamba_type="v2",
    if_cls_token=True,
    if_divide_out=True,
    init_layer_scale=None,
    use_double_cls_token=False,
    use_middle_cls_token=True,
) -> Vim:
    """Vim from the keywords of upstream's VisionMamba, or from the name of one of its registered models with further keywords.

    Not in this release: rotary positions, flipped sequences, layers in pairs, mixers of one direction, a layer scale.
    """
    if fn is not None:
        found = re.match(r"vim_(tiny|small|base)_patch(\d+)_(?:stride(\d+)_)?(\d+)_bimambav2_", fn)
        if not found:
            raise ValueError(f"fn: expected the name of one of upstream's models, vim_tiny_patch16_224_bimambav2_…, got {fn!r}")
        embed_dim, patch_size, img_size = _SIZES[found[1]], int(found[2]), int(found[4])
        stride = int(found[3]) if found[3] else patch_size
    for name, value, known in (
        ("if_rope", if_rope, False),
        ("if_rope_residual", if_rope_residual, False),
        ("if_bidirectional", if_bidirectional, False),
        ("bimamba_type", bimamba_type, "v2"),
        ("init_layer_scale", init_layer_scale, None),
        ("flip_img_sequences_ratio", max(flip_img_sequences_ratio, -1.0), -1.0),
    ):
        if value != known:
            raise ValueError(f"{name}: expected {known!r}, got {value!r}")
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


MAP = Map(
    rename=(
        (r"^layers\.", "encoder.stages."),
        (r"^patch_embed\.proj\.", "encoder.stem."),
        (r"^(cls_token|pos_embed)$", r"encoder.\1"),
        (r"^norm_f\.", "encoder.norm."),
    )
)


def _norm(features: int, rms: bool, eps: float) -> nn.Module:
    return nn.RMSNorm(features, eps) if rms else nn.LayerNorm(features, eps)
