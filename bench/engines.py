"""Exported networks against PyTorch, in turn and on one thread: python bench/engines.py [--size tiny] [--edge 64] [--seconds 20] [--out FOLDER]

medssm_unet with its scans and with linear attention, random weights, one image. The sides: eager PyTorch as predict runs it (channels last, batch
norms folded), onnxruntime with medssm's custom operators, onnxruntime with standard operators alone, OpenVINO and AOTInductor in float32. All sides
are made first; then they run in turn, and the least time of a side counts. An engine that is not installed, and a side that has no export, is said
and left out.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import record
from torch import nn

import medssm
from medssm.bench import measure
from medssm.compress.fold import fold
from medssm.errors import UserError
from medssm.export import to_aoti, to_onnx, to_openvino
from medssm.segment.networks import memory_format, placed

Side = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--edge", type=int, default=64, help="voxels along each axis of the image")
    parser.add_argument("--seconds", type=float, default=20, help="of each side")
    parser.add_argument("--mixers", nargs="+", default=["ss_nd", "linear_attention"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "engines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"edge": args.edge, "threads": 1, "networks": {}}
    for mixer in args.mixers:
        torch.manual_seed(0)
        network = medssm.create_model("medssm_unet", spatial_dims=3, in_channels=1, out_channels=3, size=args.size, mixer=mixer).eval()
        image = torch.randn(1, 1, *[args.edge] * 3)
        with tempfile.TemporaryDirectory() as folder:
            found, errors = sides(network, image, Path(folder))
            times = {name: row["min"] for name, row in measure.times(found, args.seconds, 1).items()}
        row = {name: {"ms": 1000 * seconds, "over_eager": seconds / times["eager"], "error": errors[name]} for name, seconds in times.items()}
        results["networks"][mixer] = row
        for name, figures in row.items():
            print(f"{mixer:18} {name:22} {figures['ms']:8.1f} ms {figures['over_eager']:6.2f} x eager, error {figures['error']:.0e}", flush=True)
    record(
        args.out,
        args.size,
        results,
        "Exported networks against PyTorch, one thread",
        ("medssm_unet", "mixer", "engine", "ms", "over PyTorch", "error"),
        rows,
    )


def rows(size: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    return [
        (f"{size}, {found['edge']}^3", mixer, engine, f"{side['ms']:.1f}", f"{side['over_eager']:.2f}", f"{side['error']:.0e}")
        for mixer, sides in found["networks"].items()
        for engine, side in sides.items()
    ]


def sides(network: nn.Module, image: torch.Tensor, folder: Path) -> tuple[dict[str, Side], dict[str, float]]:
    """What runs the network, and how far each is from PyTorch, as its export measured it."""
    shape, pixels = tuple(image.shape), image.numpy()
    found: dict[str, Side] = {}
    errors = {"eager": 0.0}

    def onnx(file: Path, portable: bool) -> tuple[dict[str, Any], Side]:
        from medssm.export.onnx import session

        made = to_onnx(network, file.with_suffix(".onnx"), shape, portable=portable)
        return made, partial(session(made["file"], bool(made["operators"])), pixels)

    def openvino(file: Path) -> tuple[dict[str, Any], Side]:
        from openvino import Core

        from medssm.export.openvino import compiled

        made = to_openvino(network, file.with_suffix(".xml"), shape)
        return made, partial(compiled(Core().read_model(made["file"])), pixels)

    def aoti(file: Path) -> tuple[dict[str, Any], Side]:
        made = to_aoti(network, file.with_suffix(".pt2"), shape)
        return made, partial(torch._inductor.aoti_load_package(made["file"]), image)

    makers: dict[str, Callable[[Path], tuple[dict[str, Any], Side]]] = {
        "onnxruntime": partial(onnx, portable=False),
        "onnxruntime_portable": partial(onnx, portable=True),
        "openvino": openvino,
        "aotinductor": aoti,
    }
    for name, make in makers.items():
        try:
            made, found[name] = make(folder / name)
            errors[name] = made["error"]
        except (UserError, ModuleNotFoundError) as reason:
            print(f"{name}: left out: {reason}", flush=True)
    eager, fast = placed(fold(copy.deepcopy(network))[0], torch.device("cpu"), 3), image.contiguous(memory_format=memory_format(3))

    def in_torch() -> torch.Tensor:
        with torch.inference_mode():
            return eager(fast)

    return {"eager": in_torch, **found}, errors


if __name__ == "__main__":
    main()
