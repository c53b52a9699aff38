"""Distillation: a network learns from a larger one, the teacher, beside the labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssm.errors import UserError
from medssm.files import read_json
from medssm.segment import networks
from medssm.segment.cases import Case
from medssm.segment.data import FITTED
from medssm.segment.losses import RegionLoss, finest_first
from medssm.segment.preprocess import Fitted
from medssm.segment.runs import CASES

_REACH = 4  # voxels from a border at which a voxel counts as any other


class Distillation(nn.Module):
    """loss = criterion(s, y) + logits * sum_v w_v KL(t_v || s_v) / sum_v w_v + features * |T - P S|^2 / |T - mean T|^2

    s and t are the probabilities of the student's and the teacher's finest logits, both divided by the temperature; KL is multiplied by its square
    (Hinton et al., arXiv 1503.02531). w_v = 1 + borders (1 - d_v / 4), where a voxel lies d_v < 4 voxels from the border of a class, else 1. S and T
    are the coarsest maps of the two encoders, with a row for each channel, and P is the linear map, with a constant, that takes S nearest to T: what
    is left is what the student's features do not say of the teacher's. Without two encoders that term is left out.
    Logits without spatial axes, of a classifier, all weigh w_v = 1.

    Called as the criterion is, with the student's output and the label. The image, which the teacher needs, is taken from the student's call.

    Args:
        criterion: the loss of an output and a label
        student, teacher: networks; the teacher is used as it is and does not learn
        temperature: above 0; the larger, the more the less likely classes count
        logits, features, borders: weights, 0 or more
    """

    def __init__(
        self,
        criterion: nn.Module,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 2.0,
        logits: float = 1.0,
        features: float = 0.1,
        borders: float = 2.0,
    ) -> None:
        super().__init__()
        self.criterion, self.teacher = criterion, teacher.eval().requires_grad_(False)
        self.temperature, self.logits, self.features, self.borders = temperature, logits, features, borders
        self.binary = isinstance(criterion, RegionLoss)
        seen: dict[str, Any] = {}
        self._seen = seen

        def image(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module.training:
                seen["image"] = args[0]

        student.register_forward_pre_hook(image)
        encoders = [getattr(network, "encoder", None) for network in (student, teacher)]
        if features and all(isinstance(encoder, nn.Module) for encoder in encoders):
            for name, encoder in zip(("student", "teacher"), encoders, strict=True):

                def maps(module: nn.Module, args: Any, output: Sequence[Tensor], name: str = name) -> None:
                    if module.training or name == "teacher":
                        seen[name] = output[-1]

                encoder.register_forward_hook(maps)  # type: ignore[union-attr]

    def forward(self, output: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
        """The loss, a scalar."""
        loss: Tensor = self.criterion(output, label)
        image: Tensor = self._seen.pop("image")
        with (
            torch.no_grad(),
            torch.autocast(image.device.type, image.dtype, enabled=image.dtype != torch.float32),
        ):  # mixed precision gives half images
            taught = finest_first(self.teacher(image), label.ndim)[0].float()
        learnt = finest_first(output, label.ndim)[0].float()
        loss = loss + self.logits * self._divergence(learnt, taught, label)
        if "student" in self._seen:
            loss = loss + self.features * unexplained(self._seen.pop("student"), self._seen.pop("teacher"))
        return loss

    def _divergence(self, learnt: Tensor, taught: Tensor, label: Tensor) -> Tensor:
        learnt, taught = learnt / self.temperature, taught / self.temperature
        if self.binary:
            target = taught.sigmoid()
            each = F.binary_cross_entropy_with_logits(learnt, target, reduction="none") - F.binary_cross_entropy_with_logits(
                taught, target, reduction="none"
            )
            divergence = each.sum(1, keepdim=True)
        else:
            divergence = F.kl_div(learnt.log_softmax(1), taught.log_softmax(1), reduction="none", log_target=True).sum(1, keepdim=True)
        weights = 1 + self.borders * nearness(label) if label.ndim > 2 else torch.ones_like(divergence)
        return self.temperature**2 * (weights * divergence).sum() / weights.sum()


def nearness(label: Tensor) -> Tensor:
    """(b, 1, *spatial): 1 - d / 4 for a voxel whose distance to a voxel of another class is d + 1 steps, also along diagonals; 0 from d = 4 on."""
    pool = F.max_pool3d if label.dim() == 5 else F.max_pool2d
    x = label.float()
    near = (pool(x, 3, 1, 1) != -pool(-x, 3, 1, 1)).float()
    found = near / _REACH
    for _ in range(_REACH - 1):
        near = pool(near, 3, 1, 1)
        found = found + near / _REACH
    return found


def unexplained(student: Tensor, teacher: Tensor) -> Tensor:
    """The share of the variance of the teacher's map (b, c, *spatial) that no linear map of the student's (b, d, *spatial) explains, 0 to 1."""
    if student.shape[2:] != teacher.shape[2:]:
        student = F.interpolate(student, teacher.shape[2:], mode="trilinear" if teacher.dim() == 5 else "bilinear")
    S, T = (x.float().movedim(1, -1).flatten(0, -2) for x in (student, teacher.detach()))  # (voxels, channels)
    S, T = S - S.mean(0), T - T.mean(0)
    with torch.no_grad():
        gram = S.T @ S
        P = torch.linalg.solve(gram + 1e-6 * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), device=gram.device), S.T @ T)
    return (T - S @ P).square().sum() / T.square().sum().clamp(min=1e-12)


def teacher_for(run: Path, fitted: Fitted, held_out: Sequence[Case]) -> nn.Module:
    """The network of a run that may teach one for which `fitted` was fitted.

    Raises UserError where it sees other images or gives other classes, or has learnt from one of the cases that are held out.
    """
    alike = ("channels", "classes", "regions", "spacing", "intensity", "slice_axis")
    return checked_teacher(run, Fitted.load(run / FITTED), fitted, alike, [(case.name, case.label_file) for case in held_out], "label", "cases")


def checked_teacher(
    run: Path, theirs: Any, fitted: Any, alike: Sequence[str], held_out: Sequence[tuple[str, Path]], entry: str, things: str
) -> nn.Module:
    """The network of a run whose settings agree with `fitted` in `alike`, and that has learnt from none of `held_out`.

    held_out: name and file of each. entry: of cases.json, where such a file stands. things: what they are called.
    """
    for what in alike:
        if getattr(theirs, what) != getattr(fitted, what):
            raise UserError(f"distil: expected a teacher with the {what} {getattr(fitted, what)}, got {getattr(theirs, what)} of {run}")
    learnt = read_json(run / CASES)["training"]
    files, moved = {row[entry] for row in learnt}, {row["name"] for row in learnt if not Path(row[entry]).exists()}
    known = sorted(name for name, file in held_out if str(file.resolve()) in files or name in moved)
    if known:
        raise UserError(f"distil: {run} was trained on {len(known)} of the {things} that are held out, {known[0]} among them")
    return networks.load(run)
