"""A network as a program for other engines: torch.export with a free batch and free sizes, medssm's operators replaced by what the engine has.

An operator without gradients becomes either one node of the domain "medssm", which the custom-operator library of this package runs
(`medssm.export.custom_ops`), or PyTorch's own operators, its portable form, which every engine runs.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from medssm.errors import UserError
from medssm.export.check import Shapes
from medssm.kernels.linear_attention.reference import feature, rotate
from medssm.nn import sizes
from medssm.ops.op import OPS, Op

DOMAIN, VERSION = "medssm", 1  # of the nodes that are medssm's own
Program = torch.export.ExportedProgram
Replacements: TypeAlias = "dict[Any, Callable[..., Any]]"  # of operators, and of functions that torch.overrides wraps


def export(network: nn.Module, shapes: Shapes, portable: bool, also: Replacements | None = None) -> Program:
    """The network, in inference mode, traced with images (b, c, *spatial); the batch stays free, and so do the spatial sizes where `shapes` says so.

    portable: without nodes of the domain "medssm"; also: what else an engine has in the place of a function. UserError for what has no export, and
    where a free size became a fixed one.
    """
    free = dict.fromkeys([0, *(range(2, len(shapes.traced)) if shapes.free else ())], torch.export.Dim.DYNAMIC)
    with quiet(), torch.no_grad(), Replacing(_TRACED | (_PORTABLE if portable else _NODES) | (also or {})):
        try:
            program = torch.export.export(network.eval(), (torch.zeros(shapes.traced),), dynamic_shapes=(free,))
        except UserError:
            raise
        except Exception as error:
            sizes = "a free batch and free sizes" if shapes.free else "a free batch"
            raise UserError(f"the network does not export with {sizes}: {first_line(error)}") from error
    _check(program)
    return program


class Replacing(TorchFunctionMode):
    """Calls functions in the place of operators."""

    def __init__(self, replacements: Replacements) -> None:
        super().__init__()
        packets = {getattr(called, "overloadpacket", called): function for called, function in replacements.items()}
        self._replacements = {**replacements, **packets}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = self._replacements.get(func)
        return func(*args, **(kwargs or {})) if replacement is None else replacement(*args, **(kwargs or {}))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines and warnings of PyTorch's exporters, which no user can mend."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _check(program: Program) -> None:
    """UserError for an operator of medssm's that is left, and for a state that the network uses; states that it does not use are left out."""
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        module.graph.eliminate_dead_code()
        for node in module.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == DOMAIN:
                raise UserError(f"the operator {node.target._schema.name} has no export")
            if node.target is torch.ops.onnx_symbolic._symbolic.default and node.args[1].endswith(_STATE):
                raise UserError(f"the operator {node.args[1].removesuffix(_STATE)}: the network uses its final state, which has no export")


# -- what takes their place -----------------------------------------------------------------------------------------------------------------------


_WALKS = {"one": ("index", "order", "reverse", "cu_seqlens"), "many": ("orders",), "none": ()}  # of an operator's arguments
_STATE = "_state"  # behind the name of an op: its final state, which no engine has


def described(op: Op, args: Sequence[Any]) -> tuple[Sequence[Tensor | None], dict[str, Any]]:
    """A call of an operator as a node of the domain "medssm": its tensors are inputs, its walk and its options attributes, those at rest left out."""
    tensors, path, options, _ = op.operators.split(args)
    walk = dict(zip(_WALKS[op.walk], path, strict=True))
    if walk.get("index") is not None or walk.get("cu_seqlens") is not None:
        raise UserError(f"the operator {op.name}: an order that is a tensor and packed sequences have no export; take an Order of medssm.orders")
    if op.name == "ssd3":
        given = {name: t for name, t in zip(op.names, tensors, strict=True) if t is not None}
        if given["B"].shape[-3] > 1 or options["pairs"] != "adjacent" or any(name.startswith(("mimo", "initial")) for name in given):
            raise UserError("the operator ssd3 has no export with several ranks (MIMO), pairs of halves or initial states: only one rank has")
    return tensors, {name: value for name, value in {**walk, **options}.items() if not (value is None or value is False or value == "")}


