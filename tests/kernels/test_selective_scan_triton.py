"""What is special to the Triton kernels of selective_scan: chunks of time, launches of 16 states, the carry, tiles of channels.

They run in Triton's interpreter, which TRITON_INTERPRET=1 chooses when Python starts.
"""

from __future__ import annotations

import pytest
import torch
from test_selective_scan_native import NAMES, compare, problem, shuffled

from medssm import orders
from medssm.kernels import triton as backend
from medssm.kernels.selective_scan import plan, reference

if not backend.INTERPRETED:
    pytest.skip("the interpreter is chosen by TRITON_INTERPRET=1 before Python starts", allow_module_level=True)

from medssm.kernels.selective_scan import triton as kernel

RUN = 8  # steps between checkpoints here, in place of 64: the interpreter is slow


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    monkeypatch.setattr(plan, "TILE", RUN)


def results(p) -> dict[str, torch.Tensor]:
    """The kernel's outputs and gradients by name, computed in float32."""
    p = p.map(lambda t: t if t.dtype is torch.bfloat16 else t.float())
    out, state, checkpoints = kernel.forward(*p.arguments(), True, True)
    dout, dstate = p.cotangents()
    gradients = kernel.backward(dout, dstate.float(), checkpoints, *p.arguments())
    for name, t, g in zip(NAMES, p.tensors.values(), gradients, strict=True):
        assert (t is None) == (g is None) and (t is None or (g.dtype is t.dtype and g.shape == t.shape)), name
    return {"out": out, "state": state} | {f"d{k}": g for k, g in zip(NAMES, gradients, strict=True) if g is not None}


def equals_the_reference(p):
    p = p.map(lambda t: t.float().double())
    compare(results(p), p.reference(), 1e-6, 1e-5)


def cut(monkeypatch, programs):
    """How many programs a GPU wants: one, and time is not cut; many, and every chunk is one run."""
    monkeypatch.setattr(plan, "PROGRAMS", programs)


def test_the_time_is_cut_only_where_batch_and_channels_leave_programs_idle():
    assert plan.steps(plan.PROGRAMS, 10**6, 16) >= 10**6
    steps = plan.steps(3, 64**3, 16)
    assert steps % plan.chunk(16) == 0 and plan.PROGRAMS // 2 < 3 * -(-(64**3) // steps) <= plan.PROGRAMS
    assert plan.steps(1, plan.FEWEST * plan.chunk(16) - RUN, 16) >= plan.FEWEST * plan.chunk(16) - RUN


@pytest.mark.parametrize("length", [4 * RUN + 1, *(pytest.param(length, marks=pytest.mark.thorough) for length in (4 * RUN, 6 * RUN - 1))])
@pytest.mark.parametrize("state", [3, pytest.param(1, marks=pytest.mark.thorough)])
def test_chunks_equal_the_reference(length, state):
    equals_the_reference(problem(length=length, channels=5, state=state))


@pytest.mark.thorough
def test_chunks_of_several_runs_equal_one_chunk(monkeypatch):
    p = problem(batch=1, length=8 * RUN + 3, channels=3, state=2)
    cut(monkeypatch, 1)
    whole = results(p)
    cut(monkeypatch, 5)
    assert plan.steps(1, 8 * RUN + 3, 2) == 2 * RUN
    compare(results(p), whole, 1e-6, 1e-5)
    equals_the_reference(p)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("programs", [1, 2048])
def test_starts_at_and_beside_the_borders_of_chunks(reverse, programs, monkeypatch):
    cut(monkeypatch, programs)
    length = 5 * RUN + 2
    starts = torch.tensor([0, 3, RUN, 2 * RUN - 1, 3 * RUN + 1, length - 1])
    equals_the_reference(problem(batch=1, length=length, channels=3, state=2, index=shuffled(length), starts=starts, reverse=reverse))


def test_a_start_takes_nothing_over_even_where_the_state_grows():
    p = problem(batch=1, length=5 * RUN, channels=2, state=1, starts=torch.tensor([0, 2 * RUN]))
    p = p.but(A=-p.tensors["A"] / 8, initial_state=p.tensors["initial_state"] * 1e3)
    equals_the_reference(p)


@pytest.mark.thorough
def test_many_chunks_in_the_carry():
    """More than it reads ahead at a time."""
    equals_the_reference(problem(batch=1, length=(kernel.GROUP + 3) * RUN, channels=2, state=1))


@pytest.mark.parametrize("state", [9, 16, 17, pytest.param(35, marks=pytest.mark.thorough)])
def test_launches_of_16_states(state):
    equals_the_reference(problem(batch=1, length=13, channels=2, state=state, rank=2))


@pytest.mark.thorough
def test_launches_of_16_states_in_chunks():
    equals_the_reference(problem(batch=1, length=4 * 2 * RUN + 1, channels=2, state=18))


@pytest.mark.thorough
def test_the_largest_state():
    equals_the_reference(problem(batch=1, length=3, channels=2, state=256))


def test_half_precision_adds_the_launches_in_float32():
    p = problem(batch=1, length=9, channels=3, state=33).map(lambda t: t.bfloat16())
    want = p.map(lambda t: t.double()).reference()
    compare(results(p), want, 5e-3, 8e-3)


