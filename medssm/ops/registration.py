"""How a declared op becomes two PyTorch operators, medssm::<name>_forward and medssm::<name>_backward: schemas, implementations, fake kernels,
gradient, vmap and operation counts. torch.compile, torch.export, autograd and vmap understand them.

    forward(tensors, walk, options, [save], backend) -> out, states, [saved]
    backward(dout, dstates, kept, tensors, walk, options, backend) -> the gradient of each tensor that has one

An output or a gradient that a call does not have is an empty tensor, since operators cannot return None. What is saved has two axes, the batch
and all others: PyTorch asks of every axis of a traced tensor whether its size is 1, and the answer for the chunks would tie the trace to a length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from medssm import dispatch
from medssm.kernels import cuda, native, triton
from medssm.kernels.dtypes import compute_dtype
from medssm.ops import modes, shapes

if TYPE_CHECKING:
    from medssm.ops.op import Op

_library: Any = torch.library.Library("medssm", "DEF")
_BACKENDS = {"native": native, "triton": triton, "cuda": cuda}
_WALKS = {"one": "Tensor? index, str order, bool reverse, Tensor? cu_seqlens", "many": "str orders", "none": ""}


def kernels(**limits: Callable[..., str | None]) -> dict[str, dispatch.Backend]:
    """The backends of an op for `dispatch.register`, each with what limits it beside its library."""

    def backend(name: str, limit: Callable[..., str | None]) -> dispatch.Backend:
        library = _BACKENDS[name]
        return dispatch.Backend(library.reason, lambda *tensors: modes.transformed() or library.refuse(*tensors) or limit(*tensors))

    return {name: backend(name, limit) for name, limit in limits.items()}


class Operators:
    """The two operators of an op, registered; calling this gives forward's output and states."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self._differentiable = [i for i, given in enumerate(op.inputs) if given.gradient]
        self._kept = list(op.states) if op.saves_states else [op.saved[0]] if op.saved else []
        tensors = ", ".join(f"Tensor{'?' if given.optional else ''} {given.name}" for given in op.inputs)
        options = ", ".join(f"{kind} {name}" for name, kind in op.options.items())
        outputs = 1 + len(op.states) + bool(op.saved)
        self.shapes = self._forward_shapes  # the outputs of forward, uninitialised
        self.forward = self._define("forward", [tensors, _WALKS[op.walk], options, "bool save" if op.saved else "", "str backend"], outputs)
        gradients = ", ".join(["Tensor dout", *(f"Tensor? d{state}" for state in op.states), *(f"Tensor {name}" for name in self._kept)])
        self.backward = self._define("backward", [gradients, tensors, _WALKS[op.walk], options, "str backend"], len(self._differentiable))
        torch.library.register_autograd(f"medssm::{op.name}_forward", self._gradient, setup_context=self._setup, lib=_library)
        torch.library.register_autograd(
            f"medssm::{op.name}_backward", self._second_derivative, setup_context=lambda ctx, inputs, output: None, lib=_library
        )
        torch.library.register_vmap(f"medssm::{op.name}_forward", self._vmap, lib=_library)
        self.eager = _function(self)

    def __call__(
        self, tensors: Sequence[Tensor | None], path: Sequence[Any], options: Mapping[str, Any], backend: str, final: bool
    ) -> tuple[Tensor, ...]:
        save = [self.op.saves(tensors) and modes.needs_grad(tensors)] if self.op.saved else []
        main = tensors[self.op.main]
        arguments = (*tensors, *path, *options.values(), *save, backend)
        straight = modes.plain(tensors) and main is not None and not main.is_meta
        outputs = self.eager(*arguments, final) if straight else self.forward(*arguments)
        return outputs[: 1 + len(self.op.states)] if isinstance(outputs, tuple) else (outputs,)

    def _define(self, way: str, arguments: Sequence[str], outputs: int) -> Callable[..., Any]:
        name = f"{self.op.name}_{way}"
        returns = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
        _library.define(f"{name}({', '.join(filter(None, arguments))}) -> {returns}")
        _library.impl(name, getattr(self, f"_{way}"), "CompositeExplicitAutograd")
        torch.library.register_fake(f"medssm::{name}", getattr(self, f"_{way}_shapes"), lib=_library)
        packet = getattr(torch.ops.medssm, name)
        register_flop_formula(packet, get_raw=True)(getattr(self, f"_{way}_operations"))
        found: Callable[..., Any] = packet.default
        return found

    def split(self, args: Sequence[Any]) -> tuple[Sequence[Tensor | None], Sequence[Any], dict[str, Any], Sequence[Any]]:
        """(tensors, walk, options, the rest) of an operator's arguments from the first tensor on."""
        count = len(self.op.inputs)
        walked = count + {"one": 4, "many": 1, "none": 0}[self.op.walk]
        rest = walked + len(self.op.options)
        return args[:count], args[count:walked], dict(zip(self.op.options, args[walked:rest], strict=True)), args[rest:]

    def _sizes(self, tensors: Sequence[Tensor | None], path: Sequence[Any]) -> shapes.Sizes:
        packed = path[3] if self.op.walk == "one" else None
        return self.op.sizes(tensors, sequences=None if packed is None else packed.shape[0] - 1)

    # -- forward ------------------------------------------------------------------------------------------------------------------------

    def _forward(self, *args: Any, traceable: bool = True, final: bool = True) -> Any:
        op, (tensors, path, options, rest) = self.op, self.split(args)
        main = tensors[op.main]
        assert main is not None
        out, *others = op.forward(rest[-1], op.arguments(tensors, path, options), save=bool(op.saved) and rest[0], final=final)
        with torch._C._AutoDispatchBelowADInplaceOrView():  # a view for PyTorch would be one that nothing in place may change
            out = op.shaped(out, tensors, options)
        if op.saved and others[-1] is not None and traceable:
            others[-1] = others[-1].flatten(1)
        return (out, *(_absent(main) if t is None else t for t in others)) if others else out

    def _forward_shapes(self, *args: Any) -> Any:
        op, (tensors, path, options, rest) = self.op, self.split(args)
        sizes, dtype, main = self._sizes(tensors, path), compute_dtype(*tensors), tensors[op.main]
        assert main is not None
        states = op.packed_states if shapes.SEQUENCES in sizes else op.states
        outputs = [main.new_empty(shapes.shape(op.out_axes(options), sizes))]
        outputs += [main.new_empty(shapes.shape(axes, sizes), dtype=main.dtype if op.states_like_main else dtype) for axes in states.values()]
        if op.saved:
            batch, *shape = op.saved[1](**shapes.totals(sizes))
            outputs.append(main.new_empty((batch, math.prod(shape)), dtype=dtype) if rest[0] else _absent(main))
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def _forward_operations(self, *args: Any, out_val: Any = None, **_: Any) -> int:
        split = self.split(args)
        tensors, sizes = split[0], self._sizes(*split[:2])
        sizes.pop(shapes.SEQUENCES, None)
        for name, (axis, _of) in self.op.rules.without.items():
            if tensors[self.op.names.index(name)] is None:
                sizes[axis] = 0
        return self.op.operations(**shapes.totals(sizes))

    # -- backward -----------------------------------------------------------------------------------------------------------------------

    def _gradients(self, args: Sequence[Any]) -> tuple[dict[str, Any], Sequence[Any]]:
        """({"dout": …, "dstate": …, what was kept}, the arguments from the first tensor on)."""
        names = ["dout", *(f"d{state}" for state in self.op.states), *self._kept]
        return dict(zip(names, args, strict=False)), args[len(names) :]

    def _backward(self, *args: Any) -> Any:
        op, (gradients, inputs) = self.op, self._gradients(args)
        tensors, path, options, (backend,) = self.split(inputs)
        main = tensors[op.main]
        assert main is not None
        arguments = op.arguments(tensors, path, options)
        if op.walk != "none":
            gradients["dout"] = shapes.flat(gradients["dout"], gradients["dout"].dim() - len(op.out_axes(options)) + 1)
        if op.saved:
            name = op.saved[0]
            if not op.saves(tensors):
                gradients[name] = None
            elif _is_absent(gradients[name]):
                gradients[name] = op.forward(backend, arguments, save=True, final=False)[-1]
            elif gradients[name].dim() == 2:
                gradients[name] = gradients[name].view(op.saved[1](**shapes.totals(self._sizes(tensors, path))))
        found = op.backward(backend, gradients, arguments)
        back = [_absent(main) if g is None else g.reshape(t.shape) for g, t in zip(found, self._with_gradient(tensors), strict=True)]
        return tuple(back) if len(back) > 1 else back[0]

    def _backward_shapes(self, *args: Any) -> Any:
        tensors = self.split(self._gradients(args)[1])[0]
        main = tensors[self.op.main]
        assert main is not None
        back = [_absent(main) if t is None else t.new_empty(t.shape) for t in self._with_gradient(tensors)]
        return tuple(back) if len(back) > 1 else back[0]

    def _backward_operations(self, *args: Any, out_val: Any = None, **_: Any) -> int:
        """Twice the forward's, the convention of PyTorch's own counter: a product's gradient is two products."""
        return 2 * self._forward_operations(*self._gradients(args)[1])

    def _with_gradient(self, tensors: Sequence[Any]) -> list[Any]:
        return [tensors[i] for i in self._differentiable]

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, path, options, rest = self.split(inputs)
        outputs = output if isinstance(output, tuple) else (output,)
        kept = outputs[1 : 1 + len(self._kept)] if self.op.saves_states else outputs[len(outputs) - len(self._kept) :]
        ctx.kept, ctx.count, ctx.rest, ctx.out = len(kept), len(inputs), (*options.values(), rest[-1]), outputs[0].shape
        ctx.set_materialize_grads(False)  # zeros for a state without a gradient would have to be made and read
        ctx.walked = [i for i, part in enumerate(path) if isinstance(part, Tensor)]
        ctx.path = [None if isinstance(part, Tensor) else part for part in path]
        ctx.save_for_backward(*kept, *tensors, *(path[i] for i in ctx.walked))

    def _gradient(self, ctx: Any, *douts: Any, backward: Callable[..., Any] | None = None) -> tuple[Any, ...]:
        op, saved = self.op, ctx.saved_tensors
        # Outputs that are kept have gradients only where they are states.
        kept, tensors = saved[: ctx.kept], saved[ctx.kept : ctx.kept + len(op.inputs)]
        path = list(ctx.path)
        for i, part in zip(ctx.walked, saved[ctx.kept + len(op.inputs) :], strict=True):
            path[i] = part
        dout, *dstates = douts[: 1 + len(op.states)]
        if dout is None:
            dout = tensors[op.main].new_zeros(ctx.out)
        found = (backward or self.backward)(dout, *dstates, *kept, *tensors, *path, *ctx.rest)
        gradients = iter(found if isinstance(found, tuple) else (found,))
        back: list[Any] = [None] * ctx.count
        for i in self._differentiable:
            gradient = next(gradients)
            back[i] = None if tensors[i] is None else gradient
        return tuple(back)

    def _second_derivative(self, ctx: Any, *_: Any) -> None:
        """An opaque backward would contribute a zero in silence."""
        raise RuntimeError(f"medssm::{self.op.name}_backward: second derivatives need backend='reference'")

    # -- vmap ---------------------------------------------------------------------------------------------------------------------------

    def _vmap(self, info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        """The mapped dimension of tensors with a batch joins the batch; mapped weights raise."""
        size, folded, batch = info.batch_size, [], 0
        if self.op.walk == "one" and args[len(self.op.inputs) + 3] is not None:
            raise ValueError("cu_seqlens: vmap over packed sequences is not supported; pack them all in one call")
        for i, (dim, value) in enumerate(zip(in_dims, args, strict=True)):
            given = self.op.inputs[i] if i < len(self.op.inputs) else None
            if given is not None and given.axes[0] == "b" and value is not None:
                value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
                batch = value.shape[1]
                value = value.reshape(size * batch, *value.shape[2:])
            elif dim is not None and isinstance(value, Tensor):
                name = given.name if given is not None else "order"
                raise ValueError(f"{name}: vmap over weights is not supported, only over tensors that carry a batch dimension")
            folded.append(value)
        found = self.forward(*folded)
        outputs = found if isinstance(found, tuple) else (found,)
        unfolded = tuple(o if _is_absent(o) else o.reshape(size, batch, *o.shape[1:]) for o in outputs)
        dims = tuple(None if _is_absent(o) else 0 for o in outputs)
        return (unfolded, dims) if isinstance(found, tuple) else (unfolded[0], dims[0])


def _function(operators: Operators) -> Callable[..., Any]:
    """The forward operator with its gradient, without PyTorch's dispatcher, which costs a call 0.2 ms where a gradient is wanted."""

    def forward(ctx: Any, *args: Any) -> Any:
        inputs, final = args[:-1], args[-1]  # final: whether the caller wants the final states
        output = operators._forward(*inputs, traceable=False, final=final)
        operators._setup(ctx, inputs, output)
        return output

    def backward(ctx: Any, *douts: Any) -> tuple[Any, ...]:
        straight = not torch.is_grad_enabled() and modes.plain(douts)  # else something traces, counts or differentiates backward
        return *operators._gradient(ctx, *douts, backward=operators._backward if straight else operators.backward), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"medssm_{operators.op.name}", (torch.autograd.Function,), members)
    apply: Callable[..., Any] = function.apply
    return apply


def _absent(like: Tensor) -> Tensor:
    """What an operator returns in place of an output that the call does not have."""
    return like.new_empty((0,))


def _is_absent(t: Tensor) -> bool:
    return t.dim() == 1 and t.numel() == 0
