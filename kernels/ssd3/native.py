"""Mamba-3's recurrence on the CPU. Of rank 1 with adjacent pairs it is csrc/ssd3: this allocates, packs one argument block and calls it. Of several
ranks (MIMO) or with halves as pairs it is `folded` over the kernel of gated linear attention.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from medssm.kernels import native
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.gated_linear_attention import native as gated_linear_attention
from medssm.kernels.native import fields
from medssm.kernels.ssd3 import folded
from medssm.kernels.ssd3.reference import paired, rotated
from medssm.kernels.ssd3.steps import Steps
from medssm.kernels.triton import plain

# The structs of csrc: medssm/token_rows.h's HeadTokens and HeadOutput, medssm/matrix_scan.h's StateTensor, ssd3/problem.h's Problem, then the
# Arguments of its cpu_forward.cpp and cpu_backward.cpp.
_TOKENS, _STATE = fields("data type batch token head"), fields("data type batch head row lane")
_PROBLEM = fields(
    ("x z B C dt A trap angles", _TOKENS),
    ("initial", _STATE),
    "angle D B_bias C_bias",
    ("walk", native.WALK),
    "batch length heads size groups states turning",
    "wide threads",
)
_forward = native.Kernel("ssd3", "forward", fields(("problem", _PROBLEM), ("out y", _TOKENS), ("final", _STATE), "angle_last"))
_backward = native.Kernel(
    "ssd3",
    "backward",
    fields(
        ("problem", _PROBLEM),
        ("dout y", _TOKENS),
        ("dstate", _STATE),
        "dangle dD dB_bias dC_bias",
        ("dx dB dC dz ddt dA dtrap dangles", _TOKENS),
        ("dinitial", _STATE),
        "dinitial_angle",
    ),
)
_REVOLUTION = 2 * math.pi


def forward(*, save, final, **arguments):
    """Arguments as `reference.ssd3` takes them. Returns (out, the four states or None for each, y or None): y (b,l,r,h,p), in the compute type, is
    the output before the gate."""
    if not _has_kernel(arguments):
        return folded.forward(gated_linear_attention, save=save, final=final, **arguments)
    given = _given(arguments)
    x, before, at_ends = given.x, None, _AtEnds(given) if final or given.initial_state is not None else None
    if given.initial_state is not None:
        before = at_ends.with_first_token()
    out, y = native.like(x), native.like(x, given.dtype) if save else None
    state = angle = None
    if final:
        state = native.new_state(x, (*x.shape[2:], given.B.shape[3]), given.dtype, given.initial_state, given.sequences)
        angle = _revolutions(given, state.shape[0])
    _forward(*_problem(given, before), *_tokens(out), *_tokens(y), *_state(state), native.pointer(angle))
    states = (None,) * 4
    if final:
        turned = (torch.remainder(angle, 1) * _REVOLUTION).to(given.dtype)
        if given.sequences is not None and given.initial_angle is not None:  # a sequence without tokens keeps its own, with whole revolutions
            rows = at_ends.steps.rows
            turned = given.initial_angle.clone().index_copy_(0, rows, turned.index_select(0, rows))
        states = turned, state, *at_ends.last_token(turned)
    return out, *states, None if y is None else y.unsqueeze(2)


def backward(*, dout, dangle, dstate, dk, dv, y, **arguments):
    """Gradients of every tensor, None where that input is, each in its input's dtype. y: as `forward` kept it."""
    if not _has_kernel(arguments):
        return folded.backward(gated_linear_attention, dout=dout, dangle=dangle, dstate=dstate, dk=dk, dv=dv, y=y, **arguments)
    given = _given(arguments)
    x, dtype = given.x, given.dtype
    batch, length, heads, _ = x.shape
    turning, rows = given.angles.shape[3], batch if given.sequences is None else given.sequences.count
    dstates = [None if t is None else t.to(dtype) for t in plain(dangle, dstate, dk, dv)]
    dangle, dstate, dk, dv = dstates
    found = {name: native.like(given.inputs[name]) for name in ("x", "z", "B", "C")}
    found |= {name: x.new_empty(batch, length, heads, dtype=dtype) for name in ("dt", "A", "trap")}
    dangles = x.new_empty(batch, length, heads, turning, dtype=dtype)
    sums = {
        name: None if weight is None else x.new_empty(batch, *weight.shape, dtype=torch.float64)
        for name, weight in (("D", given.D), ("B_bias", given.B_bias), ("C_bias", given.C_bias))
    }
    at_ends = _AtEnds(given) if given.initial_state is not None or any(t is not None for t in dstates) else None
    before = dinitial = dinitial_angle = None
    if given.initial_state is not None:
        before = at_ends.with_first_token()
        dinitial = native.new_state(x, given.initial_state.shape[1:], dtype, dstate, given.sequences)
        dinitial_angle = x.new_zeros((rows, heads, turning), dtype=torch.float64)
        if given.sequences is not None and dangle is not None:
            dinitial_angle += dangle
    if dk is not None:  # of the last token's turned key
        dlast, of_angle = at_ends.turned_back(dk)
        dangle = of_angle if dangle is None else dangle + of_angle
    dangle, dout, dstate = native.contiguous(dangle, torch.float64), native.lanes(plain(dout)[0]), native.contiguous(dstate)
    if dout.dim() == 5:
        dout = dout.squeeze(2)
    _backward(
        *_problem(given, before),
        *_tokens(dout),
        *_tokens(None if given.z is None else y.view(x.shape)),
        *_state(dstate),
        *map(native.pointer, (dangle, sums["D"], sums["B_bias"], sums["C_bias"])),
        *(field for name in ("x", "B", "C", "z", "dt", "A", "trap") for field in _tokens(found[name])),
        *_tokens(dangles),
        *_state(dinitial),
        native.pointer(dinitial_angle),
    )
    found |= {name: None if t is None else t.sum(0) for name, t in sums.items()}
    found["angles"] = dangles if given.inputs["angles"].dim() == 4 else dangles.sum(2)
    if dk is not None:
        at_ends.steps.add(found["B"].view(given.B.shape), at_ends.steps.last, dlast.unflatten(1, (given.B.shape[2], -1)).sum(2).to(found["B"].dtype))
        if given.B_bias is not None:
            found["B_bias"] += dlast.sum(0)
    if dv is not None:
        at_ends.steps.add(found["x"], at_ends.steps.last, at_ends.steps.with_tokens(dv).to(x.dtype))
    if given.initial_state is not None:
        found |= at_ends.of_first_token(dinitial, found, dk, dv)
        found["initial_state"], found["initial_angle"] = dinitial, dinitial_angle
    return tuple(None if t is None else found[name].to(t.dtype).reshape(t.shape) for name, t in given.inputs.items())


