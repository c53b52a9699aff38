"""The CPU kernel of the delta rule against its reference: every instruction set; borders of blocks, tiles, chunks, lanes and segments."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from medssm.kernels.delta_rule import native, reference

BLOCK, TILE, CHUNK = 4, 64, 256  # steps: of a sweep, of a tile of the walk, and between the points where the gradient of g begins anew


def inputs(batch, length, heads, dk, dv, gated=True, dtype=torch.float64, decay=1.0):
    generator = torch.Generator().manual_seed(length * 31 + dk)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = (batch, length, heads)
    k, beta = functional.normalize(draw(*tokens, dk), dim=-1), torch.sigmoid(draw(*tokens))
    tensors = draw(*tokens, dk), k, draw(*tokens, dv), beta, -decay * draw(*tokens).abs() if gated else None, draw(batch, heads, dk, dv)
    return [None if t is None else t.to(dtype) for t in tensors]


def check(tensors, index=None, starts=None, reverse=False, tolerance=1e-11, last=True):
    """Outputs and all gradients equal the float64 reference's."""
    *tokens, initial = tensors
    walk, dout = (index, starts, reverse, initial), torch.linspace(-1, 1, tokens[2].numel(), dtype=tokens[2].dtype).view_as(tokens[2]).cos()
    dstate = torch.randn(initial.shape, generator=torch.Generator().manual_seed(0), dtype=initial.dtype) if last else None
    out, state, recalled = native.forward(*tokens, 0.5, *walk, True, True)
    got = [out, state, *native.backward(dout, dstate, recalled, *tokens, 0.5, *walk)]
    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    want = reference.delta_rule(*leaves[:5], 0.5, index, starts, reverse, leaves[5])
    given = [t for t in leaves if t is not None]
    cotangents = [dout.double(), torch.zeros_like(want[1]) if dstate is None else dstate.double()]
    gradients = iter(torch.autograd.grad(want, given, cotangents, allow_unused=True, materialize_grads=True))
    want = [*want, *(None if t is None else next(gradients) for t in leaves)]
    for name, g, w in zip(("out", "state", "dq", "dk", "dv", "dbeta", "dg", "dinitial"), got, want, strict=True):
        assert (g is None) == (w is None), name
        if g is not None and g.numel():
            error = (g.double() - w).abs().max() / w.abs().max().clamp_min(1e-3)
            assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [*range(1, 2 * BLOCK + 2), TILE - 1, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_equals_the_reference_at_every_length(isa, length, gated):
    check(inputs(1, length, 2, 3, 5, gated), last=length % 2 == 0)


@pytest.mark.parametrize("dk, dv", [(1, 1), (2, 15), (15, 16), (17, 7), (8, 31), (32, 32), (33, 33), (5, 48), (48, 5), (64, 65), (100, 3)])
def test_equals_the_reference_at_every_width(isa, dk, dv):
    check(inputs(2, 11, 3, dk, dv))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "starts",
    [
        [0, 1, 2, 3, 4],
        [0, 5],
        [2],
        [TILE],
        [TILE - 1, TILE + 1],
        [CHUNK - 1],
        [CHUNK],
        [CHUNK + 1, CHUNK + 2],
        [2 * CHUNK - 1],
        [*range(0, 2 * CHUNK, 7)],
    ],
)
def test_the_state_begins_anew_at_every_start(starts, reverse):
    length = 2 * CHUNK
    index = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    check(inputs(1, length, 1, 4, 5), index, torch.tensor(starts), reverse)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_storage_types(isa, dtype, tolerance):
    check(inputs(2, 37, 2, 19, 21, dtype=dtype), tolerance=tolerance)


@pytest.mark.parametrize("decay", [0.001, 0.1, 3.0, 30.0])
def test_the_gradient_of_the_decay_keeps_its_digits(decay):
    """Over a long walk in float32, and where it is far smaller than what it is the difference of."""
    check(inputs(1, 3000, 1, 8, 8, dtype=torch.float32, decay=decay), tolerance=1e-5)


def test_any_number_of_threads_gives_the_same_bits():
    tensors = inputs(2, 400, 2, 40, 40, dtype=torch.float32)
    *tokens, initial = tensors
    walk = (None, None, False, initial)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, state, recalled = native.forward(*tokens, 0.5, *walk, True, True)
        results.append([out, state, recalled, *native.backward(out, state, recalled, *tokens, 0.5, *walk)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
