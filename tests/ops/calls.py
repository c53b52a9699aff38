"""A call of an op, for the contract suite: how it runs on a backend, how results compare, and the numbers and orders that calls are drawn from.

What each op's calls are is in tests/ops/cases.

Tensors live on MEDSSM_TEST_DEVICE, the CPU unless said otherwise; numbers are always drawn on the CPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st

from medssm import ops, orders
from medssm.kernels import cuda, triton

DEVICE = os.environ.get("MEDSSM_TEST_DEVICE", "cpu")
SERVES = {"reference": DEVICE, "native": "cpu", "triton": triton.DEVICE, "cuda": cuda.DEVICE}  # the device that each backend works on


@dataclass
class Call:
    """One call of an op: tensors by argument name, and the rest. The first tensor is a token tensor whose dtype the output has and in which the op
    is linear. A tuple of states is here initial_state_0, initial_state_1, …"""

    op: str
    tensors: dict[str, torch.Tensor]
    options: dict = field(default_factory=dict)

    def run(self, backend: str, **changes):
        return getattr(ops, self.op)(**self.arguments(), **{**self.options, **changes}, backend=backend)

    def arguments(self) -> dict:
        """The tensors as the public function takes them."""
        states = [self.tensors[name] for name in sorted(self.tensors) if name.startswith("initial_state_")]
        tensors = {name: t for name, t in self.tensors.items() if not name.startswith("initial_state_")}
        return {**tensors, "initial_state": tuple(states)} if states else tensors

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
        outputs = flat(call.run(backend))
        named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        if gradients:
            generator = torch.Generator().manual_seed(1)
            cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).bfloat16().to(o) for o in outputs]
            grads = torch.autograd.grad(outputs, list(call.tensors.values()), cotangents, allow_unused=True)
            named |= {f"gradient of {k}": torch.zeros_like(t) if g is None else g for (k, t), g in zip(call.tensors.items(), grads, strict=True)}
        return named


def flat(result) -> tuple[torch.Tensor, ...]:
    """An op's result as a flat tuple: the output, then the final state or states."""
    return sum(map(flat, result), ()) if isinstance(result, tuple) else (result,)


def initial(state) -> dict[str, torch.Tensor]:
    """A final state as the tensors of a call that goes on from it."""
    return {f"initial_state_{i}": s for i, s in enumerate(state)} if isinstance(state, tuple) else {"initial_state": state}


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


def normal(shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def rates(shape, seed):
    return -4 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def permutation(length, seed):
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@st.composite
def any_order(draw, dims: int):
    """An Order of an image or a volume with this many dimensions."""
    axes = tuple(draw(st.permutations(range(dims))))
    kinds = [
        orders.raster(axes),
        orders.raster(axes, reverse=True),
        orders.snake(axes),
        orders.window(draw(st.integers(1, 3)), axes),
        orders.dilated(draw(st.integers(1, 3)), axes),
        orders.dilated(2, axes, reverse=True),
        orders.window(2, axes, reverse=True),
        orders.interleaved(draw(st.integers(1, 4))),
    ]
    if dims in (2, 3):
        kinds += [orders.zigzag(), orders.hilbert(reverse=True)]
    return draw(st.sampled_from(kinds))


def steps(shape, seed, mamba_like):
    """delta before softplus and its bias: softplus(normal), or steps of 1e-4 to 1e-1 as Mamba starts with."""
    raw = normal(shape, seed)
    return raw * 0.5 - 5.0 if mamba_like else raw
