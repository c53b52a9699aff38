"""A classification head on any encoder."""

from __future__ import annotations

from torch import Tensor, nn

from medssm.nn.blocks import ChannelNorm
from medssm.nn.unet import Encoder


class Classifier(nn.Module):
    """Logits (b, classes): a linear layer on the mean over space of the coarsest map of the encoder's trunk, which a norm may precede.

    norm: True for a layer norm over channels, False for none, or the norm itself. Any input size that the encoder takes.
    """

    def __init__(self, encoder: Encoder, classes: int, norm: bool | nn.Module = True) -> None:
        super().__init__()
        channels = encoder.output_channels[-1]
        self.encoder = encoder.trunk()
        self.norm = norm if isinstance(norm, nn.Module) else ChannelNorm(channels) if norm else nn.Identity()
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *spatial) -> (b, classes)."""
        logits: Tensor = self.head(self.norm(self.encoder(x)[-1]).flatten(2).mean(-1))
        return logits
