"""medssm export openvino: a trained network as OpenVINO's FILE.xml and FILE.bin with a free batch, and of a network that segments with free sizes.

It has standard operators alone, so it serves networks of linear attention and of convolutions; OpenVINO knows none of medssm's operators.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino
import torch
from torch import Tensor, nn

from medssm.compress.trainings import Training
from medssm.errors import UserError
from medssm.export.check import Finest, Run, Shapes, shapes
from medssm.export.command import check_card, check_target, write_portable
from medssm.export.command import show as show
from medssm.export.metadata import KEY
from medssm.export.onnx import checked, model_of
from medssm.export.program import quiet
from medssm.files import begins_with, first_line, write_bytes

_PATCHES = 8  # pairs of patches that NNCF finds ranges with
_MEAN = 0.05  # the largest mean difference that 8 bits may make, over the spread of the output


def export_openvino(
    run: Path | str,
    file: Path | str,
    *,
    int8: bool = False,
    data: Path | str | None = None,
    overlap: float | None = None,
    mirror: bool = False,
    license: Path | str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a trained network as OpenVINO's files, with its model card, once OpenVINO has given PyTorch's output at two sizes.

    Args: OpenVINO
        run: folder written by medssm train or medssm compress; of folds, one of them; a network of linear attention or of convolutions
        file: to write, FILE.xml; beside it FILE.bin, the weights, and FILE.xml.md, the model card
        int8: convolutions and matrix products in 8 bits by NNCF, with ranges from patches of the run's training cases; the package nncf is needed
        data: for int8, the data set that `run` was trained on, where it is now (default: where it was)
        overlap: of neighbouring windows, 0 to less than 1, for who runs the file (default: 0.5)
        mirror: say to who runs the file that the mirrorings of the training are averaged
        license: text file, the weights' licence; without it the card says that none was stated
        overwrite: write over a file that this command did not write

    Returns:
        {"file", "card", "model", "parameters", "bytes": of both files, "operators": [], "error": the largest difference from PyTorch over the
        spread of the output}; with `int8` the mean difference, on those patches

    Raises:
        UserError: what cannot be read, exported, run or written; no file is left then.
    """
    file = Path(file)
    _check_target(file, overwrite)
    check_card(file, license, overwrite)
    patches, done = (_patches(Path(run), data), ["int8"]) if int8 else ([], [])
    return write_portable(run, file, partial(_write, patches=patches), overlap=overlap, mirror=mirror, license=license, compression=done)


def to_openvino(
    network: nn.Module,
    file: Path | str,
    shape: Sequence[int],
    *,
    sizes: Literal["free", "fixed"] = "free",
    properties: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write any network that has a portable form as OpenVINO's files; arguments as `medssm.export.to_onnx`, the properties go to rt_info.

    Returns {"file", "error": the largest difference from PyTorch over the spread of the output}.
    """
    file = Path(file)
    _check_target(file, overwrite)
    return {"file": str(file), "error": _write(network, file, shapes(network, shape, sizes), properties or {})}


def compiled(model: Any, threads: int | None = None) -> Run:
    """Runs a model (openvino.Model) on the CPU in float32. threads: PyTorch's number for None."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
    options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0  # no rounding to 8 bits that the file does not ask for
    found = openvino.Core().compile_model(model, "CPU", options)
    return lambda image: found([image])[0]


def _write(network: nn.Module, file: Path, images: Shapes, properties: Mapping[str, str], patches: Sequence[Tensor] = ()) -> float:
    """Write both files; the difference from PyTorch. With patches in 8 bits, whose ranges they give."""
    exported, _ = model_of(network, images, portable=True)
    engine = f"openvino {openvino.__version__.partition('-')[0]}"

    def read(model: Any) -> Any:
        return openvino.Core().read_model(model.SerializeToString())

    difference = checked(exported, network, images, lambda model: compiled(read(model)), engine)
    model = read(exported)
    for port in (*model.inputs, *model.outputs):
        for axis in (0, *range(2, len(port.partial_shape))) if images.free else (0,):
            if port.partial_shape[axis].is_static:
                raise UserError(f"a size became fixed: axis {axis} of {port.any_name} is {port.partial_shape[axis].get_length()}")
    if patches:
        model = _in_8_bits(model, patches)
        difference = _mean_difference(network, compiled(model), patches)
        if not difference <= _MEAN:
            raise UserError(
                f"int8: {engine} in 8 bits differs from PyTorch by {difference:.3f} of the output's spread on average on patches of training cases, "
                f"expected at most {_MEAN}"
            )
    for key, value in properties.items():
        model.set_rt_info(value, [key])
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "network.xml"
        openvino.save_model(model, made, compress_to_fp16=False)
        write_bytes(file.with_suffix(".bin"), made.with_suffix(".bin").read_bytes())
        write_bytes(file, made.read_bytes())
    return difference


def _patches(run: Path, data: Path | str | None) -> list[Tensor]:
    """Images of training cases, (2, c, *patch)."""
    _nncf()
    source = Training.read(run, None if data is None else Path(data), seed=0)
    if "int8" in [step["kind"] for step in source.start.config.get("compression", [])]:
        raise UserError(f"int8: {run}: its network is in 8 bits already: leave --int8 out")
    return [image for image, _ in source.batches(_PATCHES, 0)]


def _nncf() -> Any:
    """The package, without its reports to its makers."""
    os.environ.setdefault("NNCF_CI", "1")
    try:
        return importlib.import_module("nncf")
    except ImportError as error:
        raise UserError(f"int8: needs the package nncf and what it needs: pip install nncf ({first_line(error)})") from error


def _in_8_bits(model: Any, images: Sequence[Tensor]) -> Any:
    """The model with convolutions and matrix products in 8 bits; NNCF prints nothing."""
    nncf = _nncf()
    with quiet(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return nncf.quantize(model, nncf.Dataset([image.numpy() for image in images]), preset=nncf.QuantizationPreset.MIXED)
        except Exception as error:  # of its own, and those of what it needs
            raise UserError(f"int8: nncf does not quantize the network: {first_line(error)}") from error


@torch.no_grad()
def _mean_difference(network: nn.Module, run: Run, images: Sequence[Tensor]) -> float:
    """From PyTorch, over the spread of PyTorch's output."""
    found, whole = [], Finest(network)
    for image in images:
        wanted = whole(image).numpy()
        found.append(float(np.abs(run(image.numpy()) - wanted).mean() / (np.ptp(wanted) or 1.0)))
    return sum(found) / len(found)


def _check_target(file: Path, overwrite: bool) -> None:
    check_target(file, ".xml", _is_made_here, overwrite)
    if not _is_made_here(file):
        check_target(file.with_suffix(".bin"), ".bin", lambda path: False, overwrite)


def _is_made_here(file: Path) -> bool:
    return begins_with(file, "<?xml") and f"<{KEY}" in file.read_text(errors="replace")
