"""A trained network in the form that other software runs: ONNX, OpenVINO and AOTInductor files, and MONAI bundles."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

_MODULES = {"to_onnx": "onnx", "to_openvino": "openvino", "to_aoti": "aoti"}  # loaded when they are asked for: each needs packages of its own


def custom_ops() -> Path:
    """The library that gives medssm's operators to onnxruntime: `SessionOptions.register_custom_ops_library(str(custom_ops()))`.

    Its threads are those of the session's configuration entry "medssm.threads", else as many as the processor has. Raises UserError where it was
    not built, or for another version.
    """
    from medssm.errors import UserError, install_command
    from medssm.kernels import native

    path = native.path().with_name(f"libmedssm_onnx{native.SUFFIX}")
    if not path.is_file():
        raise UserError(f"the library of custom operators for onnxruntime is not there ({path}): {install_command(again=True)} with a C++ compiler")
    try:
        native.load(path, "onnx")
    except OSError as error:
        raise UserError(f"{path} does not load: {error}") from error
    return path


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
