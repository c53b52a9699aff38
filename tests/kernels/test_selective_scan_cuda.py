"""What is special about the CUDA kernels of selective scan: chunks of time, shapes of blocks. On a GPU, or emulated (test_slow_backends.py)."""

from __future__ import annotations

import pytest
import torch

from medssm import ops, orders
from medssm.kernels import cuda
from medssm.kernels.selective_scan import cuda as scan
from tests.ops.calls import compare

pytestmark = pytest.mark.skipif(cuda.reason() is not None, reason=f"no CUDA library to run: {cuda.reason()}")
thorough = pytest.mark.thorough  # for `make test-all` alone


@pytest.fixture
def many_chunks(monkeypatch):
    """Time is cut into as many chunks as there can be."""
    monkeypatch.setattr(scan, "ENOUGH", 10**9)
    monkeypatch.setattr(scan, "WANTED", 10**9)


def inputs(length, channels, state, dtype=torch.float32, rank=None, groups=1):
    g = torch.Generator().manual_seed(length + state)

    def normal(*shape):
        return torch.randn(shape, generator=g).to(dtype).to(cuda.DEVICE)

    tensors = {
        "u": normal(2, length, channels),
        "delta": normal(2, length, rank or channels),
        "B": normal(2, length, groups, state),
        "C": normal(2, length, groups, state),
        "D": normal(channels),
        "z": normal(2, length, channels),
        "delta_bias": normal(channels),
        "initial_state": normal(2, channels, state),
        "A": -torch.rand(channels, state, generator=g).to(dtype).to(cuda.DEVICE),
    }
    return tensors | ({} if rank is None else {"delta_proj": normal(channels, rank)})


def results(tensors, backend, **options):
    leaves = {k: t.detach().clone().requires_grad_() for k, t in tensors.items()}
    out, state = ops.selective_scan(**leaves, delta_softplus=True, return_final_state=True, backend=backend, **options)
    cotangents = [torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view_as(t).bfloat16().to(t) for t in (out, state)]
    gradients = torch.autograd.grad([out, state], list(leaves.values()), cotangents)
    return {"out": out.detach(), "state": state.detach()} | {f"gradient of {k}": g for k, g in zip(leaves, gradients, strict=True)}


def agree(tensors, forward=2e-6, gradient=2e-5, **options):
    wide = {k: t.double() for k, t in tensors.items()}
    compare(results(tensors, "cuda", **options), results(wide, "reference", **options), forward, gradient)


@pytest.mark.parametrize("state", [1, 5, 16, 17, 129, *(pytest.param(state, marks=thorough) for state in (2, 4, 8, 9, 64, 128, 256))])
def test_every_number_of_states_over_several_chunks(state, many_chunks):
    agree(inputs(150, 5, state), reverse=state % 2 == 1)


@pytest.mark.parametrize("length", [1, 64, 65, 300, *(pytest.param(length, marks=thorough) for length in (63, 128, 1100))])
def test_lengths_on_both_sides_of_chunks(length, many_chunks):
    """1,100 steps make 18 chunks: more than one pass of `carry` reads ahead."""
    agree(inputs(length, 3, 16))


@pytest.mark.parametrize(
    "channels, groups", [(1, 1), (49, 1), (96, 2), *(pytest.param(*sizes, marks=thorough) for sizes in ((33, 1), (48, 1), (96, 1), (130, 2)))]
)
def test_tiles_of_channels(channels, groups, many_chunks):
    agree(inputs(70, channels, 16, groups=groups))


@pytest.mark.parametrize("state", [1, 8, 16])
def test_a_low_rank_step(state, many_chunks):
    agree(inputs(200, 70, state, rank=3))


@pytest.mark.parametrize("order", [orders.window(4), orders.dilated(3), orders.window(2, reverse=True), orders.hilbert(), orders.window(1)])
def test_states_that_begin_anew_inside_chunks_and_at_their_borders(order, many_chunks):
    tensors = inputs(16 * 20, 5, 16)
    shaped = {k: t.view(2, 16, 20, *t.shape[2:]) if k in ("u", "delta", "B", "C", "z") else t for k, t in tensors.items()}
    agree(shaped, order=order)


def test_float64(many_chunks):
    for state in (3, 16, 40):
        agree(inputs(140, 9, state, torch.float64, rank=2), 1e-12, 1e-11)


def test_one_chunk_and_many_agree(monkeypatch):
    tensors = inputs(500, 48, 16)
    one = results(tensors, "cuda")
    monkeypatch.setattr(scan, "ENOUGH", 10**9)
    compare(results(tensors, "cuda"), one, 2e-6, 2e-5)


def test_small_scans_of_many_channels_take_one_pass():
    assert scan._chunk(262144, 16, scan.ENOUGH) == 262144  # enough blocks for a GPU
    assert scan._chunk(262144, 16, 2) == 512  # 64^3 tokens of 96 channels: 512 chunks of two tiles
    assert scan._chunk(100, 16, 1) == 64 and scan._chunk(50, 16, 1) == 50
