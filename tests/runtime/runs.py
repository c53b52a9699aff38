"""RUN folders without a training and ONNX files without an exporter: two convolutions with random weights, written both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from medssm.export.metadata import KEY, metadata, text
from medssm.segment import networks, postprocess
from medssm.segment.preprocess import Fitted

MODEL = "two_convolutions"  # no network of this name can be built: `predict` gets the module itself
CLASSES = {"background": 0, "ball": 1, "box": 2}


def network(spatial_dims: int, channels: int, outputs: int) -> nn.Sequential:
    """Random weights, the same for the same arguments, with logits far from each other: few voxels are near ties."""
    torch.manual_seed(spatial_dims)
    convolution = (nn.Conv2d, nn.Conv3d)[spatial_dims - 2]
    found = nn.Sequential(convolution(channels, 4, 5, padding=2), nn.ReLU(), convolution(4, outputs, 3, padding=1))
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(3)
    return found


def write_run(folder: Path, steps: postprocess.Steps | None = None, **settings: Any) -> Path:
    """A finished training of `settings` (of `Fitted`; a 3D network with one channel unless they say otherwise)."""
    fitted = Fitted(
        **{
            "channels": ("MR",),
            "spacing": (1.0, 1.0, 1.0),
            "intensity": tuple({"scheme": "zscore"} for _ in settings.get("channels", ("MR",))),
            "classes": CLASSES,
            "ignore": None,
            "patch": (16, 16, 16),
            **settings,
        }
    )
    folder.mkdir(parents=True)
    fitted.save(folder / "fitted.json")
    networks.save(folder, network_of(fitted), networks.describe(MODEL, {}))
    if steps:
        postprocess.save(folder / postprocess.POSTPROCESSING, steps, {})
    return folder


def network_of(fitted: Fitted) -> nn.Sequential:
    return network(len(fitted.patch), len(fitted.channels), len(fitted.outputs))


def write_onnx(run: Path, file: Path, **options: Any) -> Path:
    """The network of a RUN folder as `medssm export onnx` would write it; `options` go to `metadata`."""
    import onnx
    from onnx import helper, numpy_helper

    fitted = Fitted.load(run / "fitted.json")
    first, _, last = network_of(fitted)
    weights = [
        numpy_helper.from_array(value.detach().numpy(), f"{name}.{key}")
        for name, layer in (("first", first), ("last", last))
        for key, value in layer.named_parameters()
    ]
    dims = len(fitted.patch)
    nodes = [
        helper.make_node("Conv", ["image", "first.weight", "first.bias"], ["a"], pads=[2] * 2 * dims),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "last.weight", "last.bias"], ["logits"], pads=[1] * 2 * dims),
    ]
    sizes = [f"size{i}" for i in range(dims)]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", count, *sizes])
        for name, count in (("image", len(fitted.channels)), ("logits", len(fitted.outputs)))
    ]
    graph = helper.make_graph(nodes, "network", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"other": "text", KEY: text(metadata(run, **options))})
    onnx.save(model, file)
    return file
