"""nnMamba for classification (Gong et al., arXiv 2402.03526): a layer of Mamba behind the first convolutions, residual stages, and an MLP over the
means of their maps; 3D, here 2D too. In upstream's code this Mamba has one direction, and no Mamba runs over the means.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssm.models.facts import Facts
from medssm.models.nnmamba import DOUBLE_CONV, SOURCE, STAGES, MambaLayer, Stage, halving_encoder
from medssm.models.options import doubled
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Mamba
from medssm.nn.resnet import double_conv


@register_model(
    "nnmamba_cls",
    facts=Facts(
        *SOURCE, "classify", small={"features": (4, 8), "blocks": 1}, parity="weight names; outputs compared with the source's code outside the tests"
    ),
)
class NNMambaClassifier(nn.Module):
    """nnMamba for classification; class logits (b, out_channels) from an image or a volume of any size.

    Args:
        features: channels per stage, at 1/2, 1/4, … of the resolution. blocks: residual blocks of each stage but the first.
        d_state: of the scan. dropout: before the last layer.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        features: Sequence[int] = (32, 64, 128, 256),
        blocks: int = 3,
        d_state: int = 8,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        stem = MambaLayer(features[0], Mamba(features[0], d_state), spatial_dims)
        first = nn.Sequential(double_conv(in_channels, features[0], spatial_dims, 2), _Around(stem))
        stages = [first, *(Stage(a, b, blocks, spatial_dims, scans=False) for a, b in itertools.pairwise(features))]
        self.encoder = halving_encoder(stages, features, spatial_dims)
        self.mlp = nn.Sequential(nn.Linear(sum(features[1:]), features[0]), nn.ReLU(), nn.Dropout(dropout), nn.Linear(features[0], out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, *spatial) -> (b, out_channels)."""
        logits: Tensor = self.mlp(torch.cat([m.flatten(2).mean(-1) for m in self.encoder(x)[1:]], 1))
        return logits


class _Around(nn.Module):
    """x + layer(x)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layer(x)
        return y


MAP = Map(
    rename=(
        *STAGES,
        (r"^in_conv\.conv\.(\d)\.", lambda m: f"encoder.stages.0.0.{DOUBLE_CONV[m[1]]}."),
        (r"^mamba_layer_stem\.", "encoder.stages.0.1.layer."),
    )
)


@register_upstream("nnmamba_cls", map=MAP)
def upstream(in_ch: int = 1, channels: int = 32, blocks: int = 3, number_classes: int = 1) -> NNMambaClassifier:
    """nnMamba from the keywords of upstream's nnMambaEncoder."""
    return NNMambaClassifier(in_channels=in_ch, out_channels=number_classes, features=doubled(channels, 4), blocks=blocks)
