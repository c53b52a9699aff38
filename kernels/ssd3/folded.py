"""Mamba-3's recurrence by the kernels of gated linear attention, forward and backward.

A token's x_t k_t^T enters the state twice: at its own step with the weight now_t, at the next step with the weight a_{t+1} later_t,

    now_t = m_t dt_t,    later_t = (1 - m_{t+1}) dt_{t+1}, 0 at the end

so S'_t = S_t + later_t x_t k_t^T obeys a plain recurrence, which begins and ends with S itself:

    S'_t = a_t S'_{t-1} + (now_t + later_t) x_t k_t^T,    y_t = S'_t q_t - later_t (k_t . q_t) x_t

A state before the first step is met with its own later_0. Of rank r a token is r steps, of which the first decays: query i has then met the keys
j <= i of its own token with the weight now + later, and those after it not at all; both are corrected to `now`. The turned q and k (b,l,r,h,n) and
the values (b,l,r,h,p) are in memory, in the compute type; backward makes them again.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch.nn import functional

from medssm.kernels.autocast import without_autocast
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.ssd3.reference import paired
from medssm.kernels.ssd3.steps import Steps
from medssm.kernels.triton import plain

_STATES = ("initial_angle", "initial_state", "initial_k", "initial_v")


def forward(kernel, *, save, final, **arguments):
    """kernel: the module of gated linear attention; arguments: as `reference.ssd3` takes them.

    Returns (out, the four states or None for each, y or None): y (b,l,r,h,p), in the compute type, is the output before the gate.
    """
    given = _given(arguments)
    with without_autocast(given.x.device):
        if not given.x.shape[1]:
            y = given.x.new_empty(given.shape)
            return _gated(given, y).to(given.out_dtype), *(_unmoved(given) if final else (None,) * 4), y if save else None
        f = _factors(given)
        y, state = kernel.forward(**_inner(f), final=final)
        y = y.view(given.shape)
        for i in range(given.ranks):  # what key i of a token adds to the token's own outputs
            y.addcmul_((_weights(f, i) * (f.q * _rank(f.k, i)).sum(-1)).unsqueeze(-1), _rank(f.v, i))
        if given.D is not None:
            y.addcmul_(given.D[:, None], f.v)
        states = (None,) * 4
        if final:
            states = _last(given, f, state)
        return _gated(given, y).to(given.out_dtype), *states, y if save else None


def backward(kernel, *, dout, dangle, dstate, dk, dv, y, **arguments):
    """Gradients of every tensor, None where that input is, each in its input's dtype. y: as `forward` kept it."""
    given = _given(arguments)
    with without_autocast(given.x.device):
        dstates = [t if t is None else t.to(given.dtype) for t in plain(dangle, dstate, dk, dv)]
        found = dict.fromkeys(given.inputs)
        if given.x.numel():
            _gradients(kernel, given, plain(dout)[0].to(given.dtype).contiguous(), dstates, y, found)
        for name, d in zip(given.inputs, [None] * (len(given.inputs) - len(_STATES)) + dstates, strict=True):
            t = given.inputs[name]
            if t is not None and found[name] is None:  # no tokens
                found[name] = torch.zeros_like(t, dtype=given.dtype) if d is None else d.clone()
        return tuple(None if t is None else found[name].to(t.dtype).contiguous() for name, t in given.inputs.items())


def _given(arguments):
    """The arguments, tensors plain, contiguous and of the compute type, biases and mimo (r,h,·); inputs: the tensors as they came."""
    walk = {name: arguments.pop(name) for name in ("index", "starts", "reverse", "pairs", "per_rank")}
    sequences = arguments.pop("sequences", None)
    inputs = dict(zip(arguments, plain(*arguments.values()), strict=True))
    dtype = compute_dtype(*inputs.values())
    wide = {name: None if t is None else t.to(dtype).contiguous() for name, t in inputs.items()}
    for name in ("B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"):
        if wide[name] is not None:
            wide[name] = wide[name].transpose(0, 1).contiguous()
    if wide["angles"].dim() == 3:
        wide["angles"] = wide["angles"].unsqueeze(2)
    given = SimpleNamespace(**wide, **walk, sequences=sequences, inputs=inputs, dtype=dtype, out_dtype=inputs["x"].dtype)
    batch, length, heads, size = given.x.shape
    given.ranks = given.B.shape[2]
    given.shape = (batch, length, given.ranks, heads, size)
    return given


