"""Laws of bi_wkv, and upstream's arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch

from medssm import ops, orders
from tests.ops.calls import DEVICE, compare, normal
from tests.ops.cases import available

every = pytest.mark.parametrize("backend", [backend for op, backend in available() if op == "bi_wkv"])
both = pytest.mark.parametrize("mode", ["exact", "upstream"])


def draw(length, decay, batch=2, channels=5, scale=1.0):
    """w, u, k, v in float32."""
    shape = (batch, length, channels)
    tensors = (normal((channels,), length, decay), normal((channels,), 1), normal(shape, 2, scale), normal(shape, 3))
    return [t.float() for t in tensors]


def dense(w, u, k, v):
    """The softmax over the distance kernel, (b, l, l, d)."""
    steps = torch.arange(k.shape[1], device=DEVICE)
    distance = (steps[:, None] - steps).abs()[..., None]
    weights = torch.where(distance == 0, (u + k)[:, None], k[:, None] - (distance - 1) * w)
    return (torch.softmax(weights, 2) * v[:, None]).sum(2)


@every
@pytest.mark.parametrize("decay", [0.0, 0.02, 1.0, -0.02, -1.0])
def test_equals_softmax_over_the_distance_kernel(backend, decay):
    w, u, k, v = draw(75, 1.0)
    w = w.abs() * decay
    compare({"output": ops.bi_wkv(w, u, k, v, backend=backend)}, {"output": dense(*(t.double() for t in (w, u, k, v)))}, 2e-6, 0)


@every
@both
def test_without_decay_it_is_an_average_with_a_bonus_for_oneself(backend, mode):
    _, u, k, v = draw(70, 0.0)
    others, own = torch.exp(k).sum(1, True) - torch.exp(k), torch.exp(u + k)
    want = ((torch.exp(k) * v).sum(1, True) - torch.exp(k) * v + own * v) / (others + own)
    got = ops.bi_wkv(torch.zeros_like(u), u, k, v, mode=mode, backend=backend)
    compare({"output": got}, {"output": want}, 5e-6, 0)  # upstream's eps is 1e-6


@every
@both
@pytest.mark.parametrize("sign", [1, -1])
def test_decays_of_any_sign_and_size_give_finite_numbers(backend, mode, sign):
    w, u, k, v = draw(500, 1.0, batch=1, channels=7)
    for size in (1e-4, 0.05, 20.0) if mode == "exact" else (1e-4, 0.02):
        leaves = [t.clone().requires_grad_() for t in (sign * size * w.abs(), u, 3 * k, v)]
        out = ops.bi_wkv(*leaves, mode=mode, backend=backend)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        assert all(torch.isfinite(t).all() for t in (out, *gradients))
        if mode == "exact":
            assert out.abs().max() <= v.abs().max() * (1 + 1e-6)  # a weighted mean


@every
@pytest.mark.parametrize("value", [-1e9, 1e9, torch.finfo(torch.float32).min])
def test_keys_as_large_as_a_mask_has_them(backend, value):
    """What is masked with a huge negative key has no weight; where nothing else is, all have the same."""
    w, u, k, v = draw(9, 0.1)
    k[:, ::2] = value
    leaves = [t.clone().requires_grad_() for t in (w, u, k, v)]
    out = ops.bi_wkv(*leaves, backend=backend)
    assert all(torch.isfinite(t).all() for t in (out, *torch.autograd.grad(out.sum(), leaves)))
    assert torch.isfinite(ops.bi_wkv(w, u, torch.full_like(k, value), v, backend=backend)).all()


@every
def test_a_flipped_sequence_gives_the_flipped_output(backend):
    w, u, k, v = draw(41, 0.2)
    got = ops.bi_wkv(w, u, k.flip(1), v.flip(1), backend=backend)
    compare({"output": got.flip(1)}, {"output": ops.bi_wkv(w, u, k, v, backend=backend)}, 2e-6, 0)


@every
@both
def test_segments_of_an_order_do_not_see_each_other(backend, mode):
    shape, order = (6, 7), orders.window(3)
    w, u, _, _ = draw(5, 0.05)
    k, v = normal((2, *shape, 5), 4).float(), normal((2, *shape, 5), 5).float()
    got = ops.bi_wkv(w, u, k, v, mode=mode, order=order, backend=backend).flatten(1, 2)
    index, ends = order.index(shape), [*order.starts(shape).tolist(), 42]
    for begin, end in itertools.pairwise(ends):
        tokens = index[begin:end].to(DEVICE)
        want = ops.bi_wkv(w, u, k.flatten(1, 2)[:, tokens], v.flatten(1, 2)[:, tokens], mode=mode, backend=backend)
        compare({"output": got[:, tokens]}, {"output": want}, 2e-6, 0)


@every
@pytest.mark.parametrize("length", [1, 7, 32, 33, 64, 100, 1030])
def test_upstream_equals_the_published_kernels(backend, length):
    w, u, k, v = draw(length, 1.0, batch=1, channels=3)
    w, u = w * 5 / length, u * 5 / length
    want = published(*(t.double() for t in (w, u, k, v)))
    compare({"output": ops.bi_wkv(w, u, k, v, mode="upstream", backend=backend)}, {"output": want}, 2e-5, 0)


def test_gradients_of_upstream_are_those_of_its_function():
    leaves = [t.double().requires_grad_() for t in draw(70, 0.02, batch=1, channels=2)]
    torch.autograd.gradcheck(lambda *ts: ops.bi_wkv(*ts, mode="upstream", backend="reference"), leaves, fast_mode=True, atol=1e-5)


def published(w, u, k, v, chunks=32, eps=1e-6):
    """The published kernels as they go, chunk by chunk: sums with their running maximum; what is ahead is the whole, less a token a step."""
    batch, length, channels = k.shape
    size = -(-length // chunks)
    zero = torch.zeros(batch, channels, dtype=k.dtype)
    none = (zero - 1e38, zero, zero)

    def add(sums, exponent, a, b):
        top = torch.maximum(sums[0], exponent)
        kept, fresh = torch.exp(sums[0] - top), torch.exp(exponent - top)
        return top, kept * sums[1] + fresh * a, kept * sums[2] + fresh * b

    starts = range(0, length, size)
    before, ahead = [], []
    for s in starts:
        end, to_end, to_start = min(s + size, length), none, none
        for i in range(s, end):
            to_start = add(to_start, k[:, i] - w * (i - s), v[:, i], 1.0)
            to_end = add(to_end, k[:, i] - w * (end - i), v[:, i], 1.0)
        before.append(to_end)
        ahead.append(to_start)
    outputs = []
    for c, s in enumerate(starts):
        past, future = none, none
        for i in range(c):
            past = add(past, before[i][0] - w * (c - i - 1) * size, *before[i][1:])
        for i in range(c, len(ahead)):
            future = add(future, ahead[i][0] - w * (i - c) * size, *ahead[i][1:])
        gone = torch.exp(k[:, s] - future[0])
        future = (future[0], future[1] - gone * v[:, s], future[2] - gone)
        for t in range(s, min(s + size, length)):
            total = add(add(past, *future), u + k[:, t], v[:, t], 1.0)
            outputs.append(total[1] / (total[2] + eps))
            past = add((past[0] - w, *past[1:]), k[:, t], v[:, t], 1.0)
            if t + 1 < length:
                future = add((future[0] + w, *future[1:]), k[:, t + 1] + w, -v[:, t + 1], -1.0)
    return torch.stack(outputs, 1)
