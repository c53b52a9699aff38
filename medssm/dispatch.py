"""Which backend serves a call: one readable priority list, and a reason for every refusal.

Every op registers its backends here. `auto` takes the first of PRIORITY that this machine has and that serves the arguments;
on a GPU, medssm/thresholds.py says by size which comes first.
`backend=` on a call raises where that backend cannot serve; `use_backend` and the environment variable MEDSSM_BACKEND express
a preference: the call falls back with one logged reason, unless `strict`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medssm import thresholds

logger = logging.getLogger("medssm")

#: Fastest first; `reference` serves everything.
PRIORITY = ("cuda", "triton", "native", "reference")
NAMES = ("auto", *PRIORITY)


class Backend(NamedTuple):
    """One implementation of an op.

    missing: why this machine does not have it, or None. refuse: why it cannot serve these very arguments, or None.
    """

    missing: Callable[[], str | None]
    refuse: Callable[..., str | None]


_ops: dict[str, dict[str, Backend]] = {}


class Question(NamedTuple):
    """In the place of a call's `backend`: the call raises Answer where it would have chosen a backend. named: the call's own argument."""

    named: str | None


class Answer(Exception):
    """report: what `explain` returns."""

    def __init__(self, report: dict[str, str]) -> None:
        super().__init__("explain asks, nothing is computed")
        self.report = report


def _serves(*_args: object) -> None:
    return None


@functools.cache
def kernel(op: str, backend: str) -> ModuleType:
    """The module of an op's kernels, imported at its first use: medssm.kernels.<op>.<backend>."""
    return importlib.import_module(f"medssm.kernels.{op}.{backend}")


def register(op: str, **served: Backend) -> None:
    """Enter an op in the table with the backends that it has beside the reference."""

    def absent(name: str) -> Backend:
        return Backend(lambda: f"{op} has no {name} kernel in this release", _serves)

    _ops[op] = {name: served.get(name, absent(name)) for name in PRIORITY} | {"reference": Backend(_serves, _serves)}


def _check(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


class _Choice(threading.local):
    """The thread's preference; the environment's until the thread states one."""

    def __init__(self) -> None:
        self.name = _check(os.environ.get("MEDSSM_BACKEND", "auto"), "MEDSSM_BACKEND")
        self.strict = False


_choice = _Choice()


def _keep_for_recomputation() -> None:
    """torch.utils.checkpoint recomputes in backward, perhaps after a use_backend has ended or in a thread of autograd's: under the choice of now.

    PyTorch gives a checkpoint no place for such a thing; its frame, which holds the function that recomputes, is known to the hook that is in force
    for saved tensors. (Where there is no such hook, there is nothing to do; reentrant checkpoints do not compare and need none.)
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack: Any = hooks[0] if hooks else None
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint" or "frame" not in pack.__code__.co_freevars:
        return
    frame = pack.__closure__[pack.__code__.co_freevars.index("frame")].cell_contents
    if getattr(frame.recompute_fn, "func", None) is not _under:
        frame.recompute_fn = functools.partial(_under, (_choice.name, _choice.strict), frame.recompute_fn)


def _under(choice: tuple[str, bool], function: Callable[..., Any], *args: Any) -> Any:
    with use_backend(*choice):
        return function(*args)


_told: set[tuple[str, str, str]] = set()


class use_backend:
    """Prefer a backend in this thread: a setter, and a context manager that puts the earlier choice back.

    name: reference | native | triton | cuda | auto. strict: raise where the backend cannot serve, instead of falling back
    with one logged reason.

    >>> with medssm.use_backend("reference"):
    ...     y = model(x)
    """

    def __init__(self, name: str, strict: bool = False) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _keep_for_recomputation()
        self._before = (_choice.name, _choice.strict)
        _choice.name, _choice.strict = _check(name, "backend"), bool(strict)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *_exc: object) -> None:
        _choice.name, _choice.strict = self._before


def _why_not(op: str, name: str, tensors: Sequence[Tensor | None]) -> str | None:
    backend = _ops[op][name]
    return backend.missing() or backend.refuse(*tensors)


def choose(op: str, backend: str | Question | None, main: Tensor, tensors: Sequence[Tensor | None]) -> str:
    """The backend that this call takes; `backend` is the call's own argument, which raises ValueError where it cannot serve.

    main: the tensor whose size and device say which comes first.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _keep_for_recomputation()
    if isinstance(backend, Question):
        raise Answer(_report(op, backend.named, main, tensors))
    wanted, forced = (_choice.name, _choice.strict) if backend is None else (_check(backend, "backend"), True)
    if wanted != "auto":
        why = _why_not(op, wanted, tensors)
        if why is None:
            return wanted
        if forced:
            raise ValueError(f"backend={wanted!r} cannot serve this {op}: {why}")
        _tell(op, wanted, why)
    for name in _priority(op, main):
        if _why_not(op, name, tensors) is None:
            return name
    raise AssertionError("the reference serves every call")


def _priority(op: str, main: Tensor) -> tuple[str, ...]:
    """PRIORITY; for a tensor on a GPU what thresholds.FIRST names comes first."""
    if not main.is_cuda:
        return PRIORITY
    name = thresholds.first(op, main.numel())
    return (name, *(other for other in PRIORITY if other != name))


def free(backend: str | Question | None, name: str) -> bool:
    """Whether nothing but the arguments stands against this backend: the call and the thread leave the choice open, or name it."""
    return (_choice.name if backend is None else backend) in ("auto", name)


def _tell(op: str, name: str, why: str) -> None:
    if (op, name, why) not in _told:
        _told.add((op, name, why))
        logger.warning("%s: %s is not used: %s", op, name, why)


def backends() -> dict[str, dict[str, str]]:
    """What this machine has: {op: {backend: "ok" or the reason why not}}."""
    return {op: {name: table[name].missing() or "ok" for name in reversed(PRIORITY)} for op, table in sorted(_ops.items())}


def _report(op: str, named: str | None, main: Tensor, tensors: Sequence[Tensor | None]) -> dict[str, str]:
    """{"chosen": name, backend: "ok" | "would serve; … was preferred" | the reason why it cannot serve}."""
    chosen = choose(op, named, main, tensors)
    report = {"chosen": chosen}
    for name in PRIORITY:
        why = _why_not(op, name, tensors)
        report[name] = why or ("ok" if name == chosen else f"would serve; {chosen} was preferred")
    return report
