"""The CPU kernel of depthwise_conv against its reference: every instruction set, box and tile borders, kernels of many shapes."""

from __future__ import annotations

import pytest
import torch

import medssm
from medssm.kernels.depthwise_conv import native, reference

# Around the kernel's tiles (2 x 4 or 2 x 8 outputs) and boxes (16 x 8 x 32), and axes shorter than the kernel's half.
VOLUMES = [(1, 1, 1), (1, 2, 9), (3, 5, 8), (17, 9, 33), (2, 17, 40), (33, 1, 4)]
IMAGES = [(1, 1), (8, 33), (9, 65), (1, 70)]
SEQUENCES = [(1,), (7,), (513,)]


def inputs(batch, spatial, channels, kernel, dtype=torch.float64):
    g = torch.Generator().manual_seed(sum(spatial) * 31 + sum(kernel))
    shapes = ((batch, *spatial, channels), (channels, *kernel), (channels,), (batch, *spatial, channels))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def check(x, weight, bias, activation, dout, tolerance):
    """Output and all gradients equal the float64 reference's."""
    got = [native.forward(x, weight, bias, activation), *native.backward(dout, x, weight, bias, activation)]
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    out = reference.depthwise_conv(*leaves, activation)
    gradients = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], dout.double()))
    want = [out, *(None if t is None else next(gradients) for t in leaves)]
    for name, g, w in zip(("out", "dx", "dweight", "dbias"), got, want, strict=True):
        assert (g is None) == (w is None), name
        if g is not None:
            error = (g.double() - w).abs().max() / w.abs().max().clamp_min(1e-3)
            assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    "spatial, kernel",
    [
        *[(s, (3, 3, 3)) for s in VOLUMES],
        ((5, 6, 9), (1, 5, 7)),
        ((6, 5, 11), (5, 3, 1)),
        ((4, 5, 12), (7, 1, 9)),
        ((2, 3, 2), (5, 7, 11)),
        *[(s, (3, 3)) for s in IMAGES],
        *[(s, (7, 7)) for s in IMAGES],
        ((20, 30), (5, 5)),
        ((6, 9), (1, 3)),
        *[(s, (3,)) for s in SEQUENCES],
        *[(s, (9,)) for s in SEQUENCES],
    ],
)
def test_equals_the_reference(isa, spatial, kernel):
    x, weight, bias, dout = inputs(2, spatial, 19, kernel)
    check(x, weight, bias, "silu", dout, 1e-12)


@pytest.mark.parametrize("channels", [1, 7, 16, 48, 150])
def test_channels_fill_vectors_or_not(isa, channels):
    x, weight, bias, dout = inputs(1, (3, 5, 9), channels, (3, 3, 3), torch.float32)
    check(x, weight, bias, "silu", dout, 2e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_storage_computes_in_float32(isa, dtype, tolerance):
    x, weight, bias, dout = inputs(2, (6, 7, 8), 20, (3, 3, 3), dtype)
    check(x, weight, bias, "silu", dout, tolerance)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_absent_arguments(activation):
    x, weight, _, dout = inputs(1, (4, 5, 6), 5, (3, 3, 3))
    check(x, weight, None, activation, dout, 1e-12)


def test_outputs_written_past_the_caches_are_complete():
    """Beyond 16 MB, with whole cache lines (AVX-512), results bypass the caches. A slab that is small enough not to must be the same,
    but for its last planes: out sees one plane further, dx two."""
    x, weight, bias, dout = inputs(1, (40, 56, 64), 32, (3, 3, 3), torch.float32)
    torch.set_num_threads(2)
    large = [native.forward(x, weight, bias, "silu"), native.backward(dout, x, weight, bias, "silu")[0]]
    upper = [native.forward(x[:, :8], weight, bias, "silu"), native.backward(dout[:, :8], x[:, :8], weight, bias, "silu")[0]]
    for whole, part, halo in zip(large, upper, (1, 2), strict=True):
        assert torch.equal(whole[:, : 8 - halo], part[:, : 8 - halo])


def test_empty_tensors():
    for spatial, channels in (((0, 4), 3), ((4, 4), 0)):
        x, weight, bias, dout = inputs(2, spatial, channels, (3, 3), torch.float32)
        assert native.forward(x, weight, bias, "silu").shape == x.shape
        dx, dweight, dbias = native.backward(dout, x, weight, bias, "silu")
        assert dx.shape == x.shape and not dweight.any() and not dbias.any()


def test_more_than_three_axes_are_refused():
    x, weight, bias, _ = inputs(1, (2, 2, 2, 2), 3, (3, 3, 3, 3))
    with pytest.raises(ValueError, match="three spatial axes"):
        medssm.ops.depthwise_conv(x, weight, bias, backend="native")


def test_the_same_bits_for_any_number_of_threads():
    x, weight, bias, dout = inputs(2, (20, 17, 40), 40, (3, 3, 3), torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append([native.forward(x, weight, bias, "silu"), *native.backward(dout, x, weight, bias, "silu")])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
