"""How far a mixer sees: the influence of every voxel on one, along each scan order, out of the op's own linear map.

With everything but its input held fixed (steps, decays, keys, queries), each op of medssm.ops is linear in that input, and no channel meets another.
One row of that map is one gradient: of the output at the target with respect to the input.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medssm import ops
from medssm.nn import sizes
from medssm.nn.unet import AnySize
from medssm.orders import Order, raster

# {op: (what it is linear in, the axes of that behind the tokens)}
_INPUTS = {
    "selective_scan": ("u", 1),
    "selective_scan_nd": ("x", 1),
    "ssd": ("x", 2),
    "ssd3": ("x", 2),
    "gated_linear_attention": ("v", 2),
    "delta_rule": ("v", 2),
    "linear_attention": ("v", 2),
    "bi_wkv": ("v", 1),
}
_LEFT_OUT = ("D", "z", "mimo_z", "initial_state", "return_final_state")  # what does not go through the state, or comes from elsewhere


@dataclass(frozen=True)
class Reach:
    """What one op of a layer carries to a target along one order.

    layer      the layer's name in the network
    op         the name in medssm.ops
    order      how it walks, as `Order.spec`; "" where it sees all voxels at once
    target     the target's voxel, at the layer's resolution
    stride     voxels of the network's input in one of the layer's, along each axis
    influence  (*spatial), at the layer's resolution: see `influence`
    steps      (*spatial), how many steps of the walk lie between a voxel and the target, positive where the voxel comes first; None without order
    """

    layer: str
    op: str
    order: str
    target: tuple[int, ...]
    stride: tuple[float, ...]
    influence: Tensor
    steps: Tensor | None

    def distance(self, spacing: Sequence[float]) -> Tensor:
        """(*spatial): the millimetres from each voxel's centre to the target's, of an input with voxels of `spacing` millimetres."""
        axes = [torch.arange(n, dtype=torch.float64) - t for n, t in zip(self.influence.shape, self.target, strict=True)]
        squares = [(axis * s * mm).square() for axis, s, mm in zip(axes, self.stride, spacing, strict=True)]
        grid = torch.meshgrid(*squares, indexing="ij")
        return torch.stack(grid).sum(0).sqrt()


def influence(op: str, target: int | Sequence[int], /, *args: Any, **kwargs: Any) -> Tensor:
    """How much each token of a call of an op adds to the output at one token, through the state:

        h(s) = sum over channels |d out_target / d in_s|,    all arguments but the input held fixed, without D, z and an initial state

    Of `selective_scan`, whose input is u, with q_i the token at step i of the walk, the target at step t and s the steps of delta, this is

        h(q_i) = sum_d |sum_n C_t[n] exp(A[d, n] (s_{i+1} + … + s_t)) B_i[n] s_i|,   i <= t,   and 0 behind the target

    The other ops: `selective_scan_nd`, `ssd` and `ssd3` in x, `gated_linear_attention`, `delta_rule`, `linear_attention` and `bi_wkv` in v. Where
    heads share v, their weights are added before the absolute value is taken. Of `ssd3` with an output for each rank (MIMO without mimo_o)
    the absolute values of all ranks are added.

    Args:
        op: the op's name in medssm.ops
        target: the token, an index (*spatial), or a number in a sequence
        args, kwargs: of the call

    Returns:
        (b, l) or (b, *spatial), of selective_scan_nd (b, k, *spatial), one for each order. One forward and one backward of the op make it, so that it
        costs what a training step of the op costs. float32, or float64 where the op computes in that.

    Raises:
        ValueError: the op has no state, or there is no such token. What the op itself raises.

    >>> h = influence("selective_scan", 9, u, delta, A, B, C)  # (b, l): 0 from token 10 on
    """
    if op not in _INPUTS:
        raise ValueError(f"op: expected one of {', '.join(_INPUTS)}, got {op!r}")
    function, (name, behind) = getattr(ops, op), _INPUTS[op]
    call = inspect.signature(function).bind(*args, **kwargs).arguments
    fixed = {key: _detached(value) for key, value in call.items() if key not in _LEFT_OUT}
    channels_first = fixed.get("layout", "bld") == "bdl"
    given: Tensor = fixed[name]
    if op == "selective_scan_nd" and given.dim() == fixed["delta"].dim() - 1:  # shared by the orders: each gets its own, and so its own gradient
        given = given.unsqueeze(-2).expand(*given.shape[:-1], fixed["delta"].shape[-2], -1)
    several = op == "selective_scan_nd"
    wide = torch.float64 if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in fixed.values()) else torch.float32
    with torch.inference_mode(False), torch.enable_grad():
        fixed = {key: _outside(value) for key, value in fixed.items()}
        inner = _outside(given).to(wide).clone().requires_grad_()
        out = function(**{**fixed, name: inner})
        along = out.movedim(1, -1) if channels_first else out
        ranked = op == "ssd3" and along.dim() > given.dim()  # (b, *spatial, r, h, p)
        spatial = along.shape[1 : along.dim() - behind - ranked]
        at = (target,) if isinstance(target, int) else tuple(target)
        if len(at) != len(spatial) or not all(0 <= t < n for t, n in zip(at, spatial, strict=True)):
            raise ValueError(f"target: expected a token of {tuple(spatial)}, got {at}")
        row = along[(slice(None), *at)]
        rows = row.unbind(1) if ranked else (row,)
        gradients = [torch.autograd.grad(one.sum(), inner, retain_graph=one is not rows[-1])[0].abs() for one in rows]
        gradient = torch.stack(gradients).sum(0) if ranked else gradients[0]
    if channels_first:
        gradient = gradient.movedim(1, -1)
    h: Tensor = gradient.flatten(gradient.dim() - behind).sum(-1)
    return h.movedim(-1, 1) if several else h


@torch.no_grad()
def reach(network: nn.Module, x: Tensor, target: Sequence[int]) -> list[Reach]:
    """What each mixer of a network carries to one voxel, in the order in which they are called: one entry for each op and each order.

    It is what the layer's state holds at this very input: convolutions, norms, gates and skips around it are left out, so that the network may see
    farther by them, and less far where what a layer brings is not used.

    Args:
        network: any that calls medssm.ops; it is run once as it is, in its own mode
        x: (1, c, *spatial)
        target: a voxel of x

    Returns:
        [] where the network calls no op with a state. Calls over tokens that are not a grid of x (class tokens, packed sequences) are left out.

    Raises:
        ValueError: there is no such voxel, or x holds several images.
    """
    spatial = tuple(x.shape[2:])
    if x.shape[0] != 1:
        raise ValueError(f"x: expected one image (1, c, *spatial), got {tuple(x.shape)}")
    if len(target) != len(spatial) or not all(0 <= t < n for t, n in zip(target, spatial, strict=True)):
        raise ValueError(f"target: expected a voxel of {spatial}, got {tuple(target)}")
    if isinstance(network, AnySize):  # what the layers see
        spatial = tuple(sizes.pad_to(x, network.size_divisor, network.size, network.instance_norms).shape[2:])
    found: list[Reach] = []
    with observed(network) as seen:
        network(x)
    for layer, op, call, grids in seen:
        grid = _grid(op, call, grids, len(spatial))
        if grid is None:
            continue
        stride = tuple(n / m for n, m in zip(spatial, grid, strict=True))
        at = tuple(min(int((t + 0.5) / s), m - 1) for t, s, m in zip(target, stride, grid, strict=True))
        tokens = _tokens(op, call)
        token = at if len(tokens) > 1 else sum(t * math.prod(grid[i + 1 :]) for i, t in enumerate(at))
        h = influence(op, token, **call)[0].cpu()
        walks = _walks(op, call, grid)
        for (name, steps), one in zip(walks, h if op == "selective_scan_nd" else [h], strict=True):
            found.append(Reach(layer, op, name, at, stride, one.reshape(grid), None if steps is None else steps[at] - steps))
    return found


def within(influence: Tensor, distance: Tensor, share: float = 0.9) -> float:
    """The smallest distance within which `share` of the influence lies: both of one shape. nan where there is no influence."""
    far, total = share_by_distance(influence, distance)
    reached = (total >= share - 1e-9).nonzero()
    return float(far[reached[0, 0]]) if len(reached) else math.nan


def share_by_distance(influence: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """(distances in rising order, the share of the influence that lies within each), both (n,) float64; without any influence shares are nan."""
    far, index = distance.reshape(-1).to(torch.float64).abs().sort()
    total = influence.reshape(-1).to(torch.float64)[index].cumsum(0)
    last = torch.cat([far[1:] > far[:-1], torch.ones(1, dtype=torch.bool)])  # equal distances count together
    return far[last], (total / total[-1])[last]


def _walks(op: str, call: Mapping[str, Any], grid: Sequence[int]) -> list[tuple[str, Tensor | None]]:
    """For each order of a call its name and (*grid) the step at which each voxel is visited."""
    if op == "linear_attention" and not call.get("causal"):
        return [("", None)]
    orders = call["orders"] if op == "selective_scan_nd" else [call.get("order")]
    found: list[tuple[str, Tensor | None]] = []
    for order in orders:
        order = raster() if order is None else order
        if isinstance(order, Order):
            order = order.reversed() if call.get("reverse") else order
            index, name = order.index(grid), order.spec
        else:
            index, name = (order.flip(0) if call.get("reverse") else order).cpu(), "given by an index"
        steps = torch.empty_like(index)
        steps[index] = torch.arange(len(index))
        found.append((name, steps.reshape(tuple(grid))))
    return found


def _tokens(op: str, call: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a call's tokens."""
    if op == "selective_scan_nd":
        return tuple(call["delta"].shape[1:-2])
    name, behind = _INPUTS[op]
    given = call[name].movedim(1, -1) if call.get("layout") == "bdl" else call[name]
    return tuple(given.shape[1 : given.dim() - behind])


