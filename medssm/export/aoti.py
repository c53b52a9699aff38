"""medssm export aoti: a trained network compiled by AOTInductor, as one package that torch loads without medssm.

    run = torch._inductor.aoti_load_package("FILE.pt2")

It has PyTorch's operators alone, so it serves networks of linear attention and of convolutions. It is compiled for this processor and this version of
torch, with the weights as constants.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from medssm.compress.int8 import Int8
from medssm.errors import UserError
from medssm.export.check import Finest, Shapes, check, shapes
from medssm.export.command import check_card, check_target, write_portable
from medssm.export.command import show as show
from medssm.export.metadata import KEY
from medssm.export.program import export, quiet
from medssm.files import atomic, first_line

_USE = (
    "`torch._inductor.aoti_load_package` opens the file, which takes images so prepared; what is before and behind the network is for its user to do."
)


def export_aoti(
    run: Path | str,
    file: Path | str,
    *,
    overlap: float | None = None,
    mirror: bool = False,
    license: Path | str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Compile a trained network to a package for torch without medssm, with its model card, once it has given PyTorch's output at two sizes.

    Args: AOTInductor
        run: folder written by medssm train or medssm compress; of folds, one of them; a network of linear attention or of convolutions
        file: to write, FILE.pt2; FILE.pt2.md beside it is the model card
        overlap: of neighbouring windows, 0 to less than 1, for who runs the file (default: 0.5)
        mirror: say to who runs the file that the mirrorings of the training are averaged
        license: text file, the weights' licence; without it the card says that none was stated
        overwrite: write over a file that this command did not write

    Returns:
        {"file", "card", "model", "parameters", "bytes", "operators": [], "error": the largest difference from PyTorch over the spread of the output}

    Raises:
        UserError: what cannot be read, exported, compiled, run or written; no file is left then.
    """
    file = Path(file)
    check_target(file, ".pt2", _is_made_here, overwrite)
    check_card(file, license, overwrite)
    needs = f"torch {torch.__version__} and a processor like that of the export"
    return write_portable(run, file, _write, overlap=overlap, mirror=mirror, license=license, use=_USE, needs=needs)


def to_aoti(
    network: nn.Module,
    file: Path | str,
    shape: Sequence[int],
    *,
    sizes: Literal["free", "fixed"] = "free",
    properties: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Compile any network that has a portable form; arguments as `medssm.export.to_onnx`, the properties are the package's metadata.

    Returns {"file", "error": the largest difference from PyTorch over the spread of the output}.
    """
    file = Path(file)
    check_target(file, ".pt2", _is_made_here, overwrite)
    return {"file": str(file), "error": _write(network, file, shapes(network, shape, sizes), properties or {})}


def _write(network: nn.Module, file: Path, images: Shapes, properties: Mapping[str, str]) -> float:
    """Write the package; its difference from PyTorch."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise UserError("AOTInductor needs a C++ compiler (g++ or clang++)")
    if any(isinstance(layer, Int8) for layer in network.modules()):
        raise UserError("AOTInductor would compute 8-bit layers in floating point: export the network as it was before, or to ONNX or OpenVINO")
    program = export(Finest(network), images, portable=True)
    configs = {"freezing": True, "aot_inductor.metadata": dict(properties)}
    with atomic(file) as temporary:
        with quiet(), torch.no_grad():
            try:
                torch._inductor.aoti_compile_and_package(program, package_path=str(temporary), inductor_configs=configs)
                run = torch._inductor.aoti_load_package(str(temporary))
            except Exception as error:
                raise UserError(f"AOTInductor does not compile the network: {first_line(error)}") from error
        return check(Finest(network), lambda image: run(torch.from_numpy(image)).numpy(), images.checked, "AOTInductor")


def _is_made_here(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as package:
            return any(name.endswith("_metadata.json") and f'"{KEY}"'.encode() in package.read(name) for name in package.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
