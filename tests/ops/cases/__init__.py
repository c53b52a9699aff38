"""The ops under the contract suite, one module each:

TOKENS          the arguments that have one entry a token: (b, l, …), or (b, *spatial, …) with an Order
FEATURES        dimensions of the first tensor behind the tokens' (1 unless said)
WEIGHT          an argument over which vmap is refused, or None
STEP_OPTIONS    of an op with a state, a walk and `reverse`: the options that its step function takes too; other ops have none
SEQUENCE        options that such an op needs for it ({} unless said)
LAYOUTS         true where the op takes layout="bdl"
calls(small)    random calls; `small` ones suit gradcheck and Triton's interpreter
example(n)      one fixed float32 call with every option that all PyTorch features must carry, 13 tokens (4 x 5 without a walk); n(*shape) draws
far(n)          the other tensors, and the options, of a call whose first tensor is FAR, (1, 3, 4) unless said
"""

from __future__ import annotations

import torch

from medssm import backends
from medssm.kernels import triton
from tests.ops.calls import DEVICE, SERVES, Call
from tests.ops.cases import (
    bi_wkv,
    causal_conv1d,
    delta_rule,
    depthwise_conv,
    gated_linear_attention,
    linear_attention,
    selective_scan,
    selective_scan_nd,
    ssd,
)

CASES = {
    "selective_scan": selective_scan,
    "causal_conv1d": causal_conv1d,
    "selective_scan_nd": selective_scan_nd,
    "depthwise_conv": depthwise_conv,
    "delta_rule": delta_rule,
    "bi_wkv": bi_wkv,
    "gated_linear_attention": gated_linear_attention,
    "linear_attention": linear_attention,
    "ssd": ssd,
}
OPS = tuple(CASES)
SEQUENCE = tuple(op for op, case in CASES.items() if hasattr(case, "STEP_OPTIONS"))
BACKENDS = tuple(name for name, device in SERVES.items() if device == DEVICE)


def available() -> list[tuple[str, str]]:
    """Every (op, backend) of this machine and device. On a CPU the native backend must be there: a build that failed is no reason to test less."""
    has = backends()
    assert DEVICE != "cpu" or has["selective_scan"]["native"] == "ok", has["selective_scan"]["native"]
    return [(op, name) for op in OPS for name in BACKENDS if has[op][name] == "ok"]


def calls(op: str, small: bool = False):
    """Random calls of one op."""
    return CASES[op].calls(small=small or triton.INTERPRETED)


def example(op: str) -> Call:
    """The op's fixed call."""
    generator = torch.Generator().manual_seed(0)
    return CASES[op].example(lambda *shape: torch.randn(shape, generator=generator).to(DEVICE))


def tokens(call: Call) -> dict[str, torch.Tensor]:
    """The call's token tensors."""
    return {name: t for name, t in call.tensors.items() if name in CASES[call.op].TOKENS}


def flattened(call: Call) -> Call:
    """The call with the tokens of an image or a volume as one sequence, in the form that has a state."""
    case, first = CASES[call.op], next(iter(call.tensors.values()))
    spatial = first.dim() - 1 - getattr(case, "FEATURES", 1)
    return call.with_options(**getattr(case, "SEQUENCE", {})).but(**{name: t.flatten(1, spatial) for name, t in tokens(call).items()})
