"""The shapes that an op declares for its tensors, and one clear error for a call that does not fit them.

A shape is text, an axis a word: "b *l [g] n | b *l k".

    b, h, n     an axis; the same letter is the same size in every tensor of the call. A number is that size
    *l, *q      the tokens: one axis, or with an Order all axes of an image or a volume
    *kernel     any number of axes
    [g]         an axis that may be left out; it then counts as 1
    |           or
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Proxy

Sizes = dict[str, Any]  # of every axis: a number, or of "*l" the tuple of its numbers
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_AXES = 9  # of an image or a volume
TOKENS = ("*l", "*q")
SEQUENCES = "sequences"  # the axis of the states of packed sequences


class Form(NamedTuple):
    """One way that a tensor may be shaped. tokens: whether "*l" is among its axes. left_out: an optional axis that this form is without."""

    axes: tuple[str, ...]
    tokens: bool
    left_out: str | None = None

    def fit(self, shape: Sequence[int], sizes: Mapping[str, Any], spatial: bool) -> Sizes | None:
        """The sizes of the axes that `shape` adds to the known `sizes`, or None where it does not fit."""
        more = len(shape) - len(self.axes)
        if more and not (self.tokens and spatial and 0 < more < MOST_AXES):
            return None
        found: Sizes = {}
        if self.left_out is not None:
            if sizes.get(self.left_out, 1) != 1:
                return None
            found[self.left_out] = 1
        at = 0
        for axis in self.axes:
            size: Any
            if axis[0] == "*":
                size, at = tuple(shape[at : at + 1 + more]), at + 1 + more
            else:
                size, at = shape[at], at + 1
            known = int(axis) if axis.isdigit() else sizes.get(axis, found.get(axis))
            if known is not None and known != size:
                return None
            found[axis] = size
        return found

    def text(self, sizes: Mapping[str, Any], spatial: bool) -> str:
        """The expected shape, with numbers where they are known: "(2, 13, h, p)"."""
        words: list[str] = []
        for axis in self.axes:
            size = sizes.get(axis)
            if size is None:
                words.append(("*spatial" if spatial else "l") if axis in TOKENS else axis)
            else:
                words.extend(str(n) for n in (size if isinstance(size, tuple) else (size,)))
        return f"({', '.join(words)}{',' if len(words) == 1 else ''})"


def forms(text: str) -> Iterator[Form]:
    """The forms of a declared shape; the one with every axis comes first."""
    for alternative in text.split("|"):
        axes = alternative.split()
        tokens = "*" in alternative
        yield Form(tuple(axis.strip("[]") for axis in axes), tokens)
        for axis in axes:
            if axis[0] == "[":
                yield Form(tuple(a for a in axes if a != axis), tokens, axis.strip("[]"))


class Input(NamedTuple):
    """A tensor argument of an op.

    public: the argument of the public function, for errors. axes: those of the form that kernels see. tokens: "*l" of a tensor (b, *l, …), else None.
    gradient: whether it has one.
    """

    name: str
    public: str
    forms: tuple[Form, ...]
    axes: tuple[str, ...]
    tokens: str | None
    optional: bool
    gradient: bool

    def of_sequences(self) -> Input:
        """The same input of a call with packed sequences: a state (b, …) is (sequences, …)."""
        if self.tokens is not None or self.axes[0] != "b":
            return self
        many = tuple(form._replace(axes=(SEQUENCES, *form.axes[1:])) for form in self.forms)
        return self._replace(forms=many, axes=many[0].axes)

    def with_every_axis(self, t: Tensor | None, sizes: Mapping[str, Any]) -> Tensor | None:
        """The tensor with the axis of size 1 that it left out."""
        left_out = self.forms[-1].left_out
        if t is None or left_out is None:
            return t
        spatial = 1 if self.tokens is None else len(sizes[self.tokens])
        return t if t.dim() == len(self.axes) - 1 + spatial else t.unsqueeze(self.axes.index(left_out) - len(self.axes))


def flat(t: Tensor, axes: int) -> Tensor:
    """The tensor with so many axes after the first made one."""
    return t if axes == 1 else t.reshape(t.shape[0], math.prod(t.shape[1 : 1 + axes]), *t.shape[1 + axes :])


def shape(axes: Sequence[str], sizes: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of a shape."""
    found: list[int] = []
    for axis in axes:
        found.extend(sizes[axis] if axis[0] == "*" else (sizes[axis],))
    return tuple(found)


