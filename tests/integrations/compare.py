"""Random inputs, their gradients, and a comparison of several tensors at once."""

import torch


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def gradients(out, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad((out * torch.randn_like(out)).sum(), [t for t in inputs if t is not None and t.requires_grad], retain_graph=True)


def same(got, want, tolerance=1e-9):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
