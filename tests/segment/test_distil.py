"""Distillation: nothing to learn from a teacher that says the same, and what a teacher says otherwise is learnt."""

import copy
import math

import pytest
import torch
from torch import nn

from medssm.segment.distil import Distillation, nearness, unexplained
from medssm.segment.losses import RegionLoss, SegmentationLoss
from tests.compress.networks import network_of


class Nothing(nn.Module):
    """A criterion that leaves the teacher's part of the loss alone."""

    def forward(self, output, label):
        return output[0].sum() * 0 if isinstance(output, list) else output.sum() * 0


class Regions(RegionLoss):
    """The same for regions."""

    def forward(self, output, label):
        return output[0].sum() * 0


@pytest.mark.parametrize("criterion", [Nothing(), Regions([[1], [1, 2], [2]], 3)])
def test_a_student_that_equals_its_teacher_has_no_gradient(criterion):
    student, x = network_of("medssm_unet none")
    teacher, label = copy.deepcopy(student), torch.randint(0, 3, (2, 1, 16, 16))
    for module in student.modules():  # norms with the statistics that the teacher has
        module.training = not isinstance(module, nn.BatchNorm2d)
    loss = Distillation(criterion, student, teacher, features=1.0)
    value = loss(student(x), label)
    value.backward()
    assert abs(value.item()) < 1e-5
    assert max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) < 1e-5
    assert all(p.grad is None for p in teacher.parameters())


def test_the_logits_term_is_the_divergence_by_hand():
    student, teacher = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)
    x, label = torch.rand(1, 1, 6, 6), torch.zeros(1, 1, 6, 6, dtype=torch.long)
    loss = Distillation(Nothing(), student, teacher, temperature=3.0, logits=0.5)
    found = loss(student(x), label)
    t, s = (network(x).div(3).softmax(1) for network in (teacher, student))
    torch.testing.assert_close(found, 0.5 * 9 * (t * (t / s).log()).sum(1).mean())


def test_voxels_near_a_border_count_more():
    label = torch.zeros(1, 1, 1, 12, dtype=torch.long)
    label[..., 6:] = 2
    assert nearness(label).flatten().tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert nearness(torch.ones(1, 1, 4, 4, 4)).max() == 0


def test_features_that_say_the_same_leave_nothing_unexplained():
    torch.manual_seed(0)
    student = torch.randn(2, 6, 8, 8)
    teacher = torch.einsum("oi,bixy->boxy", torch.randn(9, 6), student) + 3
    assert unexplained(student, teacher) < 1e-4
    assert 0.7 < unexplained(student, torch.randn(2, 9, 8, 8)) <= 1
    assert unexplained(student[..., ::2, ::2], teacher) < 1


def test_a_student_comes_nearer_to_its_teacher():
    torch.manual_seed(0)
    student, x = network_of("medssm_unet none")
    teacher, _ = network_of("medssm_unet linear_attention")
    label = torch.randint(0, 3, (2, 1, 16, 16))
    loss, optimizer = Distillation(SegmentationLoss(), student.train(), teacher), torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        value = loss(student(x), label)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert math.isfinite(losses[-1]) and losses[-1] < 0.9 * losses[0]


def test_a_copy_in_evaluation_gives_the_loss_no_images():
    student, x = network_of("medssm_unet none")
    loss = Distillation(SegmentationLoss(), student, copy.deepcopy(student))
    copy.deepcopy(student).eval()(x)
    student.eval()(x)
    assert loss._seen == {}
