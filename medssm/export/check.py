"""What is the same of every engine: the network's one output, the sizes that a file is traced and checked with, and the check itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medssm.compress.int8 import Int8
from medssm.errors import UserError
from medssm.files import first_line

LIMIT = 1e-4  # the largest difference from eager that an exported network may have, over the spread of eager's output
# Of a network in 8 bits a number between two steps is rounded up by one engine and down by another, and so on from layer to layer. In steps, 1/255 of
# the output's spread: the difference that 999 of 1,000 numbers may have, and the mean one. Where one voxel of the input lies between two steps, the
# few numbers around it may differ by more.
STEPS, MEAN_STEPS = 8.0, 0.5
FEW = 0.001
_STEP = 32  # sizes of a network that does not say what divides them differ by this, or by what of it divides the patch

Shape = tuple[int, ...]
Run = Callable[["np.ndarray[Any, Any]"], "np.ndarray[Any, Any]"]


class Finest(nn.Module):
    """A network that gives one output; of one that gives a list (deep supervision), the finest logits, without the other heads where they can be
    switched off. Layers in 8 bits are computed in floating point, which gives the same on every processor. The network itself stays as it is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval()
        for module in self.network.modules():
            if getattr(module, "deep_supervision", False) is True:
                module.deep_supervision = False  # type: ignore[assignment]
            if isinstance(module, Int8):
                module.integers = False

    def forward(self, image: Tensor) -> Tensor:
        """(b, c, *spatial) -> (b, classes, *spatial), or of a classifier (b, classes)."""
        output = self.network(image)
        if isinstance(output, Tensor):
            return output.select(1, 0) if output.dim() == image.dim() + 1 else output
        finest: Tensor = output[0]
        return finest


class Tempered(nn.Module):
    """A classifier's logits over its temperature: their softmax is what `medssm predict` gives."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, image: Tensor) -> Tensor:
        """(b, c, *spatial) -> (b, classes)."""
        logits: Tensor = self.network(image) / self.temperature
        return logits


class Shapes(NamedTuple):
    """Of images (b, c, *spatial): what a network is traced with, what the file is checked with, and whether sizes are free; the batch always is."""

    traced: Shape
    checked: tuple[Shape, Shape]
    free: bool


def shapes(network: nn.Module, shape: Sequence[int], sizes: Literal["free", "fixed"] = "free") -> Shapes:
    """Two shapes to check, both other than the traced one: the given one with a batch of 1, and a batch of 2 in another size.

    Fixed sizes are those of the given shape: then only the batches differ.

    A network that pads its input is traced and checked at sizes that its strides do not divide, besides the given one: an exporter may hold what is
    equal in the traced shape to be equal always. Traced sizes differ along the axes, and leave more than one voxel of the coarsest map.
    """
    if sizes not in ("free", "fixed"):
        raise UserError(f"sizes: expected free or fixed, got {sizes!r}")
    channels, *spatial = shape[1:]
    if sizes == "fixed":
        traced, one, three = ((batch, channels, *spatial) for batch in (2, 1, 3))
        return Shapes(traced, (one, three), False)
    divisor: Sequence[int] = getattr(network, "size_divisor", ())
    known = len(divisor) == len(spatial)
    steps = divisor if known else [math.gcd(n, _STEP) for n in spatial]
    least = [2 * d for d in steps] if known else spatial
    odd = 1 if known and getattr(network, "size", "") == "any" else 0
    moved = tuple(n + (1 + i) * d + odd for i, (n, d) in enumerate(zip(least, steps, strict=True)))
    other = tuple(n + (2 - i) * d + odd for i, (n, d) in enumerate(zip(least, steps, strict=True)))
    return Shapes((2, channels, *moved), ((1, channels, *spatial), (2, channels, *other)), True)


@torch.no_grad()
def check(network: nn.Module, run: Run, shapes: Sequence[Shape], engine: str, *, rounds: bool = False) -> float:
    """The largest difference between what `run` gives and the network itself, over the spread of the latter, for random images of these shapes.

    rounds: to 8 bits, so that the difference may be up to STEPS, but for FEW of the numbers, and on average up to MEAN_STEPS, else LIMIT.

    Raises UserError where the engine fails, gives another shape, or differs by more.
    """
    worst, noise = 0.0, torch.Generator().manual_seed(0)
    for shape in shapes:
        image = torch.randn(shape, generator=noise)
        text = "x".join(map(str, shape))
        try:
            wanted = network.eval()(image).numpy()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the network itself does not take an image of {text}, which the file would have to take: {first_line(error)}") from error
        try:
            found = run(image.numpy())
        except Exception as error:  # engines have exceptions of their own
            raise UserError(f"{engine} does not run the exported network for an image of {text}: {first_line(error)}") from error
        if found.shape != wanted.shape:
            raise UserError(f"a size became fixed: for an image of {text} the exported network gives {found.shape}, expected {wanted.shape}")
        apart = np.abs(found - wanted) / (float(wanted.max() - wanted.min()) or 1.0)
        largest, mean = float(apart.max()), float(apart.mean())
        most = float(np.quantile(apart, 1 - FEW)) if rounds else largest
        if rounds and not (255 * most <= STEPS and 255 * mean <= MEAN_STEPS):
            raise UserError(
                f"{engine} differs from PyTorch in 8 bits by {255 * most:.1f} steps (1/255 of the output's spread) in {FEW:.1%} of the numbers and "
                f"{255 * mean:.2f} on average for an image of {text}, expected at most {STEPS:g} and {MEAN_STEPS:g}"
            )
        if not rounds and not largest <= LIMIT:  # also of what is no number
            raise UserError(f"{engine} differs from PyTorch by {largest:.1e} of the output's spread for an image of {text}, expected {LIMIT:.0e}")
        worst = max(worst, largest)
    return worst
