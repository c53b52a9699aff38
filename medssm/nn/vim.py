"""Vision Mamba's encoder (Zhu et al., arXiv 2401.09417): a plain stack of bidirectional Mamba over patches, class tokens among them; 2D and 3D."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from medssm.kernels.dtypes import widened
from medssm.nn import positions, sizes
from medssm.nn.blocks import CONV, CUBIC, check_dims
from medssm.nn.blocks import tokens as channels_last
from medssm.nn.inner import weight_dtype
from medssm.nn.leaf import Leaf
from medssm.nn.mamba import BiMamba
from medssm.nn.unet import Encoder
from medssm.nn.vss import DropPath


class VimEncoder(Encoder):
    """Patches through the layers; forward gives one map, at the resolution of the patches, without the class token."""

    def __init__(
        self,
        dims: int,
        in_channels: int,
        features: int,
        depth: int,
        image_size: Sequence[int],
        patch: int,
        stride: int,
        *,
        d_state: int,
        cls: str | None,
        divide_out: bool,
        drop_path: float,
        dropout: float,
        rms: bool,
        positions: bool,
        eps: float,
    ) -> None:
        check_dims(dims)
        if cls not in ("middle", "first", "both", None):
            raise ValueError(f"cls: expected 'middle', 'first', 'both' or None, got {cls!r}")
        rates = [0.0, *torch.linspace(0, drop_path, depth, device="cpu").tolist()][:depth]
        layers = [VimLayer(features, d_state, rate, divide_out, rms, eps) for rate in rates]
        super().__init__(CONV[dims](in_channels, features, patch, stride), layers, [features], [(stride,) * dims], least=patch)
        self.cls, self.grid = cls, tuple((n - patch) // stride + 1 for n in image_size)
        self.cls_token = nn.Parameter(torch.empty({"both": 2, None: 0}.get(cls, 1), 1, features).normal_(std=0.02))
        count = math.prod(self.grid) + len(self.cls_token)
        self.pos_embed = nn.Parameter(torch.empty(1, count, features).normal_(std=0.02)) if positions else None
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)
        self.norm = _norm(features, rms, eps)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, in_channels, *spatial) -> [(b, features, *grid of patches)]."""
        tokens, grid, at = self.tokens(x)
        return [_map(tokens, grid, at)]

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, ...], list[int]]:
        """Tokens (b, l, features) behind the last norm, the grid of patches, and where the class tokens stand."""
        return self._through(x, ())[:3]

    def maps(self, x: Tensor, taps: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """Tokens behind the last norm, the class tokens first, and the maps behind the layers `taps`, not normalised."""
        tokens, grid, at, sums = self._through(x, taps)
        return torch.cat((at_places(tokens, at), _without(tokens, at)), 1), [_map(t, grid, at) for t in sums]

    def _through(self, x: Tensor, taps: Collection[int]) -> tuple[Tensor, tuple[int, ...], list[int], list[Tensor]]:
        """What `tokens` gives, and the tokens behind the layers `taps`: the sum of what all layers so far gave."""
        patches, cls = channels_last(self.stem(sizes.pad_up(x, self.least))), self.cls_token.transpose(0, 1)
        if self.pos_embed is not None:
            known = self._places(math.prod(self.grid))
            learned = _without(self.pos_embed, known).unflatten(1, self.grid)
            patches = patches + positions.resize_positions(learned, patches, CUBIC[len(self.grid)])
            cls = cls + at_places(self.pos_embed, known)
        grid, t = patches.shape[1:-1], patches.flatten(1, -2)
        at = self._places(t.shape[1])
        t = self.dropout(self._joined(t, cls.expand(t.shape[0], -1, -1), at))
        residual, sums = None, []
        for i, layer in enumerate(self.stages):
            t, residual = layer(t, residual)
            if i - 1 in taps:  # a layer adds what the one before it gave
                sums.append(residual)
        last: Tensor = residual + self.drop_path(t)
        if len(self.stages) - 1 in taps:
            sums.append(last)
        return self.norm(last), grid, at, sums

    def _places(self, n: int) -> list[int]:
        """Where the class tokens stand among n others."""
        return {"both": [0, n + 1], "middle": [n // 2], "first": [0], None: []}[self.cls]

    def _joined(self, t: Tensor, cls: Tensor, at: list[int]) -> Tensor:
        """Tokens with the class tokens (b, classes, features) at their places."""
        if self.cls == "both":
            return torch.cat((cls[:, :1], t, cls[:, 1:]), 1)
        return torch.cat((t[:, : at[0]], cls, t[:, at[0] :]), 1) if at else t


class VimLayer(Leaf):
    """residual + y, its norm, the mixer: (y, residual) -> (mixer(norm(residual + y)), residual + y), the residual in float32 at least."""

    def __init__(self, features: int, d_state: int, drop_path: float, divide_out: bool, rms: bool, eps: float) -> None:
        super().__init__()
        self.mixer = BiMamba(features, d_state, divide_out=divide_out)
        self.norm, self.drop_path = _norm(features, rms, eps), DropPath(drop_path)

    def forward(
        self,
        y: Tensor,  # (b, l, features)
        residual: Tensor | None,  # (b, l, features), None before the first layer
    ) -> tuple[Tensor, Tensor]:
        """What the mixer makes of the norm of residual + y, and that sum; both (b, l, features)."""
        residual = widened(y) if residual is None else residual + self.drop_path(y)
        return self.mixer(self.norm(residual.to(weight_dtype(self.norm, residual)))), residual


def _without(tokens: Tensor, at: Sequence[int]) -> Tensor:
    """Tokens (b, l, c) but for those at these places, which rise."""
    ends = [0, *(i + 1 for i in at)]
    return torch.cat([*(tokens[:, start:i] for start, i in zip(ends, at, strict=False)), tokens[:, ends[-1] :]], 1) if at else tokens


def at_places(tokens: Tensor, at: Sequence[int]) -> Tensor:
    """Those of the tokens (b, l, c) that stand at these places."""
    return torch.cat([tokens[:, i : i + 1] for i in at], 1) if at else tokens[:, :0]


def _map(tokens: Tensor, grid: tuple[int, ...], at: list[int]) -> Tensor:
    """Tokens (b, l, c) with class tokens at these places -> (b, c, *grid)."""
    maps: Tensor = _without(tokens, at).transpose(1, 2).unflatten(2, grid)
    return maps


def _norm(features: int, rms: bool, eps: float) -> nn.RMSNorm | nn.LayerNorm:
    return nn.RMSNorm(features, eps) if rms else nn.LayerNorm(features, eps)