def _has_kernel(arguments):
    """Whether csrc/ssd3 serves: for one rank without weights of ranks, adjacent pairs, and where there is something to compute."""
    ranks, mimo = arguments["B"].shape[2], [arguments[name] for name in ("mimo_x", "mimo_z", "mimo_o")]
    return ranks == 1 and mimo == [None] * 3 and arguments["pairs"] == "adjacent" and arguments["x"].numel() > 0


def _given(arguments):
    """The arguments as csrc/ssd3 takes them, without the axis of ranks; inputs: the tensors as they came."""
    walk = {name: arguments.pop(name) for name in ("index", "starts", "reverse")}
    sequences = arguments.pop("sequences", None)
    del arguments["pairs"], arguments["per_rank"]
    inputs = dict(zip(arguments, plain(*arguments.values()), strict=True))
    given = SimpleNamespace(**inputs, **walk, sequences=sequences, inputs=inputs, dtype=compute_dtype(*inputs.values()))
    given.x, given.z = (None if t is None else native.lanes(t) for t in (given.x, given.z))
    given.B, given.C = (native.lanes(t.squeeze(2)) for t in (given.B, given.C))
    shared = given.angles.dim() == 3
    given.angles = native.lanes(given.angles)
    if shared:
        given.angles = given.angles.unsqueeze(2).expand(-1, -1, given.x.shape[2], -1)
    for name in ("D", "B_bias", "C_bias"):
        weight = getattr(given, name)
        setattr(given, name, None if weight is None else weight.to(given.dtype).reshape(weight.shape[0], *weight.shape[2:]).contiguous())
    for name in ("initial_angle", "initial_state", "initial_k", "initial_v"):
        setattr(given, name, native.contiguous(getattr(given, name), given.dtype))
    given.angle = None if given.initial_angle is None else _revolutions(given, given.initial_angle.shape[0])
    return given


def _revolutions(given, rows):
    """The angles before the first step (rows,h,a) in revolutions, zeros if there are none."""
    if given.initial_angle is None:
        return given.x.new_zeros((rows, given.x.shape[2], given.angles.shape[3]), dtype=torch.float64)
    return given.initial_angle.double() / _REVOLUTION