def _factors(given):
    """What the recurrence is made of: now, later, q, k, v as named above, and before = S'_0 with its parts."""
    steps = Steps(given.x.shape[1], given.index, given.starts, given.reverse, given.sequences, given.x.device)
    initial = [steps.with_tokens(getattr(given, name)) for name in _STATES]
    mix = torch.sigmoid(given.trap)
    rate = torch.tanh(given.angles)
    angle, angle_last = steps.angles(rate, given.dt, initial[0])
    turn = torch.cos(angle).unsqueeze(2), torch.sin(angle).unsqueeze(2)
    held = (1 - mix) * given.dt
    f = SimpleNamespace(steps=steps, initial=initial, mix=mix, rate=rate, turn=turn, angle_last=angle_last, before=None)
    f.q, f.k, f.v = _turned(given.C, given.C_bias, turn, given), _turned(given.B, given.B_bias, turn, given), _ranked(given, given.x, 2)
    f.now, f.later, f.g = mix * given.dt, steps.following(held), given.dt * given.A
    if initial[0] is not None:  # S'_0 = S_0 + later_0 x_0 k_0^T; a sequence without tokens keeps its S_0
        f.v0 = _ranked(given, initial[3], 1)
        f.first_held = steps.at(held, steps.first)[..., None, None]
        f.pairs0 = torch.einsum("brhn,brhp->bhnp", initial[2], f.v0)
        f.before = given.initial_state.transpose(2, 3).clone(memory_format=torch.contiguous_format)
        _add_rows(f.before, steps, f.first_held * f.pairs0)
    return f


