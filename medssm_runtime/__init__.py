"""medssm without PyTorch: by a file of `medssm export onnx` or `medssm export openvino` a scan becomes the label map of `medssm predict`, and images
become its table of classes.

    python -m medssm_runtime model.onnx scan.nii.gz labels.nii.gz
    python -m medssm_runtime classifier.onnx images found.csv

In Python `load` reads the file once, and `predict` is what the command does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # that of medssm
__all__ = ["Classifier", "Network", "UserError", "load", "predict"]

if TYPE_CHECKING:
    from medssm_runtime.classifier import Classifier
    from medssm_runtime.command import predict
    from medssm_runtime.errors import UserError
    from medssm_runtime.network import Network, load


def __getattr__(name: str) -> Any:
    """Each name on first use: numpy and nibabel are imported when they are needed."""
    from importlib import import_module

    modules = {"Classifier": "classifier", "Network": "network", "UserError": "errors", "load": "network", "predict": "command"}
    if name in modules:
        return getattr(import_module(f"medssm_runtime.{modules[name]}"), name)
    raise AttributeError(f"module 'medssm_runtime' has no attribute {name!r}")
