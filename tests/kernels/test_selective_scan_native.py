"""The CPU kernel of selective_scan against its reference: every instruction set, every option, the borders of tiles, chunks and rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from medssm.kernels import native as library
from medssm.kernels.selective_scan import native, plan, reference

TILE = 64  # steps that the kernel takes at a time (csrc/selective_scan/problem.h)
ROUND = 1024  # steps between barriers, at most

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_proj", "initial_state")


@dataclass
class Problem:
    """The arguments of one scan: tensors by name (None where absent), the walk, and what comes back to it in backward."""

    tensors: dict
    softplus: bool = True
    index: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    reverse: bool = False

    def map(self, f) -> Problem:
        return replace(self, tensors={k: None if t is None else f(t) for k, t in self.tensors.items()})

    def but(self, **tensors) -> Problem:
        return replace(self, tensors={**self.tensors, **tensors})

    def arguments(self):
        *first, proj, initial = self.tensors.values()
        return *first, self.softplus, proj, self.index, self.starts, self.reverse, initial

    def cotangents(self):
        g = torch.Generator().manual_seed(7)
        u, A = self.tensors["u"], self.tensors["A"]
        dstate = torch.randn((u.shape[0], *A.shape), generator=g, dtype=torch.float64)
        return torch.randn(u.shape, generator=g, dtype=torch.float64).to(u.dtype), dstate

    def run(self) -> dict[str, torch.Tensor]:
        """The kernel's outputs and gradients by name."""
        out, state, checkpoints = native.forward(*self.arguments(), True, True)
        dout, dstate = self.cotangents()
        gradients = native.backward(dout, dstate, checkpoints, *self.arguments())
        for name, t, g in zip(NAMES, self.tensors.values(), gradients, strict=True):
            assert (t is None) == (g is None) and (t is None or (g.dtype is t.dtype and g.shape == t.shape)), name
        return {"out": out, "state": state} | {f"d{k}": g for k, g in zip(NAMES, gradients, strict=True) if g is not None}

    def reference(self, dtype=torch.float64) -> dict[str, torch.Tensor]:
        """The same from the reference, computed in dtype."""
        leaves = self.map(lambda t: t.detach().to(dtype).requires_grad_())
        outputs = reference.selective_scan(*leaves.arguments())
        given = {k: t for k, t in leaves.tensors.items() if t is not None}
        dout, dstate = (t.to(dtype) for t in self.cotangents())
        gradients = torch.autograd.grad(outputs, list(given.values()), (dout, dstate), allow_unused=True, materialize_grads=True)
        return dict(zip(("out", "state"), (o.detach() for o in outputs), strict=True)) | {f"d{k}": g for k, g in zip(given, gradients, strict=True)}


def problem(batch=2, length=150, channels=21, state=16, groups=1, rank=0, absent=(), seed=0, **walk) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def n(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tensors = {
        "u": n(batch, length, channels),
        "delta": n(batch, length, rank or channels),
        "A": -4 * torch.rand((channels, state), generator=g, dtype=torch.float64),
        "B": n(batch, length, groups, state),
        "C": n(batch, length, groups, state),
        "D": n(channels),
        "z": n(batch, length, channels),
        "delta_bias": n(channels),
        "delta_proj": n(channels, rank) / rank**0.5 if rank else None,
        "initial_state": n(batch, channels, state),
    }
    return Problem({k: None if k in absent else t for k, t in tensors.items()}, **walk)


def compare(got, want, forward, gradient=None):
    """max |error| / max |reference| of every output and gradient."""
    for name, w in want.items():
        if not w.numel():
            continue
        error = (got[name].double() - w.double()).abs().max() / w.abs().max().clamp_min(1e-6)
        tolerance = gradient if gradient and name.startswith("d") else forward
        assert error <= tolerance, f"{name}: {error:.1e} above {tolerance:.0e}"


def shuffled(length):
    return torch.randperm(length, generator=torch.Generator().manual_seed(length))


# -- values -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [1, 2, 3, 8, 15, 16, 17, 40])
@pytest.mark.parametrize("channels", [1, 16, 37])
def test_equals_the_reference(isa, state, channels):
    p = problem(length=2 * TILE + 3, channels=channels, state=state)
    compare(p.run(), p.reference(), 1e-12)


@pytest.mark.parametrize("length", [1, 2, TILE - 1, TILE, TILE + 1, 3 * TILE, 300])
@pytest.mark.parametrize("state", [16, 33])
def test_lengths_on_both_sides_of_tiles_and_chunks(length, state):
    p = problem(length=length, channels=5, state=state)
    compare(p.run(), p.reference(), 1e-12)


def test_the_largest_state():
    p = problem(batch=1, length=70, channels=3, state=256)
    compare(p.run(), p.reference(), 1e-12)


@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("initial_state",), ("D", "z", "delta_bias", "initial_state")])
@pytest.mark.parametrize("rank", [0, 1, 6, 19])
@pytest.mark.parametrize("softplus", [False, True])
def test_options(absent, rank, softplus):
    p = problem(length=90, channels=18, state=4, rank=rank, absent=absent, softplus=softplus)
    if not softplus:
        p = p.but(delta=p.tensors["delta"].abs() * 0.3)
    if not softplus and rank:
        p = p.but(delta_proj=p.tensors["delta_proj"].abs())
    compare(p.run(), p.reference(), 1e-12)


