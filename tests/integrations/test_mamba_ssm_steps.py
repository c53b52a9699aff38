"""Token by token in the stand-in: rows of longer states, rings, gradients."""

import pytest
import torch
from torch.nn import functional as F

from tests.integrations.compare import draw, gradients, same

INDICES = torch.tensor([3, -1, 0], dtype=torch.int32)  # of a batch of three among five


def test_selective_state_update_takes_rows_of_longer_states(installed):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update, selective_state_update_ref

    b, h, p, n = 3, 4, 2, 5
    states = torch.randn(5, h, p, n)
    x, dt, z, D, bias = (torch.randn(*s) for s in ((b, h, p), (b, h, p), (b, h, p), (h, p), (h, p)))
    A, B, C = -torch.rand(h, p, n), torch.randn(b, 2, n), torch.randn(b, 2, n)
    rest = (x, dt, A, B, C, D, z, bias, True)
    alone = states[INDICES].clone()
    want, expected = selective_state_update_ref(alone, *rest), states.clone()
    expected[[3, 0]], want[1] = alone[[0, 2]], 0
    same([selective_state_update(states, *rest, state_batch_indices=INDICES), states], [want, expected], 1e-5)


@pytest.mark.parametrize("kept", [3, 7])
@pytest.mark.parametrize("rows", [False, True])
def test_causal_conv1d_update_in_a_ring(installed, kept, rows):
    """Token t stands at place t % kept: fed in parts, the output is the convolution's of the whole."""
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    x, weight, bias = torch.randn(3, 6, 20), torch.randn(6, 4), torch.randn(6)
    want = causal_conv1d_fn(x, weight, bias, activation="silu")
    ring, indices = (torch.zeros(5, 6, kept), INDICES) if rows else (torch.zeros(3, 6, kept), None)
    outs = [
        causal_conv1d_update(x[..., a:b], ring, weight, bias, "silu", torch.full((3,), a, dtype=torch.int32), indices)
        for a, b in ((0, 1), (1, 6), (6, 17), (17, 20))
    ]
    got, want = torch.cat(outs, -1), want.clone()
    expected = torch.zeros_like(ring)
    for row, place in enumerate(INDICES.tolist() if rows else range(3)):
        if place < 0:
            want[row] = 0
        else:
            for t in range(20 - kept, 20):
                expected[place, :, t % kept] = x[row, :, t]
    same([got, ring], [want, expected], 1e-5)


@pytest.mark.parametrize("ref", [False, True])
def test_updates_are_differentiable_through_the_state(installed, ref):
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_update_ref
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update, selective_state_update_ref

    x, weight, bias, before = draw(2, 6, 5), draw(6, 4), draw(6), draw(2, 6, 3)
    want, final = causal_conv1d_fn(x, weight, bias, initial_states=before, return_final_states=True, activation="silu")
    state = before * 1.0
    update = causal_conv1d_update_ref if ref else causal_conv1d_update
    got = torch.stack([update(x[..., t], state, weight, bias, "silu") for t in range(5)], -1)
    same([got, state], [want, final])
    same(gradients(got, (x, weight, bias, before)), gradients(want, (x, weight, bias, before)))
    same(gradients(state, (x,)), gradients(final, (x,)))

    u, dt, B, C, z = draw(2, 6, 5), draw(2, 6, 5), draw(2, 3, 5), draw(2, 3, 5), draw(2, 6, 5)
    A, D, bias = (-torch.rand(6, 3).double()).requires_grad_(), draw(6), draw(6)
    want, final = selective_scan_fn(u, dt, A, B, C, D, z, bias, True, True)
    state = torch.zeros(2, 6, 3, dtype=torch.float64)
    update = selective_state_update_ref if ref else selective_state_update
    got = torch.stack([update(state, u[..., t], dt[..., t], A, B[..., t], C[..., t], D, z[..., t], bias, True) for t in range(5)], -1)
    leaves = (u, dt, A, B, C, D, z, bias)
    same([got, state], [want, final])
    same(gradients(got, leaves), gradients(want, leaves))
    same(gradients(state, leaves[:4]), gradients(final, leaves[:4]))


def test_the_last_tokens_of_packed_sequences(installed):
    from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states, causal_conv1d_varlen_states_ref

    x, ends = draw(9, 4), torch.tensor([0, 5, 5, 7, 9], dtype=torch.int32)
    want = torch.stack([F.pad(x[a:b].T, (3, 0))[:, -3:] for a, b in ((0, 5), (5, 5), (5, 7), (7, 9))])
    for function in (causal_conv1d_varlen_states, causal_conv1d_varlen_states_ref):
        got = function(x, ends, 3).contiguous()
        same([got], [want])
        same(gradients(got, (x,)), gradients(want, (x,)))
