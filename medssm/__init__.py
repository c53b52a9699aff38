"""medssm: linear-time sequence layers (selective scan, linear attention) for 2D and 3D medical imaging.

The ops are in `medssm.ops`, scan orders in `medssm.orders`, layers in `medssm.nn`; `create_model` builds a backbone.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # before all else: the kernels' loader compares it with the library's

_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_here.parent))  # a checkout that made the link medssm/kernels -> ../kernels a text file

from medssm import ops, orders  # noqa: E402  (after the path above, which makes medssm.kernels importable)
from medssm.dispatch import backends, use_backend  # noqa: E402  (likewise)
from medssm.ops.op import explain  # noqa: E402  (likewise)

if TYPE_CHECKING:  # what __getattr__ loads on first use, for editors and type checkers
    from medssm import integrations, models, nn
    from medssm.models import create_model, from_upstream, list_models, register_model

__all__ = [
    "backends",
    "create_model",
    "explain",
    "from_upstream",
    "integrations",
    "list_models",
    "models",
    "nn",
    "ops",
    "orders",
    "register_model",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """The layers and the models on first use: importing medssm stays as light as its ops."""
    if name in ("integrations", "models", "nn"):
        return _import_module(f"medssm.{name}")
    if name in __all__:
        return getattr(_import_module("medssm.models"), name)
    raise AttributeError(f"module 'medssm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
