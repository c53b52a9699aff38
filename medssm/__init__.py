"""medssm: linear-time sequence layers (selective scan, linear attention) for 2D and 3D medical imaging.

The ops are in `medssm.ops`, scan orders in `medssm.orders`, layers in `medssm.nn`; `create_model` builds a backbone.
"""

import importlib
from pathlib import Path

__version__ = "0.1.0"  # before all else: the kernels' loader compares it with the library's

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_here.parent))  # a checkout that made the link medssm/kernels -> ../kernels a text file

from medssm import ops, orders  # noqa: E402  (after the path above, which makes medssm.kernels importable)
from medssm.dispatch import backends, use_backend  # noqa: E402  (likewise)
from medssm.ops.op import explain  # noqa: E402  (likewise)

__all__ = ["backends", "create_model", "explain", "from_upstream", "list_models", "ops", "orders", "register_model", "use_backend"]

_MODELS = ("create_model", "list_models", "register_model", "from_upstream")
_LATER = ("integrations", "models", "nn")


def __getattr__(name: str):
    """The layers and the model registry on first use: importing medssm stays as light as its ops."""
    if name in _LATER:
        return importlib.import_module(f"medssm.{name}")
    if name in _MODELS:
        return getattr(importlib.import_module("medssm.models"), name)
    raise AttributeError(f"module 'medssm' has no attribute {name!r}")