def _grid(op: str, call: Mapping[str, Any], grids: Sequence[tuple[int, ...]], dims: int) -> tuple[int, ...] | None:
    """The grid of voxels that a call's tokens are: their own, or, where they are a sequence, that of the innermost module whose input has as many."""
    tokens = _tokens(op, call)
    if call.get("cu_seqlens") is not None:
        return None
    if len(tokens) == dims:
        return tokens
    for shape in reversed(grids):
        for grid in (shape[1:-1], shape[2:]):  # (b, *spatial, c), (b, c, *spatial)
            if len(tokens) == 1 and len(grid) == dims and math.prod(grid) == tokens[0]:
                return grid
    return None


Seen = list[tuple[str, str, dict[str, Any], list[tuple[int, ...]]]]


@contextlib.contextmanager
def observed(network: nn.Module) -> Iterator[Seen]:
    """A list of every call of an op that this thread makes in the block: (layer, op, arguments, shapes of the inputs of the modules around it).

    Layers call medssm.ops.<op>, so a function that notes the call stands there meanwhile.
    """
    seen: Seen = []
    around: list[tuple[str, tuple[int, ...]]] = []
    thread, functions = threading.get_ident(), {op: getattr(ops, op) for op in _INPUTS}

    def noting(op: str) -> Any:
        @functools.wraps(functions[op])
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                bound = inspect.signature(functions[op]).bind(*args, **kwargs).arguments
                if op == "selective_scan_nd":
                    bound["orders"] = list(bound["orders"])
                seen.append((around[-1][0] if around else "", op, dict(bound), [shape for _, shape in around]))
                args, kwargs = (), dict(bound)
            return functions[op](*args, **kwargs)

        return call

    def enter(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            first = next((value for value in inputs if isinstance(value, Tensor)), None)
            around.append((name, () if first is None else tuple(first.shape)))

        return hook

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        around.pop()

    with contextlib.ExitStack() as stack:
        for name, module in network.named_modules():
            if next(module.children(), None) is not None:  # a layer that a kernel reads stays without hooks: see medssm.nn.inner
                for handle in (module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)):
                    stack.callback(handle.remove)
        for op in _INPUTS:
            stack.callback(setattr, ops, op, functions[op])
            setattr(ops, op, noting(op))
        yield seen


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return tuple(map(_detached, value)) if isinstance(value, tuple) else value


def _outside(value: Any) -> Any:
    """A tensor that autograd may save, also of one that was made in inference mode."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    return tuple(map(_outside, value)) if isinstance(value, tuple) else value
