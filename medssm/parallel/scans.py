"""The ops of medssm.ops on slabs.

A recurrence is linear in its state: what a run of the walk makes of the state before it is

    last = end + decay . first        end: the last state from zeros;   decay: a number per element, or a matrix, from the decays alone

(ssd3's state has an angle too, by which what the run makes is turned: see `_after_ssd3`.)
So every rank scans its run from zeros for its end, the ranks give each other ends and decays, each finds the state that its run begins with, and
scans with that. The first rank's first scan is its result, and the last rank's end is not needed: each of two ranks scans once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.ssd3.reference import rotated
from medssm.ops import shapes
from medssm.ops.op import OPS, Op
from medssm.orders import Order, raster
from medssm.parallel.walks import Part, part

if TYPE_CHECKING:
    from medssm.parallel.slabs import Slabs

_STEEPEST = -60.0  # a decay of bi_wkv below this, over the length of a volume, takes weights out of float32


def over_ranks(
    slabs: Slabs,
    op: Op,
    tensors: tuple[Tensor | None, ...],
    *,
    sizes: shapes.Sizes,
    options: Mapping[str, Any],
    order: Any,
    reverse: bool,
    cu_seqlens: Any,
    final: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """(output, states…) of an op for this rank's tokens; sizes are those of its slab."""
    named: dict[str, Any] = dict(zip(op.names, tensors, strict=True))
    call = _Call(slabs, op, dict(options), dict(sizes), backend)
    if op.name == "depthwise_conv":
        return (_depthwise(call, named),)
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None over ranks, which share one volume, got a tensor")
    if op.name == "selective_scan_nd":
        return (_many(call, named, list(order)),)
    walked = _order(order, reverse)
    if op.name == "bi_wkv":
        return (_bi_wkv(call, named, walked),)
    if op.name == "linear_attention" and not options["causal"]:
        return _everywhere(call, named)
    if op.name not in _DECAYS:
        raise ValueError(f"{op.name}: it is not done over ranks: leave parallel.Slabs out")
    path = part(slabs, _forward(walked), sizes["*l"])
    tokens = {given.name: named[given.name] for given in op.inputs if given.tokens and named[given.name] is not None}
    scan = _Scan(call, {**named, **_moved(slabs, tokens, sizes["*l"], path)}, path, walked.reverse)
    _carry(slabs, [scan])
    out = _back(slabs, scan.y, sizes["*l"], path)
    return (out, *_last(slabs, scan)) if final else (out,)


