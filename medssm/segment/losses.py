"""The training loss: soft Dice over the foreground classes plus cross-entropy, with ignored voxels and deep supervision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor, nn

from medssm.segment.preprocess import IGNORE


class DiceCELoss(nn.Module):
    """loss = sum_s w_s (Dice(p_s, y_s) + CE(p_s, y_s)), w_s = 2^-s / sum 2^-s over the heads s, finest first.

    Call it with the network's output, a tensor (b, classes, *spatial), or deep supervision's list (nnU-Net) or stack (b, heads, classes,
    *spatial) (MONAI's DynUNet), and the label (b, 1, *spatial); a coarser head is compared with the label by nearest neighbour. Dice is
    taken over the batch, so a class absent from one patch is not noise. Voxels of the value IGNORE count in neither term.
    """

    def __init__(self):
        super().__init__()
        self.dice = DiceLoss(include_background=False, batch=True)

    def forward(self, output: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
        heads = finest_first(output, label.ndim)
        weights = [0.5**i for i in range(len(heads))]
        return sum(weight * self._head(head.float(), label) for weight, head in zip(weights, heads, strict=True)) / sum(weights)

    def _head(self, logits: Tensor, label: Tensor) -> Tensor:
        if logits.shape[2:] != label.shape[2:]:
            label = F.interpolate(label.float(), logits.shape[2:], mode="nearest").long()
        kept = label != IGNORE
        target = label.clamp(min=0)
        onehot = torch.zeros_like(logits).scatter_(1, target, 1.0)
        dice = self.dice(logits.softmax(1) * kept, onehot * kept)
        entropy = F.cross_entropy(logits, target[:, 0].masked_fill(~kept[:, 0], IGNORE), ignore_index=IGNORE, reduction="sum")
        return dice + entropy / kept.sum().clamp(min=1)


def finest_first(output: Tensor | Sequence[Tensor], ndim: int) -> Sequence[Tensor]:
    """The network's heads as a list; `ndim` is the number of axes of one head's logits."""
    if isinstance(output, Tensor):
        return output.unbind(1) if output.ndim == ndim + 1 else [output]
    return output
