"""Packed sequences, drawn for the contract suite, and each of them on its own: what a call with cu_seqlens must give."""

from __future__ import annotations

import itertools

import torch
from hypothesis import strategies as st

from medssm.ops.op import OPS as DECLARED
from tests.ops.calls import DEVICE, Call, flat, normal, permutation
from tests.ops.cases import calls, example, flattened, tokens

OPS = tuple(name for name, op in DECLARED.items() if op.walk == "one")


@st.composite
def packed(draw, op: str, small: bool = False):
    """A call whose tokens are one to four sequences, some of them empty."""
    call = draw(calls(op, small=small))
    options = {"order": None, **({"return_final_state": True} if DECLARED[op].states else {})}
    call = flattened(call.with_options(**options))
    call = call.but(**{name: t[:1] for name, t in tokens(call).items()})
    length = next(iter(tokens(call).values())).shape[1]
    cuts = sorted(draw(st.lists(st.integers(0, length), min_size=0, max_size=3)))
    bounds = torch.tensor([0, *cuts, length], dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    states = {name: normal((len(cuts) + 1, *t.shape[1:]), 7 + i).abs().to(t) for i, (name, t) in enumerate(initial_states(call).items())}
    if draw(st.booleans()):
        call = call.with_options(order=permutation(length, length + 1))
    return call.but(**states).with_options(cu_seqlens=bounds.to(DEVICE))


def single(op: str, length: int = 13, sequences: int = 1) -> Call:
    """The op's example with one batch element, causal, and so many initial states."""
    call = example(op, length)
    call = call.but(**{name: t[:1] for name, t in tokens(call).items()})
    call = call.but(**{name: torch.cat([t[:1] * (i + 1) for i in range(sequences)]) for name, t in initial_states(call).items()})
    return call.with_options(order=None, **({"causal": True} if op == "linear_attention" else {}))


def initial_states(call: Call) -> dict[str, torch.Tensor]:
    return {name: t for name, t in call.tensors.items() if name.startswith("initial_state")}


class Apart(Call):
    """A packed call, made as one call for each sequence."""

    def run(self, backend: str, **changes):
        options = {key: value for key, value in self.options.items() if key not in ("order", "cu_seqlens")}
        bounds, order = self.options["cu_seqlens"].tolist(), self.options["order"]
        order = torch.arange(bounds[-1], device=DEVICE) if order is None else order
        found = []
        for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
            mine = {name: t[:, order[begin:end]] for name, t in tokens(self).items()}
            mine |= {name: t[i : i + 1] for name, t in initial_states(self).items()}
            found.append(flat(Call(self.op, {**self.tensors, **mine}, options).run(backend, **changes)))
        out, *states = zip(*found, strict=True)
        return torch.cat(out, 1)[:, torch.argsort(order)], *(torch.cat(state) for state in states)


def apart(call: Call) -> Apart:
    return Apart(call.op, call.tensors, call.options)