@dataclass
class _Call:
    """An op, and what does not change between its scans."""

    slabs: Slabs
    op: Op
    options: dict[str, Any]
    sizes: shapes.Sizes
    backend: str | None

    def __call__(
        self, named: Mapping[str, Tensor | None], order: Any = None, reverse: bool = False, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(output, states) of what this rank holds, alone."""
        walk: dict[str, Any] = {"order": order, "reverse": reverse, "cu_seqlens": cu_seqlens} if self.op.walk == "one" else {}
        tensors = [named[name] for name in self.op.names]
        if isinstance(order, Tensor):
            walk["order"] = order.to(tensors[self.op.main].device)  # type: ignore[union-attr]
        found = self.op(*tensors, options=self.options, **walk, return_final_state=bool(self.op.states), backend=self.backend)
        if not self.op.states:
            return found, ()
        out, state = found
        return out, state if isinstance(state, tuple) else (state,)


@dataclass
class _Scan:
    """One scan along one order. named: the op's tensors, tokens as this rank holds them while it walks its part; y: the output, states: the last."""

    call: _Call
    named: dict[str, Any]
    part: Part
    reverse: bool
    y: Any = None
    states: tuple[Tensor, ...] = ()

    @property
    def ranks(self) -> Sequence[int]:
        """In the order of the walk."""
        return self.part.ranks[::-1] if self.reverse else self.part.ranks

    @property
    def main(self) -> Tensor:
        found: Tensor = self.named[self.call.op.inputs[self.call.op.main].name]
        return found

    @property
    def initial(self) -> dict[str, Tensor | None]:
        """The state before the first step."""
        return {name: t for name, t in self.named.items() if name.startswith("initial_")}

    def run(self, first: Sequence[Tensor] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(output, states) of this rank's part, from the state `first`, or from the one that the caller gave."""
        named = {**self.named, **dict(zip(self.initial, first, strict=True))} if first else self.named
        return self.call(named, self.part.order, self.reverse)

    def segments(self) -> Tensor:
        """The output of several segments, which packed sequences are."""
        starts, named, op, length = self.part.starts, self.named, self.call.op, self.main.shape[1]
        assert starts is not None
        bounds = torch.cat([starts, starts.new_tensor([length])]) if length else starts.new_tensor([0, 0])
        outs = []
        for i in range(self.main.shape[0]):  # packed sequences are one batch element
            one = {given.name: named[given.name] for given in op.inputs}
            one.update({given.name: one[given.name][i : i + 1] for given in op.inputs if given.axes[0] == "b" and one[given.name] is not None})
            outs.append(self.call(one, self.part.order, self.reverse, bounds.to(self.main.device))[0])
        return torch.cat(outs)

    def shapes(self, place: int) -> list[tuple[int, ...]]:
        """Of what the rank at this place of the walk gives those behind it: the states, and between the first and the last the decay."""
        sizes, op = self.call.sizes, self.call.op
        found = [shapes.shape(axes, sizes) for axes in op.states.values()]
        decay = _DECAYS[op.name]
        if decay is not None and 0 < place < len(self.ranks) - 1:
            found.append(decay.shape(self))
        return found


def _carry(slabs: Slabs, scans: Sequence[_Scan]) -> None:
    """Scan them all, each rank its part; one exchange serves them all."""
    rank, count = slabs.ranks.rank, slabs.ranks.count
    carried = [scan for scan in scans if scan.ranks]
    for scan in scans:
        if scan.ranks:
            continue
        if any(t is not None for t in scan.initial.values()):
            raise ValueError("initial_state: expected None over ranks with an order of several segments, got a tensor")
        scan.y = scan.segments()
    given: list[list[Tensor]] = []
    for scan in carried:
        place = scan.ranks.index(rank)
        if place == 0:
            scan.y, scan.states = scan.run()
            given.append(list(scan.states))
        elif place < count - 1:
            decay, end = _DECAYS[scan.call.op.name], _end(scan)
            given.append([*end, *([] if decay is None else [decay.make(scan)])])
        else:
            given.append([])
    if count == 1 or not carried:
        return
    places = [{q: place for place, q in enumerate(scan.ranks)} for scan in carried]
    sends, counts, coming = [], [], []
    like = carried[0].main.new_empty(0, dtype=_state_type(carried[0]))
    for q in range(count):
        mine = [t.flatten() for at, ts in zip(places, given, strict=True) for t in ts if at[rank] < at[q]]
        theirs = [[shape for shape in scan.shapes(at[q])] if at[q] < at[rank] else [] for scan, at in zip(carried, places, strict=True)]
        sends.append(torch.cat(mine) if mine else like)
        coming.append(theirs)
        counts.append((sum(math.prod(shape) for some in theirs for shape in some),))
    through = [scan for scan in carried if scan.y is not None]
    received, passed = slabs.ranks.exchange(sends, counts, [scan.y for scan in through] or [carried[0].main])
    for scan, y in zip(through, passed, strict=False):
        scan.y = y
    told = []  # of each rank, for each scan, the tensors
    for flat, theirs in zip(received, coming, strict=True):
        pieces = iter(flat.split([math.prod(shape) for some in theirs for shape in some]))
        told.append([[next(pieces).view(shape) for shape in some] for some in theirs])
    for i, (scan, at) in enumerate(zip(carried, places, strict=True)):
        if at[rank]:
            scan.y, scan.states = scan.run(_first(scan, [told[q][i] for q in scan.ranks[: at[rank]]]))


def _first(scan: _Scan, told: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The states that this rank's part begins with, from what the ranks before it gave, in the order of the walk."""
    first = list(told[0])
    decay = _DECAYS[scan.call.op.name]
    for state in told[1:]:
        if scan.call.op.name == "causal_conv1d":
            first = list(state)
        elif decay is None:
            first = [end + before for end, before in zip(state, first, strict=True)]
        elif scan.call.op.name == "ssd3":
            first = _after_ssd3(scan, first, *state)
        else:
            first = [state[0] + decay.apply(state[1], first[0])]
    return first


def _end(scan: _Scan) -> tuple[Tensor, ...]:
    """The last states of this rank's part from zeros."""
    if scan.call.op.name == "causal_conv1d":
        taps = scan.call.sizes["taps"]
        return (_last_tokens(scan, taps),)
    return scan.run()[1] if all(t is None for t in scan.initial.values()) else scan.run(_zeros(scan))[1]


def _zeros(scan: _Scan) -> list[Tensor]:
    return [scan.main.new_zeros(shapes.shape(axes, scan.call.sizes), dtype=_state_type(scan)) for axes in scan.call.op.states.values()]


def _last_tokens(scan: _Scan, taps: int) -> Tensor:
    """(b, d, taps): those at the last steps of a part."""
    flat, index = _walked(scan, scan.main)
    if len(index) < taps:
        raise ValueError(f"x: expected at least {taps} tokens, the taps of causal_conv1d, in each rank's part, got {len(index)}")
    return flat.index_select(1, index[len(index) - taps :]).mT


def _walked(scan: _Scan, t: Tensor) -> tuple[Tensor, Tensor]:
    """((b, l, c) of tokens (b, *l, c), the token at each step of a part)."""
    order, flat = scan.part.order, t.flatten(1, -2)
    index = order.index(t.shape[1:-1]) if isinstance(order, Order) else torch.arange(flat.shape[1]) if order is None else order
    return flat, (index.flip(0) if scan.reverse else index).to(t.device)


def _last(slabs: Slabs, scan: _Scan) -> list[Tensor]:
    """The last states of the whole walk, on every rank."""
    if not scan.ranks:
        raise ValueError("return_final_state: expected False over ranks with an order of several segments, got True")
    source, rank = scan.ranks[-1], slabs.ranks.rank
    sizes = [shapes.shape(axes, scan.call.sizes) for axes in scan.call.op.states.values()]
    total = sum(math.prod(shape) for shape in sizes)
    flat = torch.cat([t.flatten() for t in scan.states]) if rank == source else scan.main.new_empty(0, dtype=_state_type(scan))
    received, (scan.y,) = slabs.ranks.exchange(
        [flat] * slabs.ranks.count, [(total if q == source else 0,) for q in range(slabs.ranks.count)], [scan.y]
    )
    return [t.view(shape) for t, shape in zip(received[source].split([math.prod(shape) for shape in sizes]), sizes, strict=True)]


def _state_type(scan: _Scan) -> torch.dtype:
    if scan.call.op.states_like_main:
        return scan.main.dtype
    return compute_dtype(*(t for t in scan.named.values() if isinstance(t, Tensor)))


# -- decays: what a part leaves of the state before it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decay:
    shape: Callable[[_Scan], tuple[int, ...]]
    make: Callable[[_Scan], Tensor]
    apply: Callable[[Tensor, Tensor], Tensor] = torch.mul


def _summed(t: Tensor, features: int) -> Tensor:
    """The sum over the tokens of (b, *l, *features)."""
    return t.flatten(1, t.dim() - 1 - features).sum(1)


def _selective(scan: _Scan) -> Tensor:
    named, wide = scan.named, _state_type(scan)
    delta, A = named["delta"].to(wide), named["A"].to(wide)
    if named["delta_proj"] is not None:
        delta = functional.linear(delta, named["delta_proj"].to(wide))
    if named["delta_bias"] is not None:
        delta = delta + named["delta_bias"].to(wide)
    steps = _summed(functional.softplus(delta) if scan.call.options["delta_softplus"] else delta, 1)
    return torch.exp(steps.unsqueeze(-1) * A)


def _ssd(scan: _Scan) -> Tensor:
    named, options, wide = scan.named, scan.call.options, _state_type(scan)
    dt = named["dt"].to(wide)
    if named["dt_bias"] is not None:
        dt = dt + named["dt_bias"].to(wide)
    steps = (functional.softplus(dt) if options["dt_softplus"] else dt).clamp(options["low"], options["high"])
    return torch.exp(_summed(steps, 1) * named["A"].to(wide))[..., None, None]


def _by_head(scan: _Scan) -> bool:
    """Whether a head has one decay, not one for each row of its state."""
    return bool(scan.named["g"].dim() < scan.named["k"].dim())


def _gated(scan: _Scan) -> Tensor:
    g = scan.named["g"].to(_state_type(scan))
    return torch.exp(_summed(g, 1))[..., None, None] if _by_head(scan) else torch.exp(_summed(g, 2))[..., None]


def _delta(scan: _Scan) -> Tensor:
    """(b, h, dk, dk): the last state of the unit matrix where all values are zero."""
    sizes, k = scan.call.sizes, scan.named["k"]
    unit = torch.eye(sizes["dk"], device=k.device, dtype=_state_type(scan)).expand(sizes["b"], sizes["h"], -1, -1)
    named = {**scan.named, "v": torch.zeros_like(k), "initial_state": unit}
    return scan.call(named | ({"write": None} if "write" in named else {}), scan.part.order, scan.reverse)[1][0]


def _ssd3(scan: _Scan) -> Tensor:
    """(2, b, h): how much of the state before a part is left of it, and how much the part's first step holds of the token before it."""
    wide = _state_type(scan)
    dt, A, trap = (scan.named[name].to(wide) for name in ("dt", "A", "trap"))
    held, index = _walked(scan, (1 - torch.sigmoid(trap)) * dt)
    return torch.stack([torch.exp(_summed(dt * A, 1)), held[:, index[0]]])


def _after_ssd3(scan: _Scan, first: Sequence[Tensor], angle: Tensor, S: Tensor, k: Tensor, x: Tensor, decay: Tensor) -> list[Tensor]:
    """ssd3's state after a part that begins with the state `first`; angle, S, k, x: after the part from zeros.

    All keys of the part are turned by first's angle. The last token before the part enters S at its first step.
    """
    (begun, matrix, key, value), pairs, mimo = first, scan.call.options["pairs"], scan.named["mimo_x"]
    values = value.unsqueeze(1).expand(-1, key.shape[1], -1, -1) if mimo is None else value.unsqueeze(1) * mimo.transpose(0, 1).to(value.dtype)
    entered = torch.einsum("brhp,brhn->bhpn", values, key)
    left, held = (t[..., None, None] for t in decay)
    S = rotated(S, begun.unsqueeze(2), pairs) + left * (matrix + held * entered)
    return [torch.remainder(begun + angle, 2 * math.pi), S, rotated(k, begun.unsqueeze(1), pairs), x]


_DECAYS: dict[str, _Decay | None] = {
    "selective_scan": _Decay(lambda scan: shapes.shape(("b", "d", "n"), scan.call.sizes), _selective),
    "ssd": _Decay(lambda scan: (*shapes.shape(("b", "h"), scan.call.sizes), 1, 1), _ssd),
    "gated_linear_attention": _Decay(
        lambda scan: (*shapes.shape(("b", "h"), scan.call.sizes), 1 if _by_head(scan) else scan.call.sizes["dk"], 1), _gated
    ),
    "ssd3": _Decay(lambda scan: (2, *shapes.shape(("b", "h"), scan.call.sizes)), _ssd3),
    "delta_rule": _Decay(lambda scan: shapes.shape(("b", "h", "dk", "dk"), scan.call.sizes), _delta, torch.matmul),
    "linear_attention": None,  # sums do not decay
    "causal_conv1d": None,  # its state is the last tokens
}


# -- ops that need more than one carried state -----------------------------------------------------------------------------------------------------


def _many(call: _Call, named: Mapping[str, Any], walks: Sequence[Order]) -> Tensor:
    """selective_scan_nd: a selective scan for each order; orders that take the same tokens share the moves."""
    slabs, spatial, x, merge = call.slabs, call.sizes["*l"], named["x"], call.options["merge"]
    own = x.dim() == named["delta"].dim()  # an input for each order
    one = _Call(slabs, OPS["selective_scan"], {"delta_softplus": call.options["delta_softplus"]}, call.sizes, call.backend)
    wide = compute_dtype(*(t for t in named.values() if isinstance(t, Tensor)))
    groups: dict[Order, list[int]] = {}
    for k, order in enumerate(walks):
        groups.setdefault(_forward(order), []).append(k)
    scans: dict[int, _Scan] = {}
    for order, group in groups.items():
        path = part(slabs, order, spatial)
        tokens = {} if own else {"u": x}
        for k in group:
            tokens |= {f"{name}{k}": named[name].select(len(spatial) + 1, k) for name in ("delta", "B", "C")}
            tokens |= {f"u{k}": x[..., k, :]} if own else {}
        here = _moved(slabs, tokens, spatial, path)
        for k in group:
            weights = {name: None if named[name] is None else named[name][k] for name in ("A", "D", "delta_bias", "delta_proj")}
            given = {"u": here[f"u{k}" if own else "u"], **{name: here[f"{name}{k}"] for name in ("delta", "B", "C")}}
            scans[k] = _Scan(one, {**given, **weights, "z": None, "initial_state": None}, path, walks[k].reverse)
    _carry(slabs, list(scans.values()))
    if merge == "stack":
        out = torch.stack([_back(slabs, scans[k].y, spatial, scans[k].part) for k in range(len(walks))], -2)
    else:
        sums = [_back(slabs, sum(scans[k].y.to(wide) for k in group), spatial, scans[group[0]].part) for group in groups.values()]
        out = sum(sums[1:], sums[0]) / (len(walks) if merge == "mean" else 1)
    if named["z"] is not None:
        z = functional.silu(named["z"].to(wide))
        out = out * (z.unsqueeze(-2) if merge == "stack" else z)
    return out.to(x.dtype)


def _bi_wkv(call: _Call, named: Mapping[str, Any], order: Order) -> Tensor:
    """Both directions are selective scans that see the token itself too, which is taken out. Keys are shifted by each channel's largest one."""
    slabs, spatial = call.slabs, call.sizes["*l"]
    if call.options["mode"] != "exact":
        raise ValueError(f"mode: expected 'exact' over ranks, got {call.options['mode']!r}")
    wide = compute_dtype(*named.values())
    w, u, k, v = (named[name].to(wide) for name in ("w", "u", "k", "v"))
    length = math.prod(slabs.whole(spatial))
    if w.detach().min() * length < _STEEPEST:
        raise ValueError(f"w: expected at least {_STEEPEST:g} / l over ranks, l = {length} tokens, got {w.min().item():g}")
    largest = slabs.ranks.largest(k.detach().flatten(1, -2).amax(1)).view(k.shape[0], *[1] * len(spatial), -1)
    weight = torch.exp(k - largest)
    both = torch.cat([weight * v, weight], -1)
    path = part(slabs, _forward(order), spatial)
    here = _moved(slabs, {"u": both}, spatial, path)["u"]
    ones = torch.ones_like(here)
    sizes = {**call.sizes, "d": here.shape[-1], "n": 1}
    scan = _Call(slabs, OPS["selective_scan"], {"delta_softplus": False}, sizes, call.backend)
    given: dict[str, Any] = {"u": here, "delta": ones, "A": -torch.cat([w, w])[:, None], "B": ones[..., None, :1], "C": ones[..., None, :1]}
    given |= dict.fromkeys(("D", "z", "delta_bias", "delta_proj", "initial_state"))
    scans = [_Scan(scan, given, path, reverse) for reverse in (False, True)]
    _carry(slabs, scans)
    y = _back(slabs, scans[0].y + scans[1].y, spatial, path)
    over, under = (torch.exp(torch.cat([w, w])) * (y - 2 * both) + torch.exp(torch.cat([u, u])) * both).chunk(2, -1)
    return (over / under).to(named["v"].dtype)


def _everywhere(call: _Call, named: dict[str, Any]) -> tuple[Tensor, ...]:
    """Linear attention that is not causal: every token sees the sums of all ranks."""
    ranks, initial, spatial = call.slabs.ranks, ("initial_kv", "initial_k"), call.sizes["*q"]
    named = {name: shapes.flat(t, len(spatial)) if name in ("q", "k", "v") else t for name, t in named.items()}
    given = [named[name] for name in initial]
    own = call({**named, **dict.fromkeys(initial)})[1]
    flat = torch.cat([t.flatten() for t in own])
    received, _ = ranks.exchange([flat] * ranks.count, [(flat.numel(),)] * ranks.count)
    others = sum((t for q, t in enumerate(received) if q != ranks.rank), torch.zeros_like(flat))
    first = [t.view(like.shape) for t, like in zip(others.split([t.numel() for t in own]), own, strict=True)]
    first = [t if before is None else t + before for t, before in zip(first, given, strict=True)]
    out, last = call({**named, **dict(zip(initial, first, strict=True))})
    return out.unflatten(1, spatial), *last


def _depthwise(call: _Call, named: dict[str, Any]) -> Tensor:
    x = named["x"]
    dim = 1 + call.slabs.first_row(x.shape[1:-1])[0]
    margin = named["weight"].shape[dim] // 2
    if not margin:
        return call(named)[0]
    return call({**named, "x": call.slabs.margins(x, dim, margin, margin)})[0].narrow(dim, margin, x.shape[dim])


# -- tokens ----------------------------------------------------------------------------------------------------------------------------------------


def _order(order: Any, reverse: bool) -> Order:
    if isinstance(order, Tensor):
        raise ValueError("order: expected an Order over ranks, which says how the whole volume is walked, got a tensor")
    found = raster() if order is None else order
    return found.reversed() if reverse else found


def _forward(order: Order) -> Order:
    return order.reversed() if order.reverse else order


def _moved(slabs: Slabs, tokens: Mapping[str, Tensor], spatial: Sequence[int], path: Part) -> dict[str, Tensor]:
    """The tokens (b, *spatial, …) of this rank's slab as those of its part of a walk: as they are, or (b, l, …)."""
    if isinstance(path.order, Order):
        return dict(tokens)
    flat = {name: shapes.flat(t, len(spatial)) for name, t in tokens.items()}
    if path.give is None:
        return flat
    found: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in flat.values()):
        some = {name: t for name, t in flat.items() if t.dtype == dtype}
        packed = torch.cat([t.flatten(2) for t in some.values()], -1)
        sends = [packed.index_select(1, give.to(packed.device)) for give in path.give]
        received, _ = slabs.ranks.exchange(sends, [(packed.shape[0], count, packed.shape[-1]) for count in path.take])
        pieces = torch.cat(received, 1).split([math.prod(t.shape[2:]) for t in some.values()], -1)
        found |= {name: piece.unflatten(-1, t.shape[2:]) for (name, t), piece in zip(some.items(), pieces, strict=True)}
    return found


def _back(slabs: Slabs, y: Tensor, spatial: Sequence[int], path: Part) -> Tensor:
    """What a rank computed for its part, where its tokens are: (b, *spatial, …)."""
    if isinstance(path.order, Order):
        return y
    if path.give is not None:
        sends = [t.flatten(2) for t in y.split(list(path.take), 1)]
        received, _ = slabs.ranks.exchange(sends, [(y.shape[0], len(give), math.prod(y.shape[2:])) for give in path.give])
        places = torch.argsort(torch.cat(list(path.give)))
        y = torch.cat(received, 1).index_select(1, places.to(y.device)).unflatten(-1, y.shape[2:])
    return y.reshape(y.shape[0], *spatial, *y.shape[2:])
