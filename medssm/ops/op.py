"""One op, declared once: its tensors, options and outputs.

Checks, layouts, the choice of a kernel, the PyTorch operators with fake kernels, gradients, vmap and operation counts, and `explain` follow from the
declaration.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from medssm import dispatch
from medssm.ops import cut, modes, registration, shapes, walk

Draw = Callable[..., Tensor]  # draw(*shape): a normal sample
_REMEMBERED = 256  # calls of an op whose shapes need no second check
OPS: dict[str, Op] = {}  # every op by name


class Op:
    """The declaration of an op, and how it is called.

    Args:
        name: of the public function, which stands in medssm/ops/<name>.py.
        tensors: {"x": "b *l d", "z?": "b *l d", "cos!": "l d"}, in the order in which a kernel's backward returns gradients. Shapes as
            medssm/ops/shapes.py reads them; ? marks an optional tensor, ! one without a gradient.
        out: the output's shape, or a function of the options that gives it.
        reference: the specification. It and the kernels' `forward` take tensors (tokens flattened to (b, l, …)), options and the walk by name.
        example: example(draw, tokens, width), the arguments of one small call with every option that all PyTorch features must carry; draw(*shape) is
            a normal sample. Doctor, the contract tests and the checks on a GPU run it.
        operations: the multiplications and additions of a forward, from the sizes of the axes by name ("*l" is l; an axis of Rules.without is 0
            where its tensor is absent); exponentials are not counted.
        options: {"scale": "float"}: what else kernels take, with its type in PyTorch's operator schemas.
        defaults: {"scale": a function of the sizes}: what None stands for.
        backends: those beside the reference.
        main: the tensor whose type and device the output has; the first unless said.
        states: {"state": "b h p n"}: the final states, in the compute type, or in main's where `states_like_main`.
        skips_state: whether a kernel's forward takes `final`, and leaves the state out where nobody asks for it.
        saved: (name, its shape from the sizes of the axes by name): what forward keeps for backward, in the compute type.
        saved_with: the tensor without which that is not needed.
        saves_states: backward takes the final states.
        walk: "one" (order and reverse), "many" (a list of orders) or "none" (kernels then get the tokens as they are).
        kernels, suffix: the folder of the kernels where it is not the name, and what their functions' names end in.
        limit: limit(**tensors) says why no kernel can serve them, or None; limits, the same of one backend: {"triton": …}.
        rules: what the sizes must obey.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, str],
        *,
        out: str | Callable[[Mapping[str, Any]], str],
        reference: Callable[..., Any],
        example: Callable[..., dict[str, Any]],
        operations: Callable[..., int],
        options: Mapping[str, str] | None = None,
        defaults: Mapping[str, Callable[[shapes.Sizes], Any]] | None = None,
        backends: Sequence[str] = ("native", "triton"),
        main: str | None = None,
        states: Mapping[str, str] | None = None,
        states_like_main: bool = False,
        skips_state: bool = True,
        saved: tuple[str, Callable[..., tuple[int, ...]]] | None = None,
        saved_with: str | None = None,
        saves_states: bool = False,
        walk: str = "one",
        kernels: str | None = None,
        suffix: str = "",
        limits: Mapping[str, Callable[..., str | None]] | None = None,
        rules: shapes.Rules | None = None,
    ) -> None:
        self.name, self.reference, self.example, self.operations = name, reference, example, operations
        self.inputs = shapes.inputs(tensors)
        self.names = tuple(given.name for given in self.inputs)
        self.options, self.defaults, self.walk, self.rules = dict(options or {}), dict(defaults or {}), walk, rules or shapes.Rules()
        # With cu_seqlens, states have a row for each sequence in place of each batch element.
        self.packed_inputs = tuple(given.of_sequences() for given in self.inputs)
        self.out = tuple(out.split()) if isinstance(out, str) else out
        self.main = self.names.index(main) if main else 0
        self.states = {state: tuple(shape.split()) for state, shape in (states or {}).items()}
        self.packed_states = {state: (shapes.SEQUENCES, *axes[1:]) for state, axes in self.states.items()}
        self.states_like_main, self.skips_state, self.saves_states = states_like_main, bool(states) and skips_state, saves_states
        self.saved, self.saved_with = saved, saved_with
        self.folder, self.suffix = kernels or name, suffix
        self.shape_order = sorted(range(len(self.names)), key=lambda i: (self.names[i] not in self.rules.first, i))
        self.may_leave_out = any(given.forms[-1].left_out for given in self.inputs)
        # The tensors that tell how many axes the tokens have.
        self.token_axes = {self.inputs[i].tokens: i for i in reversed(self.shape_order) if self.inputs[i].tokens and not self.inputs[i].optional}
        self._passed: dict[tuple[Any, ...], shapes.Sizes] = {}
        self.operators = registration.Operators(self)
        refusals = {backend: self._refusal((limits or {}).get(backend)) for backend in backends}
        dispatch.register(name, **registration.kernels(**refusals))
        OPS[name] = self

    def __call__(
        self,
        *tensors: Tensor | None,
        options: Mapping[str, Any] | None = None,
        sizes: shapes.Sizes | None = None,
        order: Any = None,
        reverse: bool = False,
        cu_seqlens: Any = None,
        return_final_state: bool = False,
        layout: str = "bld",
        backend: str | None = None,
    ) -> Any:
        """The output, or (output, state): tensors in the declared order, the options complete. sizes: what `check` found, if it was asked before."""
        if layout != "bld":
            shapes.choice("layout", layout, ("bld", "bdl"))
            tensors = self._channels_last(tensors)
        sizes = self.check(tensors, order, cu_seqlens) if sizes is None else sizes
        values = {**options} if options else {}
        for option, default in self.defaults.items():
            if values[option] is None:
                values[option] = default(sizes)
        if self.may_leave_out:
            tensors = tuple(given.with_every_axis(t, sizes) for given, t in zip(self.inputs, tensors, strict=True))
        over_ranks = cut.current()
        if over_ranks is None:
            out, *states = self._outputs(tensors, sizes, values, self._path(tensors, sizes, order, reverse, cu_seqlens), return_final_state, backend)
        else:
            call = {"order": order, "reverse": reverse, "cu_seqlens": cu_seqlens, "final": return_final_state, "backend": backend}
            out, *states = over_ranks.call(self, tensors, sizes=sizes, options=values, **call)
        if layout != "bld":
            out = out.movedim(-1, 1)
        if not return_final_state:
            return out
        return out, states[0] if len(states) == 1 else tuple(states)

    def step(self, state: Tensor, *tensors: Any, options: Mapping[str, Any] | None = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """(output, the new state) of one token: tensors in the declared order up to the initial state, those with tokens without that axis."""
        given, main = self.inputs[self.main], tensors[self.main]
        shapes.floating(given.name, main)
        if main.dim() != len(given.axes) - 1:
            form = ", ".join(axis for axis in given.axes if axis != given.tokens)
            raise ValueError(f"{given.name}: expected ({form}), got {tuple(main.shape)}")
        one = [t.unsqueeze(1) if given.tokens and isinstance(t, Tensor) else t for given, t in zip(self.inputs, tensors, strict=False)]
        out, last = self(*one, state, options=options, return_final_state=True, backend=backend)
        return out.squeeze(1), last

    def check(self, tensors: Sequence[Any], order: Any = None, cu_seqlens: Any = None) -> shapes.Sizes:
        """The size of every axis; one clear error where the tensors do not fit the declaration. What passed once passes at once."""
        spatial = self.walk != "one" or not (order is None or isinstance(order, Tensor))
        sequences = walk.count(cu_seqlens)
        key = None
        if not modes.traced() and all(t is None or isinstance(t, Tensor) for t in tensors):
            key = (spatial, sequences, *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors])
            found = self._passed.get(key)
            if found is not None:
                return found
        shapes.check(self.inputs, tensors, self.main)
        found = self.sizes(tensors, spatial, sequences)
        if key is not None:
            if len(self._passed) >= _REMEMBERED:
                self._passed.clear()
            self._passed[key] = found
        return found

    def _outputs(
        self,
        tensors: tuple[Tensor | None, ...],
        sizes: shapes.Sizes,
        options: Mapping[str, Any],
        path: tuple[Any, ...],
        final: bool,
        backend: str | None,
    ) -> tuple[Tensor, ...]:
        main = tensors[self.main]
        assert main is not None
        chosen = dispatch.choose(self.name, backend, main, tensors)
        if chosen == "reference" and not main.is_meta:  # of a meta tensor only shapes are wanted: the operator has them without a loop
            found = self.reference(**self.arguments(tensors, path, options))
        elif chosen != "reference" and modes.direct(tensors):
            found = self.forward(chosen, self.arguments(tensors, path, options), final=final)
        else:
            return self.operators(tensors, path, options, chosen, final)
        outputs = found if isinstance(found, tuple) else (found,)
        if chosen == "reference" and not main.numel():
            outputs = _connected(outputs, tensors)
        return self.shaped(outputs[0], tensors, options), *outputs[1 : 1 + len(self.states)]

    # -- what the operators use too -----------------------------------------------------------------------------------------------------

    def sizes(self, tensors: Sequence[Any], spatial: bool = True, sequences: int | None = None) -> shapes.Sizes:
        """The size of every axis; sequences: how many are packed, where they are."""
        inputs = self.inputs if sequences is None else self.packed_inputs
        known = None if sequences is None else {shapes.SEQUENCES: sequences, "b": 1}
        return shapes.sizes([(inputs[i], tensors[i]) for i in self.shape_order], spatial, self.rules, known)

    def arguments(self, tensors: Sequence[Any], path: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """A kernel's arguments by name: tokens flattened to (b, l, …), the options, the walk."""
        if self.walk == "none":
            return {**dict(zip(self.names, tensors, strict=True)), **options}
        spatial = {axis: self._spatial(i, tensors[i]) for axis, i in self.token_axes.items()}
        named: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        if any(len(shape) > 1 for shape in spatial.values()):
            for given in self.inputs:
                if given.tokens is not None and named[given.name] is not None:
                    named[given.name] = shapes.flat(named[given.name], len(spatial[given.tokens]))
        named.update(options)
        device = tensors[self.main].device
        if self.walk == "one":
            index, spec, reverse, cu_seqlens = path
            named.update(walk.resolve(spec, spatial["*l"], index, reverse, cu_seqlens, device)._asdict())
            if not self.states or named["sequences"] is None:  # where there is no state, sequences are segments
                named.pop("sequences")
        else:
            named["walks"] = [walk.resolve(spec, spatial["*l"], None, False, None, device)[:3] for spec in path[0].split(";")]
        return named

    def forward(self, backend: str, arguments: Mapping[str, Any], *, save: bool = False, final: bool = True) -> tuple[Any, ...]:
        """(out, states…, what is saved) of a kernel, those that are not asked for None."""
        flags = ({"save": save} if self.saved else {}) | ({"final": final} if self.skips_state else {})
        found = self._kernel(backend, "forward")(**arguments, **flags)
        return found if isinstance(found, tuple) else (found,)

    def backward(self, backend: str, gradients: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
        """The gradient of each tensor that has one, in their order."""
        found: tuple[Tensor | None, ...] = self._kernel(backend, "backward")(**gradients, **arguments)
        return found

    def saves(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether backward will need what forward can save."""
        main = tensors[self.main]
        wanted = self.saved_with is None or tensors[self.names.index(self.saved_with)] is not None
        return self.saved is not None and wanted and main is not None and main.numel() > 0

    def out_axes(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return self.out if isinstance(self.out, tuple) else tuple(self.out(options).split())

    def shaped(self, out: Tensor, tensors: Sequence[Any], options: Mapping[str, Any]) -> Tensor:
        """A kernel's output (b, l, …) in the shape of its tokens."""
        if self.walk == "none":
            return out
        i = self.token_axes[self.out_axes(options)[1]]
        spatial = self._spatial(i, tensors[i])
        return out if len(spatial) == 1 else out.reshape(out.shape[0], *spatial, *out.shape[2:])

    def _spatial(self, i: int, t: Tensor) -> tuple[int, ...]:
        """The shape of the tokens of a tensor (b, *l, …)."""
        return tuple(t.shape[1 : 2 + t.dim() - len(self.inputs[i].axes)])

    def _kernel(self, backend: str, function: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(dispatch.kernel(self.folder, backend), function + self.suffix)
        return found

    def _path(self, tensors: Sequence[Any], sizes: shapes.Sizes, order: Any, reverse: bool, cu_seqlens: Any) -> tuple[Any, ...]:
        """The walk as operators take it: (index, spec, reverse, cu_seqlens), the specs of many orders as one text, or nothing."""
        if self.walk == "none":
            return ()
        spatial = sizes["*l"]
        if self.walk == "many":
            return (walk.parse_many(order, spatial),)
        device = tensors[self.main].device
        if isinstance(order, Tensor) and order.device != device:
            raise ValueError(f"order: expected device {device}, where {self.inputs[self.main].public} is, got {order.device}")
        spec, index = walk.parse(order, spatial)
        if cu_seqlens is not None:
            walk.check_bounds(cu_seqlens, math.prod(spatial), device)
        return index, spec, reverse, cu_seqlens

    def _channels_last(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Tokens (b, d, *spatial) or (b, g, n, *spatial) as (b, *spatial, …), views."""
        main = tensors[self.main]
        shapes.floating(self.names[self.main], main)
        assert main is not None
        spatial = main.dim() - len(self.inputs[self.main].axes) + 1
        moved = []
        for given, t in zip(self.inputs, tensors, strict=True):
            if given.tokens and isinstance(t, Tensor) and 0 < t.dim() - 1 - spatial < 3:
                features = tuple(range(1, t.dim() - spatial))
                t = t.movedim(features, tuple(axis - len(features) - 1 for axis in features))
            moved.append(t)
        return tuple(moved)

    def _refusal(self, limit: Callable[..., str | None] | None) -> Callable[..., str | None]:
        """Why a backend cannot serve these tensors beside what its library says, or None."""
        if limit is None:
            return lambda *tensors: None
        return lambda *tensors: limit(**dict(zip(self.names, tensors, strict=True)))


def _connected(outputs: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The outputs of no tokens, with a gradient of zero for every input that none of them has seen."""
    nothing = sum(t.reshape(-1)[:0].sum() for t in tensors if t is not None)
    return tuple(out + nothing for out in outputs)


def explain(op: str, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Which backend that very call would take, and why each other one would not. Nothing is computed.

    Takes the op's name and the call's own arguments; returns {"chosen": name, backend: "ok" | "would serve, … was preferred" | reason}.

    >>> medssm.explain("selective_scan", u, delta, A, B, C)["chosen"]
    'native'
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(sorted(OPS))}, got {op!r}")
    function = getattr(importlib.import_module(f"medssm.ops.{op}"), op)
    question = dispatch.Question(kwargs.pop("backend", None))
    try:
        function(*args, **kwargs, backend=question)
    except dispatch.Answer as answer:
        return answer.report
    raise AssertionError(f"{op} chose no backend")
