"""The core of the contract: one small call of each op in every form, on every backend.

`make test` runs it where a whole contract would take minutes.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from medssm import ops, orders
from medssm.ops import walk
from tests.ops.calls import DEVICE, Call, compare, normal, permutation
from tests.ops.cases import SEQUENCE, available, example, flattened, tokens

PAIRS = available()
# Forms that take Triton's interpreter long, and that another form of the op nearly holds: for `make test-all`.
SLOW = ("bi_wkv", "delta_rule", "gated_linear_attention", "linear_attention", "selective_scan_nd", "ssd", "ssd3")
LONG = {(op, "triton", form) for op in SLOW for form in ("bfloat16", "begun_anew", "longer", "what_must_be_given", "kept")}
LONG |= {(op, "triton", "permuted") for op in SLOW if op in SEQUENCE}  # their packed sequences are in an order of their own, too
LONG |= {("bi_wkv", "triton", "every_option")}  # permuted has every option


def marks(op: str, backend: str, form: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.thorough] if (op, backend, form) in LONG else []


def every_option(op: str) -> Call:
    return example(op)


def what_must_be_given(op: str) -> Call:
    """The tensors and options that have no default."""
    required = {name for name, p in inspect.signature(getattr(ops, op)).parameters.items() if p.default is p.empty}
    call = example(op)
    if "delta_proj" in call.tensors:
        call = call.but(delta=(call.tensors["delta"].unsqueeze(-2) * call.tensors["delta_proj"]).sum(-1).abs())
    return Call(op, {k: t for k, t in call.tensors.items() if k in required}, {k: v for k, v in call.options.items() if k in required})


def bfloat16(op: str) -> Call:
    return example(op).to(torch.bfloat16)


def permuted(op: str) -> Call:
    """The tokens in an order of their own, as often backwards as the op allows."""
    call = flattened(example(op)).with_options(order=permutation(13, 0))
    return call.with_options(reverse=True) if takes(op, "reverse") else call


def begun_anew(op: str) -> Call:
    """An image of 3 x 4 in windows of 2 x 2, each a walk of its own."""
    call = single(flattened(example(op)))
    image = {name: t[:, :12].unflatten(1, (3, 4)) for name, t in tokens(call).items()}
    return call.but(**image).with_options(order=orders.window(2))


def longer(op: str) -> Call:
    """Thirty-nine tokens, in place of 13."""
    call = single(flattened(example(op)))
    return call.but(**{name: torch.cat([t, t.flip(1), t], 1) for name, t in tokens(call).items()})


def packed(op: str) -> Call:
    """Four sequences, one of them empty, of tokens in an order of their own, walked backwards where the op allows it."""
    call = single(flattened(example(op)))
    length = next(iter(call.tensors.values())).shape[1]
    states = {name: torch.cat([t, -t, 2 * t, t / 2]) for name, t in call.tensors.items() if name.startswith("initial_state")}
    bounds = torch.tensor([0, 1, 8, 8, length], device=DEVICE)
    return call.but(**states).with_options(order=permutation(length, 0), cu_seqlens=bounds, **({"reverse": True} if takes(op, "reverse") else {}))


def single(call: Call) -> Call:
    """The first of the batch."""
    batched = {*tokens(call), *(name for name in call.tensors if name.startswith("initial_state"))}
    return call.but(**{name: t[:1] for name, t in call.tensors.items() if name in batched})


def takes(op: str, option: str) -> bool:
    return option in inspect.signature(getattr(ops, op)).parameters


WALKS = (permuted, begun_anew, longer)  # of ops with one walk


@pytest.mark.parametrize(
    "op, backend, form",
    [
        pytest.param(op, backend, form, id=f"{op}-{backend}-{form.__name__}", marks=marks(op, backend, form.__name__))
        for op, backend in PAIRS
        for form in (every_option, what_must_be_given, bfloat16, *(WALKS if takes(op, "order") else ()), *((packed,) if op in SEQUENCE else ()))
    ],
)
def test_outputs_states_and_gradients_equal_the_float64_reference(op, backend, form):
    call = form(op)
    got, want = call.results(backend), call.to(torch.float64).results("reference")
    first = next(iter(call.tensors.values())).dtype
    assert got["output 0"].dtype is first
    ulp = torch.finfo(first).eps
    compare(got, want, *((ulp + 1e-5, 2 * ulp + 1e-4) if first is torch.bfloat16 else (1e-5, 5e-5)))


@pytest.mark.parametrize(
    "op, backend", [pytest.param(*pair, marks=marks(*pair, "kept")) for pair in PAIRS if takes(pair[0], "order") or takes(pair[0], "orders")]
)
def test_what_a_call_in_inference_mode_keeps_serves_training(op, backend):
    """As validation does before a training goes on: Lightning's is in inference mode."""
    call = example(op)
    if takes(op, "order"):
        call = single(flattened(call))
        image = {name: t[:, :12].unflatten(1, (3, 4)) for name, t in tokens(call).items()}
        call = call.but(**image).with_options(order=orders.snake())
    walk._kept_tables.cache_clear()
    with torch.inference_mode():
        call.run(backend)
    assert all(g.isfinite().all() for g in call.results(backend).values())


@pytest.mark.parametrize("size", [(9,), (2, 3, 4)])
@pytest.mark.parametrize("backend", [backend for op, backend in PAIRS if op == "depthwise_conv"])
def test_a_depthwise_convolution_in_one_and_three_dimensions(backend, size):
    kernel = (3, 5, 1)[: len(size)]
    call = Call("depthwise_conv", {"x": normal((1, *size, 5), 0), "weight": normal((5, *kernel), 1)}).to(torch.float32)
    compare(call.results(backend), call.to(torch.float64).results("reference"), 1e-6, 1e-5)
