"""cu_seqlens: packed sequences give what each sequence gives on its own, on every op that walks and every backend of this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medssm import ops, orders
from medssm.ops.op import OPS as DECLARED
from tests.ops.calls import DEVICE, compare, flat, normal
from tests.ops.cases import available, tokens
from tests.ops.packed import OPS, apart, initial_states, packed, single

PAIRS = [(op, backend) for op, backend in available() if op in OPS]
every = pytest.mark.parametrize("op, backend", PAIRS)
every_op = pytest.mark.parametrize("op", OPS)


@every
@given(data=st.data())
def test_each_sequence_is_on_its_own(op, backend, data):
    call = data.draw(packed(op)).to(torch.float32)
    compare(call.results(backend), apart(call.to(torch.float64)).results("reference"), 2e-5, 1e-4)


@pytest.mark.parametrize("op, backend", [pair for pair in PAIRS if pair[1] != "triton"])  # it has no float64
@settings(max_examples=8)
@given(data=st.data())
def test_in_float64_too(op, backend, data):
    call = data.draw(packed(op, small=True))
    compare(call.results(backend), apart(call).results("reference"), 1e-10, 1e-9)


@every
def test_many_short_sequences(op, backend):
    """One token, none, and the ends of tiles and of chunks among them."""
    bounds = torch.tensor([0, 0, 1, 2, 2, 3, 64, 65, 128, 128, 130, 200, 200], device=DEVICE)
    call = single(op, 200, len(bounds) - 1).with_options(cu_seqlens=bounds)
    compare(call.results(backend), apart(call.to(torch.float64)).results("reference"), 2e-5, 1e-4)


@every
@pytest.mark.parametrize("empty", [False, True])
def test_bounds_of_any_type_and_stride(op, backend, empty):
    bounds = torch.tensor([0, 64, 64 if empty else 65, 200], device=DEVICE)
    call = single(op, 200, 3)
    want = call.run(backend, cu_seqlens=bounds)
    apart_in_memory = bounds.repeat_interleave(2)[::2]
    for same in (bounds.int(), apart_in_memory, apart_in_memory.int()):
        for got, value in zip(flat(call.run(backend, cu_seqlens=same)), flat(want), strict=True):
            torch.testing.assert_close(got, value, atol=0, rtol=0)


def plain_scan(bounds):
    """A call of the scan that can go straight to its CPU kernel."""
    u, delta, z = (normal((1, 200, 24), seed).float() for seed in range(3))
    B, C = (normal((1, 200, 16), seed).float() for seed in (3, 4))
    return ops.selective_scan(u, delta, -normal((24, 16), 5).abs().float(), B, C, z=z, delta_softplus=True, cu_seqlens=bounds, backend="native")


def test_the_shortest_way_of_the_scan_takes_packed_sequences(monkeypatch):
    """A plain call on the CPU goes straight to the kernel, with the very bits of the long way."""
    bounds = torch.tensor([0, 64, 65, 200])
    want = plain_scan(bounds.int())
    monkeypatch.setattr(DECLARED["selective_scan"], "_outputs", lambda *_: pytest.fail("it took the long way"))
    torch.testing.assert_close(plain_scan(bounds), want, atol=0, rtol=0)


@pytest.mark.parametrize("bounds", [[0, 200, 64, 200], [0, 64, 201], [0, 64, 199], [1, 64, 200], [-1, 200]])
def test_the_shortest_way_refuses_what_the_long_way_refuses(bounds):
    for dtype in (torch.int64, torch.int32):
        with pytest.raises(ValueError, match=r"cu_seqlens: expected to rise from 0 to 200"):
            plain_scan(torch.tensor(bounds, dtype=dtype))


@every
def test_an_order_that_begins_anew_does_so_within_each_sequence(op, backend):
    """Two stacked images of two windows each: four segments. States are those of a sequence, not of a segment."""
    call = single(op, 16, sequences=2)
    images = call.but(**{name: t.unflatten(1, (8, 2)) for name, t in tokens(call).items()}).with_options(order=orders.window(2, axes=(0, 1)))
    got = flat(images.run(backend, cu_seqlens=torch.tensor([0, 8, 16], device=DEVICE)))
    found = []
    for i in range(2):
        mine = {name: t[:, 4 * i : 4 * i + 4] for name, t in tokens(images).items()}
        mine |= {name: t[i : i + 1] for name, t in initial_states(images).items()}
        found.append(flat(images.but(**mine).run("reference")))
    out, *states = zip(*found, strict=True)
    for g, w in zip(got, (torch.cat(out, 1), *map(torch.cat, states)), strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)


@every
def test_one_sequence_is_the_plain_call(op, backend):
    call = single(op)
    got = call.run(backend, cu_seqlens=torch.tensor([0, 13], dtype=torch.int32, device=DEVICE))
    for g, w in zip(flat(got), flat(call.run(backend)), strict=True):
        torch.testing.assert_close(g, w)


BAD = {
    "a list": ([0, 13], TypeError, r"cu_seqlens: expected an int32 or int64 tensor \(n \+ 1,\), got list"),
    "floats": (torch.tensor([0.0, 13.0]), ValueError, r"cu_seqlens: expected an int32 or int64 tensor .*, got float32 \(2,\)"),
    "two axes": (torch.tensor([[0, 13]]), ValueError, r"cu_seqlens: .* got int64 \(1, 2\)"),
    "no sequence": (torch.tensor([0]), ValueError, r"cu_seqlens: .* with n at least 1, got int64 \(1,\)"),
    "too short": (torch.tensor([0, 12]), ValueError, r"cu_seqlens: expected to rise from 0 to 13, the number of tokens, got \[0, 12\]"),
    "late": (torch.tensor([1, 13]), ValueError, r"cu_seqlens: expected to rise from 0 to 13, the number of tokens, got \[1, 13\]"),
    "another device": (torch.tensor([0, 13], device="meta"), ValueError, "cu_seqlens: expected device cpu, where the tokens are, got meta"),
}


@pytest.mark.parametrize("case", BAD)
@every_op
def test_what_is_no_such_tensor_is_refused(op, case):
    value, error, message = BAD[case]
    with pytest.raises(error, match=message):
        single(op).run(None, cu_seqlens=value)


@every_op
def test_bounds_that_fall_a_batch_and_too_few_states_are_refused(op):
    call = single(op, sequences=3)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected to rise from 0 to 13, the number of tokens, got \[0, 9, 4, 13\]"):
        call.run(None, cu_seqlens=torch.tensor([0, 9, 4, 13]))
    if DECLARED[op].states:
        with pytest.raises(ValueError, match=r"initial_state: expected \(2, .*\), got \(3, "):
            call.run(None, cu_seqlens=torch.tensor([0, 4, 13]))
    two = call.but(**{name: torch.cat([t, t]) for name, t in tokens(call).items()})
    with pytest.raises(ValueError, match=r"\w: expected \(1, .*\), got \(2, "):
        two.run(None, cu_seqlens=torch.tensor([0, 4, 4, 13]))


def test_packed_linear_attention_is_causal():
    with pytest.raises(ValueError, match="cu_seqlens: expected causal=True with packed sequences, got causal=False"):
        single("linear_attention").run(None, causal=False, cu_seqlens=torch.tensor([0, 13]))


FIRST = "selective_scan", "delta_rule"  # of operators that are all made by one function


@pytest.mark.parametrize("op", [pytest.param(op, marks=() if op in FIRST else pytest.mark.thorough) for op in OPS if (op, "native") in PAIRS])
def test_the_compiled_call_takes_other_sequences(op):
    """One program for any bounds: they are an input, and states have a row for each."""
    torch._dynamo.reset()
    call = single(op)
    for state in initial_states(call):
        call.tensors.pop(state)
    first = next(iter(call.tensors))

    def run(x, bounds):
        return call.but(**{first: x}).run("native", cu_seqlens=bounds)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for bounds in (torch.tensor([0, 4, 13]), torch.tensor([0, 5, 5, 13])):
        torch.testing.assert_close(compiled(call.tensors[first], bounds), run(call.tensors[first], bounds))


def test_vmap_over_packed_sequences_is_refused():
    q, g = torch.rand(3, 1, 4, 2, 5), -torch.rand(3, 1, 4, 2)
    bounds = torch.tensor([0, 1, 4])
    with pytest.raises(ValueError, match="cu_seqlens: vmap over packed sequences is not supported"):
        torch.vmap(lambda q, g: ops.gated_linear_attention(q, q, q, g, cu_seqlens=bounds, backend="native"))(q, g)