@pytest.mark.parametrize("channels, groups", [(1, 1), (6, 3), (34, 2), (5, 5)])
def test_groups(isa, channels, groups):
    p = problem(length=80, channels=channels, groups=groups, state=7, rank=2)
    compare(p.run(), p.reference(), 1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("starts", [None, [0], [0, 1, 2, 3], [5, TILE, TILE + 1], [TILE - 1], [2 * TILE], [*range(0, 150, 4)]])
@pytest.mark.parametrize("state", [8, 40])
def test_walks(reverse, starts, state):
    starts = None if starts is None else torch.tensor(starts)
    for index in (None, shuffled(150)):
        p = problem(length=150, channels=5, state=state, index=index, starts=starts, reverse=reverse)
        compare(p.run(), p.reference(), 1e-12)


# -- accuracy -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_float32_with_steps_of_softplus_normal(isa, seed):
    p = problem(length=400, channels=16, seed=seed, absent=("delta_bias",)).map(torch.Tensor.float)
    compare(p.run(), p.reference(), 1e-6, 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_float32_with_small_steps(isa, seed):
    """Steps of 1e-4 to 1e-1: at most twice the error of the reference in float32, plus 1e-6."""
    p = problem(length=400, channels=16, seed=seed, absent=("delta_bias",), softplus=False)
    g = torch.Generator().manual_seed(seed)
    steps = torch.exp(math.log(1e-4) + torch.rand(p.tensors["delta"].shape, generator=g, dtype=torch.float64) * math.log(1e3))
    p = p.but(delta=steps).map(torch.Tensor.float)
    got, want, single = p.run(), p.reference(), p.reference(torch.float32)
    for name, w in want.items():
        scale = w.abs().max()
        allowed = 2 * (single[name].double() - w).abs().max() / scale + 1e-6
        assert (got[name].double() - w).abs().max() / scale <= allowed, name


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_half_storage_computes_in_float32(isa, dtype, tolerance):
    p = problem(length=100, channels=37, state=8, rank=3).map(lambda t: t.to(dtype))
    compare(p.run(), p.reference(), tolerance, 2 * tolerance)


def test_mixed_types_each_gradient_in_its_inputs_dtype():
    p = problem(length=70, channels=20, state=4)
    types = dict(
        zip(
            NAMES,
            (
                torch.bfloat16,
                torch.float32,
                torch.float32,
                torch.float16,
                torch.float32,
                torch.bfloat16,
                torch.float32,
                torch.float32,
                torch.float32,
                torch.float32,
            ),
            strict=True,
        )
    )
    p = p.but(**{k: t.to(types[k]) for k, t in p.tensors.items() if t is not None})
    compare(p.run(), p.reference(), 4e-3, 8e-3)
    wide = p.but(C=p.tensors["C"].double())  # one float64 input: computes in float64
    got, want = wide.run(), wide.reference()
    assert got["state"].dtype is torch.float64
    compare(got, {k: want[k] for k in ("state", "dC")}, 1e-12)


# -- numbers out of the ordinary ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rates_beyond_the_exponentials_bounds(isa, dtype):
    """Factors of 0, of almost 0 and of infinity, in one tile with ordinary ones."""
    p = problem(batch=1, length=70, channels=16, state=4, softplus=False, absent=("delta_bias", "initial_state", "z")).map(lambda t: t.to(dtype))
    A, delta = p.tensors["A"].clone(), p.tensors["delta"].abs()
    A[0], A[1], A[2] = -1e6, -80.0, -math.inf
    delta[:, 3:5, 1] = 30.0
    p = p.but(A=A, delta=delta)
    out, want = native.forward(*p.arguments(), False, True), reference.selective_scan(*p.map(torch.Tensor.double).arguments())
    for o, w in zip(out[:2], want, strict=True):
        torch.testing.assert_close(o.double(), w, rtol=1e-5, atol=1e-5)
    A[3] = 400.0
    out, _, _ = native.forward(*p.but(A=A).arguments(), False, False)
    assert not torch.isfinite(out[:, -1, 3]).any() and torch.isfinite(out[..., 4:]).all()


@pytest.mark.parametrize("name", ["u", "delta", "A", "z"])
def test_a_nan_stays_in_its_channel(isa, name):
    p = problem(batch=1, length=70, channels=37, state=3).map(torch.Tensor.float)
    poisoned = p.tensors[name].clone()
    poisoned[(0, 20, 5) if poisoned.dim() == 3 else (5, 1)] = math.nan
    out, state, _ = native.forward(*p.but(**{name: poisoned}).arguments(), False, True)
    assert out[0, 20, 5].isnan() and (name == "z" or state[0, 5].isnan().any())
    clean = [c for c in range(37) if c != 5]
    assert torch.isfinite(out[..., clean]).all() and torch.isfinite(state[:, clean]).all()


@pytest.mark.parametrize("value", [-1e38, -1e4, 1e4, 1e38])
def test_gates_and_steps_of_any_size(isa, value):
    p = problem(batch=1, length=5, channels=16, state=1, absent=("delta_bias",)).map(torch.Tensor.float)
    for name in ("z", "delta"):
        extreme = p.but(**{name: torch.full_like(p.tensors[name], value)})
        out, want = native.forward(*extreme.arguments(), False, False)[0], reference.selective_scan(*extreme.arguments())[0]
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)


# -- memory -------------------------------------------------------------------------------------------------------------------------


def channels_first(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def spread(t):
    big = torch.full([2 * n + 3 for n in t.shape], math.nan, dtype=t.dtype)
    view = big[tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)]
    return view.copy_(t)


def mirrored(t):
    return t.flip(1).as_strided(t.shape, t.stride()) if t.dim() < 3 else t.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("layout", [channels_first, spread, mirrored])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("walk", ["raster", "reverse", "index"])
def test_any_strides_give_the_same_bits(isa, layout, dtype, walk):
    p = problem(length=100, channels=37, state=5, groups=1, rank=3, index=shuffled(100) if walk == "index" else None, reverse=walk == "reverse")
    p = p.map(lambda t: t.to(dtype))
    strided = replace(p, tensors={k: layout(t) if t is not None and t.dim() > 2 else t for k, t in p.tensors.items()})
    want, got = p.run(), strided.run()
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("channels, state", [(5, 3), (37, 16)])
def test_nothing_is_written_outside_and_everything_inside(isa, monkeypatch, channels, state):
    """Every tensor that the kernel's Python side allocates lies between guard bands and is full of NaN."""
    buffers, plain = [], torch.empty

    def guarded(shape, dtype=torch.float32, device="cpu"):
        size = math.prod(shape)
        buffer = torch.full((size + 2 * 256,), math.nan, dtype=dtype, device=device)
        buffers.append((buffer, size))
        return buffer[256 : 256 + size].view(shape)

    p = problem(length=90, channels=channels, state=state, rank=2).map(torch.Tensor.float)
    want = p.run()
    monkeypatch.setattr(torch, "empty", guarded)
    got = p.run()
    monkeypatch.setattr(torch, "empty", plain)
    assert all(torch.equal(got[k], want[k]) for k in want)
    for buffer, size in buffers:
        assert buffer[:256].isnan().all() and buffer[256 + size :].isnan().all() and not buffer[256 : 256 + size].isnan().any()


def test_checkpoints_depend_on_shapes_only():
    for length, state, count in ((1, 16, 1), (64, 16, 1), (65, 16, 2), (1000, 1, 16), (1000, 17, 8), (1024, 256, 1)):
        p = problem(batch=1, length=length, channels=3, state=state)
        _, _, saved = native.forward(*p.arguments(), True, False)
        assert saved.shape == (1, count, state, 3) and plan.chunks(length, state) == count


@pytest.mark.parametrize("shape", [(2, 0, 5), (0, 7, 5), (2, 7, 0)])
def test_nothing_to_do(shape):
    batch, length, channels = shape
    p = problem(batch=batch, length=length, channels=channels, state=3)
    got, want = p.run(), p.reference()
    assert all(torch.equal(got[k], want[k]) for k in want)


# -- threads ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch, channels, length, state, rank",
    [
        (1, 16, ROUND + 200, 16, 0),  # one item: halves of the state
        (1, 3, 2 * ROUND + 1, 5, 2),  # halves of different sizes, several rounds
        (1, 40, 300, 33, 0),  # chunks of several tiles
        (3, 70, 130, 16, 3),  # more items than threads
        (1, 9, 200, 1, 0),
    ],
)  # nothing to halve
@pytest.mark.parametrize("starts", [None, [0, 3, 70, 71, 128]])
def test_any_number_of_threads_gives_the_same_bits(isa, batch, channels, length, state, rank, starts):
    starts = None if starts is None else torch.tensor(starts)
    p = problem(batch, length, channels, state, rank=rank, reverse=True, starts=starts).map(torch.Tensor.float)
    first = None
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        got = p.run()
        first = first or got
        assert all(torch.equal(got[k], first[k]) for k in got), threads


