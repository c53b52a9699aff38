"""What the contract suite draws of each op, one module each, found by the op's name; what else it needs follows from the op's declaration.

calls(small)    random calls; `small` ones suit gradcheck and Triton's interpreter
far(n)          the other tensors, and the options, of a call whose first tensor is FAR, (1, 3, 4) unless said; n(*shape) draws
SEQUENCE        options that an op with a state needs for it ({} unless said)
"""

from __future__ import annotations

import importlib
import inspect

import torch

from medssm import backends, ops
from medssm.kernels import triton
from medssm.ops.op import OPS as DECLARED
from tests.ops.calls import DEVICE, SERVES, Call, initial

CASES = {op: importlib.import_module(f"tests.ops.cases.{op}") for op in DECLARED}
OPS = tuple(CASES)
SEQUENCE = tuple(op for op in OPS if hasattr(ops, f"{op}_step"))  # the ops with a state
LAYOUTS = tuple(op for op in OPS if "layout" in inspect.signature(getattr(ops, op)).parameters)
BACKENDS = tuple(name for name, device in SERVES.items() if device == DEVICE)


def available() -> list[tuple[str, str]]:
    """Every (op, backend) of this machine and device. On a CPU the native backend must be there: a build that failed is no reason to test less."""
    has = backends()
    assert DEVICE != "cpu" or has["selective_scan"]["native"] == "ok", has["selective_scan"]["native"]
    return [(op, name) for op in OPS for name in BACKENDS if has[op][name] == "ok"]


def calls(op: str, small: bool = False):
    """Random calls of one op."""
    return CASES[op].calls(small=small or triton.INTERPRETED)


def example(op: str, length: int = 13) -> Call:
    """The op's own example, of so many tokens."""
    generator, declared = torch.Generator().manual_seed(0), DECLARED[op]
    given = declared.example(lambda *shape: torch.randn(shape, generator=generator).to(DEVICE), length, 6)
    state = initial(given.pop("initial_state")) if "initial_state" in given else {}
    main = declared.names[declared.main]
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    options = {name: value for name, value in given.items() if name not in tensors}
    if state:
        options["return_final_state"] = True
    return Call(op, {main: tensors.pop(main), **tensors, **state}, options)


def tokens(call: Call) -> dict[str, torch.Tensor]:
    """The call's token tensors."""
    names = [given.name for given in DECLARED[call.op].inputs if given.tokens]
    return {name: t for name, t in call.tensors.items() if name in names}


def weight(op: str) -> str | None:
    """A tensor that every call has and that carries no batch."""
    return next((given.name for given in DECLARED[op].inputs if given.axes[0] != "b" and not given.optional), None)


def step_options(op: str) -> set[str]:
    """The options that the op's step function takes too."""
    return set(inspect.signature(getattr(ops, f"{op}_step")).parameters) - {"backend"}


def flattened(call: Call) -> Call:
    """The call with the tokens of an image or a volume as one sequence, in the form that has a state."""
    declared, first = DECLARED[call.op], next(iter(call.tensors.values()))
    spatial = first.dim() + 1 - len(declared.inputs[declared.main].axes)
    return call.with_options(**getattr(CASES[call.op], "SEQUENCE", {})).but(**{name: t.flatten(1, spatial) for name, t in tokens(call).items()})