def totals(sizes: Mapping[str, Any]) -> dict[str, int]:
    """Sizes by plain names: "*l" becomes l, the number of tokens."""
    return {axis.lstrip("*"): math.prod(size) if axis[0] == "*" else size for axis, size in sizes.items()}


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """The value is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")


def inputs(declared: Mapping[str, str]) -> tuple[Input, ...]:
    """From {"x": "b *l d", "z?": "b *l d", "cos!": "s d"}: ? marks an optional tensor, ! one without a gradient; "public:name" has both names."""
    found = []
    for name, text in declared.items():
        every = tuple(forms(text))
        axes = every[0].axes
        tokens = axes[1] if len(axes) > 1 and axes[1] in TOKENS else None
        public, _, own = name.rstrip("?!").rpartition(":")
        found.append(Input(own, public or own, every, axes, tokens, "?" in name, "!" not in name))
    return tuple(found)


class Rules(NamedTuple):
    """What the sizes of a call must also obey.

    first: tensors whose shapes are read before the others'. within: {"n": (1, 256)}, the limits of an axis. divides: {"g": "h"}. derived: {"taps":
    w - 1, a function of the sizes}, known as soon as those are. without: {"delta_proj": ("r", "d")}: where that tensor is absent, r is d.
    """

    first: Sequence[str] = ()
    within: Mapping[str, tuple[int, float]] = {}
    divides: Mapping[str, str] = {}
    derived: Mapping[str, tuple[str, Callable[[int], int]]] = {}
    without: Mapping[str, tuple[str, str]] = {}


def floating(name: str, t: object, optional: bool = False) -> None:
    """Raise unless it is a floating-point tensor (or None where that is allowed)."""
    if t is None and optional:
        return
    if not isinstance(t, Tensor):
        hint = " of torch.fx: call the op as medssm.ops.<op>, or give its name to torch.fx.wrap" if isinstance(t, Proxy) else ""
        raise TypeError(f"{name}: expected a tensor, got {'None' if t is None else type(t).__name__}{hint}")
    if t.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float32, float64, bfloat16 or float16, got {str(t.dtype).removeprefix('torch.')}")


def check(declared: Sequence[Input], tensors: Sequence[Any], main: int) -> None:
    """Every tensor is a floating-point tensor, and all are where the main one is."""
    floating(declared[main].public, tensors[main])
    device = tensors[main].device
    for given, t in zip(declared, tensors, strict=True):
        floating(given.public, t, given.optional)
        if t is not None and t.device != device:
            raise ValueError(f"{given.public}: expected device {device}, where {declared[main].public} is, got {t.device}")


def agree(declared: Mapping[str, str], *tensors: Tensor | None) -> Sizes:
    """`sizes` of tensors with these shapes, for a function that is no op: {"x": "b l d", "weight": "d", "bias?": "d"}."""
    return sizes(list(zip(inputs(declared), tensors, strict=True)), True, Rules())


def sizes(pairs: Sequence[tuple[Input, Tensor | None]], spatial: bool, rules: Rules, known: Mapping[str, int] | None = None) -> Sizes:
    """Raise one clear error for shapes that do not fit the declaration; return the size of every axis.

    spatial: whether the tokens may be an image or a volume. known: sizes that no tensor tells.
    """
    found: Sizes = dict(known or {})
    owners: dict[str, tuple[str, Form, Tensor]] = {}
    absent = [given.name for given, t in pairs if t is None]
    for given, t in pairs:
        for name, (axis, of) in rules.without.items():
            if name in absent and of in found:
                found.setdefault(axis, found[of])
        if t is None:
            continue
        for form in given.forms:
            new = form.fit(t.shape, found, spatial)
            if new is not None:
                break
        else:
            fitting = [form.text(found, spatial) for form in given.forms if found.get(form.left_out or "", 1) == 1]
            raise ValueError(f"{given.public}: expected {' or '.join(dict.fromkeys(fitting))}, got {tuple(t.shape)}")
        for axis in new:
            owners.setdefault(axis, (given.public, form, t))
        found.update(new)
        for axis, (of, size_of) in rules.derived.items():
            if of in found:
                found.setdefault(axis, size_of(found[of]))
    for name, (axis, of) in rules.without.items():
        if name in absent and found[axis] != found[of]:  # it was read before the size that it must have
            name, form, t = owners[axis]
            raise ValueError(f"{name}: expected {form.text({**found, axis: found[of]}, spatial)}, got {tuple(t.shape)}")
    for axis, (low, high) in rules.within.items():
        size = found[axis]
        if size < low or size > high:
            name, form, t = owners[axis]
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{name}: expected {form.text({}, spatial)} with {axis} {limits}, got {tuple(t.shape)}")
    for axis, of in rules.divides.items():
        size, whole = found[axis], found[of]
        if size == 0 or whole % size:
            name, form, t = owners[axis]
            raise ValueError(f"{name}: expected {form.text({}, spatial)} with {axis} dividing {of} = {whole}, got {tuple(t.shape)}")
    return found
