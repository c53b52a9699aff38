"""Names and arguments that upstream has and this release has not."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor


class _Absent(type):
    """Imports like a class or function; calling it, taking an attribute of it or inheriting from it raises one clear line."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> _Absent:
        for base in bases:
            if isinstance(base, cls):
                base()
        return super().__new__(cls, name, bases, namespace)

    def __call__(cls, *_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(cls._line())

    def __getattr__(cls, attribute: str) -> NoReturn:
        raise AttributeError(cls._line())

    def _line(cls) -> str:
        return f"{cls.__name__} is not in this release of medssm, which stands in for mamba_ssm and causal_conv1d here"


def absent(*names: str) -> dict[str, type]:
    """A placeholder for each name."""
    return {name: _Absent(name, (), {}) for name in names}


def refuse(**arguments: object) -> None:
    """Raise NotImplementedError for the first of these arguments that is given, neither None nor False."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{name}: expected {'False' if value is True else 'None'} (it is not in this release of medssm), got {got}")
