"""The held-out images of a training: classified while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from medssm.classify.figures import recalls
from medssm.classify.images import Images
from medssm.segment.networks import memory_format


class Validation:
    """Call it with a network, and with what shows a line of text, for the recall of each class, and their mean, the balanced accuracy, as "mean".

    `logits` (images, classes) keeps what the last call gave, `labels` (images,) the classes by position.

    Args:
        images: the held-out images; each process classifies a part of them
        fabric: Lightning's, for the device and the processes
        half: what autocast takes; None for float32
        batch: images at a time
    """

    def __init__(self, images: Images, fabric: Fabric, half: torch.dtype | None, batch: int):
        self.images, self.fabric, self.half, self.batch = images, fabric, half, batch
        classes = images.fitted.classes
        self.labels = torch.tensor([classes.index(str(sample.label)) for sample in images.samples], dtype=torch.long)
        self.logits = torch.zeros(0, len(classes))

    def __call__(self, network: nn.Module, show: Callable[[str], None] = lambda text: None) -> dict[str, float]:
        self.logits = self.classified(network, show)
        found = recalls(self.labels.numpy(), self.logits.argmax(1).numpy(), self.images.fitted.classes)
        return {**found, "mean": sum(found.values()) / len(found)}

    def classified(self, network: nn.Module, show: Callable[[str], None] = lambda text: None) -> Tensor:
        """The logits of all images, those of the other processes among them."""
        rank, world = self.fabric.global_rank, self.fabric.world_size
        own = logits_of(network, self.images, range(rank, len(self.images), world), self.fabric.device, self.half, self.batch, show)
        if world == 1:
            return own
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, own)
        logits = torch.empty(len(self.images), own.shape[1])
        for i, part in enumerate(parts):
            logits[i::world] = part
        return logits


@torch.inference_mode()
def logits_of(
    network: nn.Module,
    images: Images | Sequence[Tensor],
    which: Sequence[int],
    device: torch.device,
    half: torch.dtype | None = None,
    batch: int = 32,
    show: Callable[[str], None] = lambda text: None,
) -> Tensor:
    """The logits (images, classes) float32, on the CPU, of those of the images that `which` names; the network is in eval mode."""
    found = []
    for start in range(0, len(which), batch):
        show(f"classifying, image {start + 1} of {len(which)}")
        part = torch.stack([images[i] for i in which[start : start + batch]])
        part = part.to(device).contiguous(memory_format=memory_format(part.ndim - 2))
        with torch.autocast(device.type, half or torch.float32, enabled=half is not None):
            found.append(network(part).float().cpu())
    return torch.cat(found)