def _node(op: Op) -> Callable[..., Any]:
    def replaced(*args: Any) -> Any:
        tensors, attributes = described(op, args)

        def symbolic(name: str, out: Tensor) -> Tensor:
            return torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", tensors, attributes, dtype=out.dtype, shape=out.shape, version=VERSION)

        outputs = op.operators.shapes(*args)
        if not isinstance(outputs, tuple):
            return symbolic(op.name, outputs)
        states = (symbolic(op.name + _STATE, state) for state in outputs[1 : 1 + len(op.states)])
        return symbolic(op.name, outputs[0]), *states, *outputs[1 + len(op.states) :]

    return replaced


def _no_form(op: Op) -> Callable[..., Any]:
    def refused(*args: Any) -> Any:
        able = "depthwise_conv, and linear_attention where it is not causal"
        raise UserError(f"the operator {op.name} has no portable form ({able}, have one): only `medssm export onnx` without --portable takes it")

    return refused


def _depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str) -> Tensor:
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.dim() - 2]
    padding = [side // 2 for side in weight.shape[1:]]
    y: Tensor = convolution(x.movedim(-1, 1), weight.unsqueeze(1), bias, padding=padding, groups=x.shape[-1])
    return (F.silu(y) if activation else y).movedim(1, -1)


def _linear_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    op = OPS["linear_attention"]
    (_, _, _, cos, sin, initial_kv, initial_z), _, options, _ = op.operators.split((q, k, v, *args))
    if options["causal"]:
        _no_form(op)()
    shape, per_group = q.shape[:-1], q.shape[-2] // k.shape[-2]
    q, k, v = (t.flatten(1, -3) for t in (q, k, v))
    q, k = feature(q, options["feature_map"]), feature(k, options["feature_map"])
    turns = (None if t is None else t.repeat_interleave(per_group, 1) for t in (cos, sin))
    turned_q, turned_k = rotate(q, *turns), rotate(k, cos, sin)
    kv, z = turned_k.permute(0, 2, 3, 1) @ v.transpose(1, 2), k.sum(1)  # (b,g,dk,dv), (b,g,dk)
    if initial_kv is not None and initial_z is not None:
        kv, z = kv + initial_kv, z + initial_z
    o = turned_q.transpose(1, 2) @ kv.repeat_interleave(per_group, 1)  # (b,h,l,dv)
    if options["normalize"]:
        o = o / (q.transpose(1, 2) @ z.repeat_interleave(per_group, 1).unsqueeze(-1) + options["eps"])
    return (o * options["scale"]).transpose(1, 2).reshape(*shape, -1), kv, z


def _pad(x: Tensor, divisor: Sequence[int], two: bool, least: int) -> Tensor:
    wanted = sizes._padded(x.shape[2:], divisor, two, least)
    return F.pad(x, [p for n, m in zip(reversed(x.shape[2:]), reversed(wanted), strict=True) for p in (0, m - n)])


def _crop(y: Tensor, padded: Tensor, x: Tensor) -> Tensor:
    whole = all(statically_known_true(n == p) for n, p in zip(y.shape[2:], padded.shape[2:], strict=True))
    return sizes._front(y, x.shape[2:] if whole else sizes._kept(y, padded, x)).clone()


def _rotations(x: Tensor) -> tuple[Tensor, Tensor]:
    """medssm.nn.mlla.rotations of the size at hand."""
    spatial, channels = x.shape[1:-1], x.shape[-1]
    pairs = channels // (2 * len(spatial))
    rates = 10000.0 ** (-torch.arange(pairs, device=x.device, dtype=x.dtype) / max(pairs, 1))
    angles = []
    for axis, size in enumerate(spatial):
        turns = (torch.arange(size, device=x.device, dtype=x.dtype)[:, None] * rates).repeat_interleave(2, -1)
        angles.append(turns.view(*(size if i == axis else 1 for i in range(len(spatial))), -1).expand(*spatial, -1))
    angles.append(x.new_zeros(1).expand(*spatial, channels - 2 * pairs * len(spatial)))
    found = torch.cat(angles, -1).reshape(math.prod(spatial), channels)
    return found.cos(), found.sin()


# What networks do with sizes while PyTorch traces: PyTorch's own operators for every engine.
_TRACED: Replacements = {torch.ops.medssm.pad.default: _pad, torch.ops.medssm.crop.default: _crop, torch.ops.medssm.rotations.default: _rotations}
_NODES: Replacements = {op.operators.forward: _node(op) for op in OPS.values()}
_PORTABLE: Replacements = {
    **{op.operators.forward: _no_form(op) for op in OPS.values()},
    OPS["depthwise_conv"].operators.forward: _depthwise_conv,
    OPS["linear_attention"].operators.forward: _linear_attention,
}
