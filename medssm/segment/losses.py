"""The training losses: soft Dice plus cross-entropy over classes or over regions, with ignored voxels and deep supervision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor, nn

from medssm.segment.preprocess import IGNORE


class SegmentationLoss(nn.Module):
    """loss = sum_s w_s (Dice(p_s, y_s) + CE(p_s, y_s)), w_s = 2^-s / sum 2^-s over the heads s, finest first.

    Call it with the network's output, a tensor (b, classes, *spatial), or deep supervision's list (nnU-Net) or stack (b, heads, classes,
    *spatial) (MONAI's DynUNet), and the label (b, 1, *spatial); a coarser head is compared with the label by nearest neighbour. Dice is
    taken over the batch, so a class absent from one patch is not noise. With `ignore`, voxels of the value IGNORE count in neither term.
    """

    def __init__(self, ignore: bool = False):
        super().__init__()
        self.ignore = ignore
        self.dice = DiceLoss(include_background=False, batch=True)
        self.dice_and_entropy = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)

    def forward(self, output: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
        """The loss, a scalar; see the class for the shapes."""
        heads = finest_first(output, label.ndim)
        weights = [0.5**i for i in range(len(heads))]
        losses = [weight * self._head(head.float(), label) for weight, head in zip(weights, heads, strict=True)]
        return torch.stack(losses).sum() / sum(weights)

    def _head(self, logits: Tensor, label: Tensor) -> Tensor:
        if logits.shape[2:] != label.shape[2:]:
            label = F.interpolate(label.float(), logits.shape[2:], mode="nearest").long()
        return self._loss(logits, label)

    def _loss(self, logits: Tensor, label: Tensor) -> Tensor:
        return self._masked(logits, label) if self.ignore else self.dice_and_entropy(logits, label)

    def _masked(self, logits: Tensor, label: Tensor) -> Tensor:
        """The same over the voxels that have a label; 0 if none has."""
        kept = label != IGNORE
        onehot = torch.zeros_like(logits).scatter_(1, label.clamp(min=0), 1.0)
        dice = self.dice(logits.softmax(1) * kept, onehot * kept)
        entropy = F.cross_entropy(logits, label[:, 0], ignore_index=IGNORE, reduction="sum") / kept.sum().clamp(min=1)
        return (dice + entropy) * kept.any()


class RegionLoss(SegmentationLoss):
    """The same with overlapping regions in place of classes: Dice(p, y) + BCE(p, y), p the sigmoid of a region's logits, y 1 inside of it.

    Each is taken over all regions; voxels of the value IGNORE count in neither.

    Args:
        regions: for each region the classes that it is made of, by position
        classes: their number
    """

    def __init__(self, regions: Sequence[Sequence[int]], classes: int):
        super().__init__()
        self.dice = DiceLoss(batch=True)
        self.inside = torch.zeros(len(regions), classes)
        for row, positions in zip(self.inside, regions, strict=True):
            row[list(positions)] = 1

    def _loss(self, logits: Tensor, label: Tensor) -> Tensor:
        kept = label != IGNORE
        wanted = self.inside.to(logits.device)[:, label[:, 0].clamp(min=0)].movedim(0, 1) * kept
        dice = self.dice(logits.sigmoid() * kept, wanted)
        entropy = F.binary_cross_entropy_with_logits(logits, wanted, kept.expand_as(logits).float(), reduction="sum")
        return (dice + entropy / (kept.sum() * logits.shape[1]).clamp(min=1)) * kept.any()


def finest_first(output: Tensor | Sequence[Tensor], ndim: int) -> Sequence[Tensor]:
    """The network's heads as a list; `ndim` is the number of axes of one head's logits."""
    if isinstance(output, Tensor):
        return output.unbind(1) if output.ndim == ndim + 1 else [output]
    return output
