"""Random calls of every op, for the contract suite: what hypothesis draws, and how to run a call on a backend.

Tensors live on MEDSSM_TEST_DEVICE, the CPU unless said otherwise; numbers are always drawn on the CPU.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st

from medssm import backends, ops, orders
from medssm.kernels import cuda, triton

SEQUENCE = ("selective_scan", "causal_conv1d")  # with a state, a walk and `reverse`
VOLUME = ("selective_scan_nd", "depthwise_conv")
OPS = (*SEQUENCE, *VOLUME)
DEVICE = os.environ.get("MEDSSM_TEST_DEVICE", "cpu")
SERVES = {"reference": DEVICE, "native": "cpu", "triton": triton.DEVICE, "cuda": cuda.DEVICE}  # the device that each backend works on
BACKENDS = tuple(name for name, device in SERVES.items() if device == DEVICE and backends()["selective_scan"][name] == "ok")


def available() -> list[tuple[str, str]]:
    """Every (op, backend) of this machine and device. On a CPU the native backend must be there: a build that failed is no reason to test less."""
    assert DEVICE != "cpu" or "native" in BACKENDS, backends()["selective_scan"]["native"]
    return [(op, name) for op in OPS for name in BACKENDS]


@dataclass
class Call:
    """One call of an op: tensors by argument name, and the rest."""

    op: str
    tensors: dict[str, torch.Tensor]
    options: dict = field(default_factory=dict)

    def run(self, backend: str, **changes):
        return getattr(ops, self.op)(**self.tensors, **{**self.options, **changes}, backend=backend)

    def to(self, dtype: torch.dtype) -> Call:
        return replace(self, tensors={k: t.to(dtype) for k, t in self.tensors.items()})

    def but(self, **tensors) -> Call:
        return replace(self, tensors={**self.tensors, **tensors})

    def with_options(self, **options) -> Call:
        return replace(self, options={**self.options, **options})

    def leaves(self) -> Call:
        return replace(self, tensors={k: t.detach().clone().requires_grad_() for k, t in self.tensors.items()})

    def results(self, backend: str, gradients: bool = True) -> dict[str, torch.Tensor]:
        """Outputs and, asked for, the gradient of every tensor for fixed random cotangents (exact in every type), by name."""
        call = self.leaves() if gradients else self
        out = call.run(backend)
        outputs = out if isinstance(out, tuple) else (out,)
        named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        if gradients:
            generator = torch.Generator().manual_seed(1)
            cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).bfloat16().to(o) for o in outputs]
            live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]  # an empty walk's zero state has no input
            grads = torch.autograd.grad([o for o, _ in live], list(call.tensors.values()), [c for _, c in live], allow_unused=True)
            named |= {f"gradient of {k}": torch.zeros_like(t) if g is None else g
                      for (k, t), g in zip(call.tensors.items(), grads, strict=True)}
        return named


def compare(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], forward: float, gradient: float) -> None:
    """max |error| / max |reference| within the tolerance; the message names the tensor and the first places that differ."""
    for name, w in want.items():
        g, w = got[name].double(), w.double()
        assert g.shape == w.shape, f"{name}: shape {tuple(g.shape)}, expected {tuple(w.shape)}"
        if not w.numel():
            continue
        assert torch.isfinite(g).all(), f"{name}: not finite at {torch.nonzero(~torch.isfinite(g))[:5].tolist()}"
        scale = w.abs().max().clamp_min(0.1)  # a sum over few channels may cancel
        error = (g - w).abs() / scale
        tolerance = gradient if name.startswith("gradient") else forward
        worst = torch.nonzero(error > tolerance)[:5].tolist()
        assert not worst, f"{name}: error {error.max():.2e} of {scale:.2e} above {tolerance:.0e}, first at {worst}"


# -- drawing ----------------------------------------------------------------------------------------------------------------------


def _normal(shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def _rates(shape, seed):
    return -4 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def permutation(length, seed):
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@st.composite
def any_order(draw, dims: int):
    """An Order of an image or a volume with this many dimensions."""
    axes = tuple(draw(st.permutations(range(dims))))
    kinds = [orders.raster(axes), orders.raster(axes, reverse=True), orders.snake(axes), orders.window(draw(st.integers(1, 3)), axes),
             orders.dilated(draw(st.integers(1, 3)), axes), orders.dilated(2, axes, reverse=True), orders.window(2, axes, reverse=True),
             orders.interleaved(draw(st.integers(1, 4)))]
    if dims in (2, 3):
        kinds += [orders.zigzag(), orders.hilbert(reverse=True)]
    return draw(st.sampled_from(kinds))


def steps(shape, seed, mamba_like):
    """delta before softplus and its bias: softplus(normal), or steps of 1e-4 to 1e-1 as Mamba starts with."""
    raw = _normal(shape, seed)
    return raw * 0.5 - 5.0 if mamba_like else raw


@st.composite
def selective_scan(draw, small=False):
    batch, groups, per = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 3] if small else [1, 5, 8, 17]))
    channels, state = groups * per, draw(st.sampled_from([1, 3] if small else [1, 2, 8, 16, 19, 40]))
    kind = draw(st.sampled_from(["plain", "index", "order"]))
    spatial = draw(st.lists(st.integers(1, 3 if small else 6), min_size=2, max_size=3).map(tuple)) if kind == "order" else (
        draw(st.sampled_from([0, 1, 2, 5] if small else [0, 1, 7, 64, 65, 150])),)
    seed = draw(st.integers(0, 1000))
    rank = draw(st.sampled_from([None, 1, 3]))
    grouped = groups > 1 or draw(st.booleans())
    bc = (batch, *spatial, groups, state) if grouped else (batch, *spatial, state)
    tensors = {
        "u": _normal((batch, *spatial, channels), seed),
        "delta": steps((batch, *spatial, channels if rank is None else rank), seed + 1, rank is None and draw(st.booleans())),
        "A": _rates((channels, state), seed),
        "B": _normal(bc, seed + 2), "C": _normal(bc, seed + 3)}
    optional = {"D": (channels,), "z": (batch, *spatial, channels), "delta_bias": (channels,), "initial_state": (batch, channels, state)}
    for i, (name, shape) in enumerate(optional.items()):
        if draw(st.booleans()):
            tensors[name] = _normal(shape, seed + 4 + i)
    if rank is not None:
        tensors["delta_proj"] = _normal((channels, rank), seed + 9, 0.5)
    softplus = draw(st.booleans())
    if not softplus:
        tensors["delta"] = tensors["delta"].abs() * 0.3
        if rank is not None:
            tensors["delta_proj"] = tensors["delta_proj"].abs()
        if "delta_bias" in tensors:
            tensors["delta_bias"] = tensors["delta_bias"].abs()
    options = {"delta_softplus": softplus, "reverse": draw(st.booleans()), "return_final_state": draw(st.booleans()), "order": None}
    if kind == "index":
        options["order"] = permutation(spatial[0], seed)
    elif kind == "order":
        options["order"] = draw(any_order(len(spatial)))
    return Call("selective_scan", tensors, options)


@st.composite
def causal_conv1d(draw, small=False):
    batch, channels, width = draw(st.integers(1, 2)), draw(st.sampled_from([1, 3] if small else [1, 5, 16, 33])), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["plain", "index", "order"]))
    spatial = draw(st.lists(st.integers(1, 3 if small else 5), min_size=2, max_size=3).map(tuple)) if kind == "order" else (
        draw(st.sampled_from([0, 1, 2, 5] if small else [0, 1, 2, 9, 70])),)
    seed = draw(st.integers(0, 1000))
    tensors = {"x": _normal((batch, *spatial, channels), seed), "weight": _normal((channels, width), seed + 1)}
    if draw(st.booleans()):
        tensors["bias"] = _normal((channels,), seed + 2)
    if draw(st.booleans()):
        tensors["initial_state"] = _normal((batch, channels, width - 1), seed + 3)
    options = {"activation": draw(st.sampled_from([None, "silu"])), "reverse": draw(st.booleans()),
               "return_final_state": draw(st.booleans()), "order": None}
    if kind == "index":
        options["order"] = permutation(spatial[0], seed)
    elif kind == "order":
        options["order"] = draw(any_order(len(spatial)))
    return Call("causal_conv1d", tensors, options)


@st.composite
def selective_scan_nd(draw, small=False):
    batch, groups, per = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2] if small else [1, 9, 16]))
    channels, state, k = groups * per, draw(st.sampled_from([1, 2] if small else [1, 8, 16])), draw(st.integers(1, 2 if small else 4))
    spatial = draw(st.lists(st.integers(1, 2 if small else 5), min_size=1, max_size=3).map(tuple))
    seed, rank = draw(st.integers(0, 1000)), draw(st.sampled_from([None, 2]))
    grouped = groups > 1 or draw(st.booleans())
    bc = (batch, *spatial, k, groups, state) if grouped else (batch, *spatial, k, state)
    shared = draw(st.booleans())
    tensors = {
        "x": _normal((batch, *spatial, channels) if shared else (batch, *spatial, k, channels), seed),
        "delta": _normal((batch, *spatial, k, channels if rank is None else rank), seed + 1),
        "A": _rates((k, channels, state), seed),
        "B": _normal(bc, seed + 2), "C": _normal(bc, seed + 3)}
    for i, (name, shape) in enumerate({"D": (k, channels), "z": (batch, *spatial, channels), "delta_bias": (k, channels)}.items()):
        if draw(st.booleans()):
            tensors[name] = _normal(shape, seed + 4 + i)
    if rank is not None:
        tensors["delta_proj"] = _normal((k, channels, rank), seed + 9, 0.5)
    options = {"delta_softplus": True, "merge": draw(st.sampled_from(["sum", "mean", "stack"])),
               "orders": [draw(any_order(len(spatial))) for _ in range(k)]}
    return Call("selective_scan_nd", tensors, options)


@st.composite
def depthwise_conv(draw, small=False):
    dims = draw(st.integers(1, 3))
    spatial = draw(st.lists(st.integers(1, 3 if small else 7), min_size=dims, max_size=dims).map(tuple))
    kernel = draw(st.lists(st.sampled_from([1, 3] if small else [1, 3, 5, 7]), min_size=dims, max_size=dims).map(tuple))
    batch, channels, seed = draw(st.integers(1, 2)), draw(st.sampled_from([1, 3] if small else [1, 5, 16, 33])), draw(st.integers(0, 1000))
    tensors = {"x": _normal((batch, *spatial, channels), seed), "weight": _normal((channels, *kernel), seed + 1) / math.prod(kernel) ** 0.5}
    if draw(st.booleans()):
        tensors["bias"] = _normal((channels,), seed + 2)
    return Call("depthwise_conv", tensors, {"activation": draw(st.sampled_from([None, "silu"]))})


def calls(op: str, small: bool = False):
    """Random calls of one op; `small` ones suit gradcheck and Triton's interpreter."""
    small = small or triton.INTERPRETED
    return {"selective_scan": selective_scan, "causal_conv1d": causal_conv1d, "selective_scan_nd": selective_scan_nd,
            "depthwise_conv": depthwise_conv}[op](small=small)
