"""The engines that run an exported network: ONNX Runtime for .onnx, OpenVINO for .xml. Each is imported when a file needs it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from medssm_runtime import onnx_file
from medssm_runtime.errors import UserError, first_line
from medssm_runtime.settings import KEY, ClassSettings, Settings, parse

# Images (batch, channels, *patch), float32 -> logits (batch, outputs, *patch), of a classifier (batch, classes).
Run: TypeAlias = "Callable[[np.ndarray], np.ndarray]"

OPERATORS = 1  # version of the operators in the library below: a file with others may mean something else by the same name
LIBRARY = "libmedssm_onnx" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def open_network(path: Path, threads: int | None, ops: Path | None) -> tuple[Settings | ClassSettings, Run]:
    """The settings of an exported file, and what runs its network.

    Args:
        path: FILE.onnx or FILE.xml
        threads: of the engine; None leaves it to the engine
        ops: the library of medssm's operators for ONNX Runtime; None looks for it

    Raises:
        UserError: the file cannot be read, the engine is not installed, or lacks an operator.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    kinds = {".onnx": _onnxruntime, ".xml": _openvino}
    if path.suffix.lower() not in kinds:
        raise UserError(f"{path}: expected a file that ends in {' or '.join(kinds)}")
    return kinds[path.suffix.lower()](path, threads, ops)


def _onnxruntime(path: Path, threads: int | None, ops: Path | None) -> tuple[Settings | ClassSettings, Run]:
    settings = parse(onnx_file.metadata(path, KEY), path)
    engine = _engine("onnxruntime", path)
    options = engine.SessionOptions()
    options.log_severity_level = 3  # errors alone
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # no rounding to 8 bits that the file does not ask for
    if threads:
        options.intra_op_num_threads = threads
        options.add_session_config_entry("medssm.threads", str(threads))
    try:
        if settings.custom_ops:
            options.register_custom_ops_library(str(_operators(path, settings.custom_ops, ops)))
        session = engine.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except UserError:
        raise
    except Exception as error:  # its own classes, which share no base
        raise UserError(f"{path}: onnxruntime {engine.__version__} does not take it: {first_line(error)}") from error
    name = session.get_inputs()[0].name

    def run(images: np.ndarray) -> np.ndarray:
        try:
            found: np.ndarray = session.run(None, {name: images})[0]
        except Exception as error:
            raise UserError(f"{path}: onnxruntime {engine.__version__}: {first_line(error)}") from error
        return found

    return settings, run


def _openvino(path: Path, threads: int | None, ops: Path | None) -> tuple[Settings | ClassSettings, Run]:
    if ops:
        raise UserError(f"ops: expected a file of ONNX with it, got {path}: OpenVINO's files need no operators of medssm")
    engine = _engine("openvino", path)
    version = f"openvino {engine.__version__.partition('-')[0]}"
    # The network's own types: OpenVINO would take bfloat16 on a processor that has it, and 8 bits beside 8-bit weights, and label other voxels.
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "PERFORMANCE_HINT": "LATENCY"}
    options |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    if not path.with_suffix(".bin").is_file():
        raise UserError(f"{path}: no {path.with_suffix('.bin').name} beside it, which has the weights")
    try:
        core = engine.Core()
        model = core.read_model(path)
    except Exception as error:
        raise UserError(f"{path}: {version} does not take it: {_reason(error)}") from error
    settings = parse(model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else None, path)
    try:
        compiled = core.compile_model(model, "CPU", options)
    except Exception as error:
        raise UserError(f"{path}: {version} does not take it: {_reason(error)}") from error

    def run(images: np.ndarray) -> np.ndarray:
        try:
            found: np.ndarray = compiled([images])[0]
        except Exception as error:
            raise UserError(f"{path}: {version}: {_reason(error)}") from error
        return found

    return settings, run


def _reason(error: BaseException) -> str:
    """The line of an error of OpenVINO's that says what is wrong: the first ones name places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith(("Exception from ", "Check '"))), first_line(error))


def _engine(package: str, path: Path) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: needs the package {package}: pip install {package}") from error


def _operators(path: Path, wanted: dict[str, Any], ops: Path | None) -> Path:
    """The library of medssm's operators: the one that is given, or that of this package, or that of an installed medssm, which is not imported."""
    if (version := wanted.get("version")) != OPERATORS:
        raise UserError(
            f"{path}: needs the operators {wanted.get('domain')} of version {version}, this medssm_runtime has those of version {OPERATORS}: "
            "install the version of the export"
        )
    if ops:
        if not ops.is_file():
            raise UserError(f"ops: {ops}: no such file")
        return ops.resolve()  # a mere name would be looked for in the system's folders
    folders = [Path(__file__).parent / "_lib"]
    installed = importlib.util.find_spec("medssm")
    folders += [Path(folder) / "_lib" for folder in (installed.submodule_search_locations or () if installed else ())]
    for folder in folders:
        if (folder / LIBRARY).is_file():
            return folder / LIBRARY
    raise UserError(f"{path}: needs the operators {wanted['domain']}: no {LIBRARY} in {' or '.join(map(str, folders))}: name it with --ops")