def _turned(t, bias, turn, given):
    """B or C of every head (b,l,r,h,n), with its bias, turned."""
    if bias is None:
        t = t.repeat_interleave(given.x.shape[2] // t.shape[3], dim=3)
    else:
        t = (t.unsqueeze(4) + bias.unflatten(1, (t.shape[3], -1))).flatten(3, 4)
    _turn(t, *turn, given.pairs)
    return t


def _turn(t, cos, sin, pairs):
    """Turns t (b,l,r,h,n) in place."""
    angles = cos.shape[-1]
    if _complex(t, pairs):
        _numbers(t, angles).mul_(torch.complex(cos, sin))
    else:
        one, two = (t[..., channels] for channels in paired(pairs, angles, t.shape[-1]))
        first = one * cos - two * sin
        two.mul_(cos).addcmul_(one, sin)
        one.copy_(first)


def _complex(t, pairs):
    """Whether pairs of channels are complex numbers in memory: then turning is one multiplication."""
    return pairs == "adjacent" and t.shape[-1] % 2 == 0


def _numbers(t, angles):
    """The pairs that turn as complex numbers, a view."""
    return torch.view_as_complex(t[..., : 2 * angles].unflatten(-1, (angles, 2)))


def _ranked(given, x, dim):
    """What each rank has of x, in a new dimension."""
    return x.unsqueeze(dim).expand(*x.shape[:dim], given.ranks, *x.shape[dim:]) if given.mimo_x is None else x.unsqueeze(dim) * given.mimo_x


def _inner(f):
    """The arguments of gated linear attention, a token as r steps."""
    batch, length, ranks, heads = f.k.shape[:4]
    g = f.g.unsqueeze(2)
    if ranks > 1:
        g = torch.cat([g, g.new_zeros(batch, length, ranks - 1, heads)], 2)
    w = f.v * (f.now + f.later)[:, :, None, :, None]
    q, k, w, g = (t.reshape(batch, length * ranks, *t.shape[3:]) for t in (f.q, f.k, w, g))
    index, starts, reverse, sequences = f.steps.micro(ranks)
    walk = {"index": index, "starts": starts, "reverse": reverse, "sequences": sequences}
    return {"q": q, "k": k, "v": w, "g": g, "scale": 1.0, "initial_state": f.before, **walk}


def _weights(f, i):
    """What the state's kernel lacks of key i of a token for that token's queries, (b,l,r,h)."""
    ranks = f.k.shape[2]
    return torch.cat([f.now.unsqueeze(2).expand(-1, -1, i, -1), -f.later.unsqueeze(2).expand(-1, -1, ranks - i, -1)], 2)


def _rank(v, i):
    return v[:, :, i : i + 1]


def _gated(given, y):
    """out of y (b,l,r,h,p): gated, and the ranks summed."""
    out = y.clone() if given.z is None else y * functional.silu(_gate(given))
    if given.mimo_o is not None:
        return (out * given.mimo_o).sum(2)
    return out if given.per_rank else out.squeeze(2)


def _gate(given):
    return given.z.unsqueeze(2) if given.mimo_z is None else given.z.unsqueeze(2) * given.mimo_z


def _unmoved(given):
    """The states before the first step, zeros where there are none."""
    batch = given.x.shape[0] if given.sequences is None else given.sequences.count
    heads, size = given.x.shape[2:]
    shapes = (heads, given.angles.shape[3]), (heads, size, given.B.shape[4]), (given.ranks, heads, given.B.shape[4]), (heads, size)
    before = [getattr(given, name) for name in _STATES]
    return [given.x.new_zeros(batch, *shape) if t is None else t.clone() for t, shape in zip(before, shapes, strict=True)]


def _last(given, f, state):
    """The states after the last step; state: of the kernel."""
    angle, k, x = f.angle_last, f.steps.at(f.k, f.steps.last), f.steps.at(given.x, f.steps.last)
    if f.steps.rows is not None:  # a sequence without tokens keeps its own
        before = _unmoved(given)
        angle, k, x = (t.index_copy_(0, f.steps.rows, rows) for t, rows in zip((before[0], *before[2:]), (angle, k, x), strict=True))
    return angle, state.transpose(2, 3).contiguous(), k, x


def _add_rows(state, steps, values):
    if steps.rows is None:
        state += values
    else:
        state.index_add_(0, steps.rows, values)


def _total(t, kept):
    """The sum over all but the dimensions of the given numbers, added in float64."""
    return t.sum([axis for axis in range(t.dim()) if axis not in kept], dtype=torch.float64).to(t.dtype)


def _gradients(kernel, given, dout, dstates, y, found):
    """Fills `found`."""
    f, ranks = _factors(given), given.ranks
    steps, (dangle_last, dstate, dk_last, dv_last) = f.steps, dstates

    dout = dout if given.per_rank else dout.unsqueeze(2)
    dy = (dout if given.mimo_o is None else dout * given.mimo_o).expand(given.shape)
    if given.z is None:
        gated = y
    else:
        gate = _gate(given)
        silu = functional.silu(gate)
        gated, sigmoid = y * silu, torch.sigmoid(gate)
        dgate = dy * y * (sigmoid + silu * (1 - sigmoid))
        dy = dy * silu
        found["z"] = (dgate if given.mimo_z is None else dgate * given.mimo_z).sum(2)
        if given.mimo_z is not None:
            found["mimo_z"] = _total(dgate * given.z.unsqueeze(2), (2, 3, 4)).transpose(0, 1)
    if given.mimo_o is not None:
        found["mimo_o"] = _total(dout * gated, (2, 3, 4)).transpose(0, 1)

    dy = dy.contiguous()
    inner = kernel.backward(dout=dy.flatten(1, 2), dstate=None if dstate is None else dstate.transpose(2, 3), **_inner(f))
    dq, dk, dw = (t.view(t.shape[0], -1, ranks, *t.shape[2:]) for t in inner[:3])
    dg, dbefore = inner[3].view(*given.shape[:4])[:, :, 0], inner[4]
    dnow = (dw * f.v).sum((2, 4))
    dlater = dnow.clone()
    dv = dw.mul_((f.now + f.later)[:, :, None, :, None])
    for i in range(ranks):
        weights, product, along = _weights(f, i), (f.q * _rank(f.k, i)).sum(-1), (dy * _rank(f.v, i)).sum(-1)
        dvalue, dproduct, dweights = (weights * product).unsqueeze(-1), (weights * along).unsqueeze(-1), along * product
        dq.addcmul_(dproduct, _rank(f.k, i))
        for j in range(ranks):
            dv[:, :, i].addcmul_(dvalue[:, :, j], dy[:, :, j])
            dk[:, :, i].addcmul_(dproduct[:, :, j], f.q[:, :, j])
        dnow += dweights[:, :, :i].sum(2)
        dlater -= dweights[:, :, i:].sum(2)
    if given.D is not None:
        found["D"] = _total(dy * f.v, (3,))
        dv.addcmul_(given.D[:, None], dy)
    if dk_last is not None:
        steps.add(dk, steps.last, steps.with_tokens(dk_last))

    dheld = steps.preceding(dlater)
    dmimo_x = None if given.mimo_x is None else _total(dv * given.x.unsqueeze(2), (2, 3, 4))
    if f.before is not None:
        dpairs = steps.with_tokens(dbefore)
        steps.add(dheld, steps.first, (dpairs * f.pairs0).sum((2, 3)))
        dpairs = dpairs * f.first_held
        dv0 = torch.einsum("bhnp,brhn->brhp", dpairs, f.initial[2])
        dk0 = torch.einsum("bhnp,brhp->brhn", dpairs, f.v0)
        if dmimo_x is not None:
            dmimo_x += _total(dv0 * f.initial[3].unsqueeze(1), (1, 2, 3))
        found["initial_k"] = _at_start(given, steps, dk0, dk_last, given.initial_k)
        found["initial_v"] = _at_start(given, steps, (dv0 if given.mimo_x is None else dv0 * given.mimo_x).sum(1), dv_last, given.initial_v)
        found["initial_state"] = dbefore.transpose(2, 3)
    if dmimo_x is not None:
        found["mimo_x"] = dmimo_x.transpose(0, 1)
    dx = (dv if given.mimo_x is None else dv * given.mimo_x).sum(2)
    if dv_last is not None:
        steps.add(dx, steps.last, steps.with_tokens(dv_last))
    found["x"] = dx

    # The rotations: the turned channels and their gradients give the angle's, and turning back gives those of B and C.
    dangle = _angle_gradient(dq, f.q, given) + _angle_gradient(dk, f.k, given)
    for name, d in (("C", dq), ("B", dk)):
        _turn(d, f.turn[0], -f.turn[1], given.pairs)
        if getattr(given, f"{name}_bias") is not None:
            found[f"{name}_bias"] = _total(d, (2, 3, 4)).transpose(0, 1)
        found[name] = d.unflatten(3, (given.B.shape[3], -1)).sum(4)
    if dangle_last is not None:
        steps.add(dangle, steps.last, steps.with_tokens(dangle_last))
    dturn = steps.remaining(dangle)
    if f.before is not None:
        found["initial_angle"] = _at_start(given, steps, steps.at(dturn, steps.first), dangle_last, given.initial_angle)
    dturn = dturn * math.pi
    dangles = dturn * given.dt.unsqueeze(-1) * (1 - f.rate**2)
    found["angles"] = dangles if given.inputs["angles"].dim() == 4 else dangles.sum(2)

    found["dt"] = f.mix * dnow + (1 - f.mix) * dheld + given.A * dg + (dturn * f.rate).sum(-1)
    found["A"] = given.dt * dg
    found["trap"] = given.dt * (dnow - dheld) * f.mix * (1 - f.mix)


def _angle_gradient(d, t, given):
    """The gradient (b,l,h,a) of the angles that turned t, from its own. As complex numbers it would be imag(d conj(t)), but conj() of PyTorch marks a
    view, and within an operator that a dispatch mode (FlopCounterMode) looks at, the mark is ignored."""
    one, two = paired(given.pairs, given.angles.shape[-1], t.shape[-1])
    return (d[..., two] * t[..., one] - d[..., one] * t[..., two]).sum(2)


def _at_start(given, steps, gradient, dlast, initial):
    """The gradient of an initial state: of those with tokens `gradient`, of the others what the final state has."""
    if steps.rows is None:
        return gradient
    out = torch.zeros_like(initial) if dlast is None else dlast.clone()
    out[steps.rows] = gradient
    return out