def test_halves_equal_the_reference(isa):
    torch.set_num_threads(4)
    p = problem(batch=1, length=200, channels=3, state=19, rank=2, starts=torch.tensor([0, 65, 130]))
    compare(p.run(), p.reference(), 1e-12)


# -- several orders -----------------------------------------------------------------------------------------------------------------


def problem_nd(shared=True, rank=0, z=True, groups=1, k=3, length=97, channels=18, state=8):
    g = torch.Generator().manual_seed(rank)

    def n(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tensors = {
        "x": n(2, length, channels) if shared else n(2, length, k, channels),
        "delta": n(2, length, k, rank or channels),
        "A": -4 * torch.rand((k, channels, state), generator=g, dtype=torch.float64),
        "B": n(2, length, k, groups, state),
        "C": n(2, length, k, groups, state),
        "D": n(k, channels),
        "z": n(2, length, channels) if z else None,
        "delta_bias": n(k, channels),
        "delta_proj": n(k, channels, rank) if rank else None,
    }
    return tensors, [(None, None, False), (shuffled(length), torch.tensor([0, 10, 70]), False), (shuffled(length), None, True)][:k]


@pytest.mark.parametrize("merge", ["sum", "mean", "stack"])
@pytest.mark.parametrize("shared, rank, z, groups, k", [(True, 0, True, 1, 3), (False, 2, True, 2, 3), (True, 2, False, 1, 3), (True, 0, True, 1, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 1.5e-2)])
def test_several_orders_equal_the_reference(merge, shared, rank, z, groups, k, dtype, tolerance):
    tensors, walks = problem_nd(shared, rank, z, groups, k)
    tensors = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    *first, proj = tensors.values()
    out, checkpoints = native.forward_nd(*first, True, proj, walks, merge, True)
    assert checkpoints.shape[:2] == (2, k) and out.dtype is dtype
    leaves = [None if t is None else t.double().requires_grad_() for t in tensors.values()]
    want = reference.selective_scan_nd(*leaves[:-1], True, leaves[-1], walks, merge)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    gradients = native.backward_nd(dout, checkpoints, *first, True, proj, walks, merge)
    expected = iter(torch.autograd.grad(want, [t for t in leaves if t is not None], dout.double()))
    compare(
        {"out": out} | dict(zip(tensors, gradients, strict=True)),
        {"out": want.detach()} | {name: next(expected) for name, t in tensors.items() if t is not None},
        tolerance,
    )


def test_refuses_what_it_cannot_serve():
    u = torch.zeros(1, 2, 3)
    assert library.refuse(u, None) is None
    assert "complex64" in library.refuse(u, u.to(torch.complex64))
    assert "meta" in library.refuse(u.to("meta"))