@pytest.mark.parametrize("rank", [1, 5, pytest.param(40, marks=pytest.mark.thorough)])
def test_low_rank_steps(rank):
    equals_the_reference(problem(length=11, channels=4, state=2, rank=rank))


@pytest.mark.parametrize("channels, groups", [(33, 1), (66, 2), (128, 1), pytest.param(15, 15, marks=pytest.mark.thorough)])
def test_tiles_of_channels(channels, groups):
    """Partial sums over tiles; no tile spans two groups; a forward may have two channels a lane."""
    equals_the_reference(problem(batch=1, length=5, channels=channels, state=2, groups=groups, rank=2))


@pytest.mark.thorough
def test_a_fixed_number_of_programs_takes_chunk_after_chunk(monkeypatch):
    monkeypatch.setattr(kernel, "SAVED_STATES", 2 * 4 * (RUN // kernel.HELD) * 2 * kernel.LANES)
    equals_the_reference(problem(batch=2, length=4 * RUN + 5, channels=3, state=2))


def test_softplus_is_exact_at_every_step_size():
    """Of steps down to 1e-8, where 1 + e^x has lost them, and up to what e^x overflows at."""
    x = torch.linspace(-20, 120, 32)
    u = torch.ones(1, 1, 32)
    one, none = torch.ones(1, 1, 1, 1), torch.zeros(32, 1)
    out, _, _ = kernel.forward(u, x[None, None], none, one, one, None, None, None, True, None, None, None, False, None, False, False)
    want = torch.nn.functional.softplus(x.double(), threshold=1e3)
    assert ((out[0, 0].double() - want).abs() / want).max() < 5e-7


def test_nothing_past_the_end_is_used():
    """A last block of fewer steps reads its last token again: an infinite input there reaches that token's output alone."""
    p = problem(batch=1, length=3, channels=2, state=2, absent=("z", "D")).map(lambda t: t.float())
    u = p.tensors["u"].clone()
    u[:, -1] = torch.inf
    finite, infinite = results(p), kernel.forward(*p.but(u=u).arguments(), False, True)
    assert torch.equal(infinite[0][:, :-1], finite["out"][:, :-1]) and not infinite[1].isfinite().any() and not infinite[1].isnan().any()


@pytest.mark.thorough
def test_the_same_bits_twice():
    p = problem(batch=1, length=4 * RUN + 3, channels=3, state=2, rank=2)
    first, second = results(p), results(p)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    "merge, own, state",
    [
        ("mean", True, 2),
        *(pytest.param(*of, marks=pytest.mark.thorough) for of in (("sum", False, 17), ("stack", False, 2), ("mean", False, 2), ("stack", True, 17))),
    ],
)
def test_orders_merge_in_place_and_in_chunks(merge, own, state):
    spatial, channels, k = (4, 8), 2, 2
    g = torch.Generator().manual_seed(0)

    def n(*shape):
        return torch.randn(shape, generator=g)

    x = n(1, 32, k, channels) if own else n(1, 32, channels)
    tensors = [
        x,
        n(1, 32, k, channels),
        -torch.rand((k, channels, state), generator=g),
        n(1, 32, k, 1, state),
        n(1, 32, k, 1, state),
        n(k, channels),
        n(1, 32, channels),
        n(k, channels),
    ]
    chosen = [orders.window(3), orders.snake((1, 0))]
    walks = [(o.index(spatial), o.starts(spatial), reverse) for o, reverse in zip(chosen, (True, False), strict=True)]
    out, checkpoints = kernel.forward_nd(*tensors, True, None, walks, merge, True)
    leaves = [t.double().requires_grad_() for t in tensors]
    want = reference.selective_scan_nd(*leaves, True, None, walks, merge)
    dout = torch.randn(out.shape, generator=g)
    gradients = kernel.backward_nd(dout, checkpoints, *tensors, True, None, walks, merge)
    wanted = torch.autograd.grad(want, leaves, dout.double())
    names = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias")
    compare(
        {"out": out} | dict(zip((f"d{name}" for name in names), gradients, strict=False)),
        {"out": want.detach()} | dict(zip((f"d{name}" for name in names), wanted, strict=True)),
        1e-6,
        1e-5,
    )


@pytest.mark.parametrize(
    "dtype, loads", [(torch.bfloat16, {0: 8, 2: 4, 1: 0}), (torch.float16, {0: 8, 2: 4, 1: 0}), (torch.float32, {0: 8, 2: 8, 1: 4})]
)
def test_rows_of_b_and_c_that_share_a_load_give_the_same_bits(dtype, loads):
    """One load reads 8 or 4 bytes of a row that is so aligned, or else one number. loads: the bytes for each number of columns after a row."""
    p = problem(batch=1, length=2 * RUN + 3, channels=3, state=4).map(lambda t: t.to(dtype))
    u, delta, A, B, C, *rest = p.arguments()
    found = []
    for columns, bytes in loads.items():
        rows = [torch.nn.functional.pad(t, (0, columns), value=float("nan"))[..., :4] for t in (B, C)]
        assert kernel._bytes(*rows) == bytes
        out, state, checkpoints = kernel.forward(u, delta, A, *rows, *rest, True, True)
        found.append((out, state, *kernel.backward(out, state, checkpoints, u, delta, A, *rows, *rest)))
    for other in found[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