class _AtEnds:
    """What the states before the first and after the last step have of their tokens, for all sequences with tokens (rows)."""

    def __init__(self, given):
        self._given = given
        self.steps = Steps(given.x.shape[1], given.index, given.starts, given.reverse, given.sequences, given.x.device)

    def with_first_token(self):
        """S'_0 = S_0 + later_0 x_0 k_0^T (b,h,p,n); a sequence without tokens keeps its S_0."""
        given, steps = self._given, self.steps
        self.k0, self.v0 = steps.with_tokens(given.initial_k).squeeze(1), steps.with_tokens(given.initial_v)
        self.dt, mix = (steps.at(t, steps.first).to(given.dtype) for t in (given.dt, given.trap))
        self.mix = torch.sigmoid(mix)
        self.held = ((1 - self.mix) * self.dt)[..., None, None]
        self.pairs0 = self.v0.unsqueeze(-1) * self.k0.unsqueeze(-2)
        before = given.initial_state.clone()
        if steps.rows is None:
            return before.add_(self.held * self.pairs0)
        return before.index_add_(0, steps.rows, self.held * self.pairs0)

    def of_first_token(self, dinitial, found, dk, dv):
        """Gradients of initial_k and initial_v from that of S'_0; adds those of dt and trap at the first tokens to `found`."""
        given, steps = self._given, self.steps
        dpairs = steps.with_tokens(dinitial)
        dheld = (dpairs * self.pairs0).sum((2, 3))
        steps.add(found["dt"], steps.first, (1 - self.mix) * dheld)
        steps.add(found["trap"], steps.first, -self.dt * dheld * self.mix * (1 - self.mix))
        dpairs = dpairs * self.held
        dk0, dv0 = (dpairs * self.v0.unsqueeze(-1)).sum(2), (dpairs * self.k0.unsqueeze(-2)).sum(3)
        return {"initial_k": self._of_all(dk0.unsqueeze(1), dk, given.initial_k), "initial_v": self._of_all(dv0, dv, given.initial_v)}

    def last_token(self, angle):
        """(k (b,1,h,n) turned by the final angles, x (b,h,p)) of the last tokens; a sequence without tokens keeps its own."""
        given, steps = self._given, self.steps
        k = rotated(self._last_key(), steps.with_tokens(angle), "adjacent").unsqueeze(1)
        x = steps.at(given.x, steps.last).to(given.dtype)
        if steps.rows is None:
            return k, x
        rows = given.sequences.count
        before = [
            t.new_zeros((rows, *t.shape[1:])) if initial is None else initial.clone() for t, initial in ((k, given.initial_k), (x, given.initial_v))
        ]
        return tuple(t.index_copy_(0, steps.rows, own) for t, own in zip(before, (k, x), strict=True))

    def turned_back(self, dk):
        """(the gradients (rows,h,n) of the last tokens' keys before they turned, those of the final angles (b,h,a))."""
        steps, angle = self.steps, self._final_angle()
        k, d = rotated(self._last_key(), angle, "adjacent"), steps.with_tokens(dk).squeeze(1)
        one, two = paired("adjacent", angle.shape[-1], k.shape[-1])
        of_angle = d[..., two] * k[..., one] - d[..., one] * k[..., two]
        if steps.rows is not None:
            of_angle = of_angle.new_zeros(dk.shape[0], *of_angle.shape[1:]).index_copy_(0, steps.rows, of_angle)
        return rotated(d, -angle, "adjacent"), of_angle

    def _final_angle(self):
        """The angles (rows,h,a) after the last tokens, summed anew: only the gradient of the final state's key asks for them here."""
        given, steps = self._given, self.steps
        rate, dt = torch.tanh(given.angles.to(given.dtype)), given.dt.to(given.dtype)
        return steps.angles(rate, dt, steps.with_tokens(given.initial_angle))[1]

    def _last_key(self):
        """The keys (rows,h,n) of the last tokens with their bias, not turned."""
        given = self._given
        k = self.steps.at(given.B, self.steps.last).to(given.dtype).repeat_interleave(given.x.shape[2] // given.B.shape[2], dim=1)
        return k if given.B_bias is None else k + given.B_bias

    def _of_all(self, gradient, dlast, initial):
        """The gradient of an initial state: of those with tokens `gradient`, of the others what the final state has."""
        if self.steps.rows is None:
            return gradient
        out = torch.zeros_like(initial) if dlast is None else dlast.clone()
        return out.index_copy_(0, self.steps.rows, gradient)


def _problem(given, before):
    """The fields of Problem; before: S'_0."""
    x = given.x
    return (
        *(field for t in (x, given.z, given.B, given.C, given.dt, given.A, given.trap, given.angles) for field in _tokens(t)),
        *_state(before),
        *map(native.pointer, (given.angle, given.D, given.B_bias, given.C_bias)),
        *native.walk(given.index, given.starts, given.sequences, given.reverse),
        *x.shape,
        *given.B.shape[2:],
        given.angles.shape[3],
        given.dtype is torch.float64,
        torch.get_num_threads(),
    )


def _tokens(t):
    """The fields of HeadTokens and HeadOutput: (b,l,h,d) with adjacent elements, (b,l,h), or (b,l,1,g,n)."""
    return (0, 0, 0, 0, 0) if t is None else (t.data_ptr(), native.DTYPES[t.dtype], *t.stride()[:2], t.stride(t.dim() - 2 if t.dim() > 3 else 2))


def _state(t):
    """The fields of StateTensor of a state (b,h,p,n), whose rows are n."""
    if t is None:
        return (0, 0, 0, 0, 0, 0)
    batch, head, channel, state = t.stride()
    return t.data_ptr(), native.DTYPES[t.dtype], batch, head, state, channel
