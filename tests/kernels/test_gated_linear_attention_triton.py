"""The Triton kernels of the matrix-state recurrences over several chunks: edges, starts, tiles, decays that forget everything."""

import pytest
import torch

from medssm.kernels import triton

if triton.reason() is not None:
    pytest.skip(triton.reason(), allow_module_level=True)

from medssm.kernels.gated_linear_attention import reference
from medssm.kernels.gated_linear_attention import triton as kernel


def compare_with_the_reference(length, heads, dk, dv, per_key, starts=None, reverse=False, strongest=None):
    generator = torch.Generator().manual_seed(length)

    def new(*shape):
        return torch.randn(shape, generator=generator)

    q, k, v = new(1, length, heads, dk), new(1, length, heads, dk), new(1, length, heads, dv)
    g = torch.nn.functional.logsigmoid(new(1, length, heads, dk) if per_key else new(1, length, heads))
    if strongest is not None:
        g = g.where(torch.rand(g.shape, generator=generator) > 0.1, strongest)
    initial = new(1, heads, dk, dv)
    index = None if starts is None else torch.randperm(length, generator=generator)
    way = (index, None if starts is None else torch.tensor(starts), reverse)
    exact = [t.double().requires_grad_() for t in (q, k, v, g, initial)]
    out, state = reference.gated_linear_attention(*exact[:4], 0.3, *way, exact[4])
    dout, dstate = new(*out.shape), new(*state.shape)
    wanted = (out, state, *torch.autograd.grad((out * dout).sum() + (state * dstate).sum(), exact))
    given = [t.to(triton.DEVICE) for t in (q, k, v, g)]
    way = (*(None if t is None else t.to(triton.DEVICE) for t in way[:2]), reverse)
    initial, dout, dstate = (t.to(triton.DEVICE) for t in (initial, dout, dstate))
    found = kernel.forward(*given, 0.3, *way, initial, True)
    found += kernel.backward(dout, dstate, *given, 0.3, *way, initial)
    for name, x, y in zip(("out", "state", "dq", "dk", "dv", "dg", "dinitial"), found, wanted, strict=True):
        error = (x.cpu().double() - y).abs().max() / y.abs().max().clamp_min(1e-30)
        assert error < 2e-6, (name, float(error))


@pytest.mark.parametrize("per_key", [False, True])
def test_several_chunks_equal_the_reference(per_key):
    compare_with_the_reference(131, 2, 20, 33, per_key)


@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_starts_inside_and_at_the_edges_of_chunks_and_blocks(per_key, reverse):
    compare_with_the_reference(129, 1, 5, 7, per_key, [0, 16, 40, 41, 64, 128], reverse)


@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("strongest", [-50.0, float("-inf")])
def test_decays_that_forget_everything_leave_the_others_exact(per_key, strongest):
    """A difference of cumulated sums would lose what a strong decay before it had taken."""
    compare_with_the_reference(100, 1, 20, 5, per_key, strongest=strongest)


@pytest.mark.parametrize("per_key", [False, True])
def test_the_gradient_of_a_strong_decay_is_as_exact_as_any(per_key):
    """Of the final state alone: 0 where nothing comes before, and for each of many tokens within 1e-5 of its own value, some 1e-22."""
    for length in (1, 70):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn((1, length, 1, 8), generator=generator) for _ in range(3))
        g = torch.full((1, length, 1, 8) if per_key else (1, length, 1), -50.0)
        dstate = 10 * torch.randn((1, 1, 8, 8), generator=generator)
        exact = [t.double().requires_grad_() for t in (q, k, v, g)]
        want = torch.autograd.grad((reference.gated_linear_attention(*exact, 0.3)[1] * dstate).sum(), exact[3])[0]
        given = [t.to(triton.DEVICE) for t in (torch.zeros_like(v), dstate, q, k, v, g)]
        found = kernel.backward(*given, 0.3, None, None, False, None)[3].cpu().double()
        assert ((found - want).abs() <= 1e-5 * want.abs() + 1e-35).all(), (length, (found - want).abs().max())
