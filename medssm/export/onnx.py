"""medssm export onnx: a trained network as an ONNX file with a free batch, and of a network that segments with free sizes.

    medssm export onnx RUN FILE.onnx [--portable]

medssm's operators are nodes of the domain "medssm": onnxruntime runs them by the library `medssm.export.custom_ops()`. A portable file has
standard operators alone, so that any engine runs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import onnxscript  # noqa: F401  (torch's exporter needs it, and does not name it where it is missing)
import torch
from torch import Tensor, nn

from medssm.compress import int8
from medssm.errors import UserError
from medssm.export import custom_ops, weights
from medssm.export.check import Finest, Run, Shapes, check, shapes
from medssm.export.command import Job, check_card, check_target
from medssm.export.command import show as show
from medssm.export.metadata import KEY, text
from medssm.export.program import DOMAIN, VERSION, Replacements, Replacing, export, quiet
from medssm.files import first_line, write_bytes

OPS = {"domain": DOMAIN, "version": VERSION}  # of the metadata: what a file with nodes of medssm's needs


def export_onnx(
    run: Path | str,
    file: Path | str,
    *,
    portable: bool = False,
    overlap: float | None = None,
    mirror: bool = False,
    license: Path | str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a trained network as an ONNX file, with its model card beside it, once onnxruntime has given PyTorch's output at two sizes.

    Args: ONNX
        run: folder written by medssm train or medssm compress; of folds, one of them
        file: to write, FILE.onnx; FILE.onnx.md beside it is the model card
        portable: standard operators alone, which any engine runs; for networks of linear attention and of convolutions
        overlap: of neighbouring windows, 0 to less than 1, for who runs the file (default: 0.5)
        mirror: say to who runs the file that the mirrorings of the training are averaged
        license: text file, the weights' licence; without it the card says that none was stated
        overwrite: write over a file that this command did not write

    Returns:
        {"file", "card", "model", "parameters", "bytes": of the file, "operators": those of medssm that it needs, "error": the largest difference
        from PyTorch over the spread of the output}

    Raises:
        UserError: what cannot be read, exported, run or written; no file is left then.
    """
    file = Path(file)
    check_target(file, ".onnx", _is_made_here, overwrite)
    check_card(file, license, overwrite)
    job = Job.of(run, file, overlap, mirror)
    model, used = model_of(job.network, job.images, portable)
    table = job.metadata(OPS if used else None)
    error = _checked(model, job.network, job.images, {KEY: text(table)})
    write_bytes(file, model.SerializeToString())
    return job.finish(table, license, used, error)


def to_onnx(
    network: nn.Module,
    file: Path | str,
    shape: Sequence[int],
    *,
    portable: bool = False,
    sizes: Literal["free", "fixed"] = "free",
    properties: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write any network as an ONNX file: input `image` (batch, channels, *spatial), output `logits` (batch, classes, *spatial), float32, or
    (batch, classes) of a classifier.

    The batch is free. The file is written once onnxruntime has given PyTorch's output for two shapes other than the traced one.

    Args:
        network: in inference mode when this returns; of a list of outputs the first is taken
        file: to write, FILE.onnx
        shape: (1, channels, *spatial), an image that the network takes; one of the two shapes that are checked
        portable: standard operators alone
        sizes: free, or fixed to those of `shape`, for a network that takes no other ones
        properties: texts by name for the file's metadata_props
        overwrite: write over a file that is there

    Returns:
        {"file", "operators": those of medssm that it needs, "error": the largest difference from PyTorch over the spread of the output}

    Raises:
        UserError: a network that cannot be exported or run, a file that cannot be written; no file is left then.
    """
    file = Path(file)
    check_target(file, ".onnx", _is_made_here, overwrite)
    images = shapes(network, shape, sizes)
    model, used = model_of(network, images, portable)
    error = _checked(model, network, images, properties or {})
    write_bytes(file, model.SerializeToString())
    return {"file": str(file), "operators": used, "error": error}


def session(model: bytes | str, used: bool, threads: int | None = None) -> Run:
    """Runs a model, given as its bytes or its path, on the CPU. used: whether it needs medssm's operators; threads: PyTorch's number for None."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # no rounding to 8 bits that the file does not ask for
    if used:
        options.add_session_config_entry("medssm.threads", str(options.intra_op_num_threads))
        options.register_custom_ops_library(str(custom_ops()))
    found = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda image: found.run(None, {"image": image})[0]


def model_of(network: nn.Module, images: Shapes, portable: bool) -> tuple[onnx.ModelProto, list[str]]:
    """The network as a model, and the operators of medssm that it needs."""
    program = export(Finest(network), images, portable, _INT8)
    with quiet():
        try:
            exported = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=["image"], output_names=["logits"], external_data=False)
        except Exception as error:
            raise UserError(f"the network does not export to ONNX: {_reason(error)}") from error
    assert exported is not None
    model = exported.model_proto
    free = ["batch", *(f"size{axis}" for axis in range(len(images.traced) - 2 if images.free else 0))]
    for value in (*model.graph.input, *model.graph.output):
        axes = value.type.tensor_type.shape.dim
        for name, axis in zip(free, (axes[0], *axes[2:]), strict=False):  # a classifier's output has a batch alone
            if not axis.dim_param:
                raise UserError(f"a size became fixed: {name} of {value.name} is {axis.dim_value}")
            axis.dim_param = name
    # What is known of values inside names the sizes otherwise; nodes and values name files of this machine.
    del model.graph.value_info[:]
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del part.metadata_props[:]
    weights.store(model, network)
    return model, sorted({node.op_type for node in model.graph.node if node.domain == DOMAIN})


def checked(model: onnx.ModelProto, network: nn.Module, images: Shapes, opened: Callable[[onnx.ModelProto], Run], engine: str) -> float:
    """The model's difference from PyTorch in an engine. opened: what runs a model there.

    A model that rounds to 8 bits is first checked without the roundings, to the limit of floating point, then with them, in steps of 8 bits.
    """

    def run_of(model: onnx.ModelProto) -> Run:
        try:
            return opened(model)
        except UserError:
            raise
        except Exception as error:  # engines have exceptions of their own
            raise UserError(f"{engine} does not take the exported network: {first_line(error)}") from error

    whole = Finest(network)
    rounds = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if rounds:
        with Replacing({int8.rounded: _clamped}):
            check(whole, run_of(_unrounded(model)), images.checked, engine)
    return check(whole, run_of(model), images.checked, engine, rounds=rounds)


def _checked(model: onnx.ModelProto, network: nn.Module, images: Shapes, properties: Mapping[str, str]) -> float:
    """The model's difference from PyTorch in onnxruntime; its properties are set."""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(properties))
    used = any(node.domain == DOMAIN for node in model.graph.node)
    return checked(model, network, images, lambda model: session(model.SerializeToString(), used), f"onnxruntime {onnxruntime.__version__}")


def _quantized(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """An input in 8 bits, and what they give back."""
    zero = zero.to(torch.uint8)
    q = torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), dtype=torch.uint8, shape=x.shape)
    return torch.onnx.ops.symbolic("DequantizeLinear", (q, scale, zero), dtype=x.dtype, shape=x.shape)


def _dequantized(weight: Tensor, scale: Tensor, axis: int = 0) -> Tensor:
    """Weights that the file has in 8 bits."""
    zeros = torch.zeros_like(scale, dtype=torch.int8)  # onnxruntime 1.19 mistakes the type without them
    return torch.onnx.ops.symbolic("DequantizeLinear", (weight, scale, zeros), {"axis": axis}, dtype=scale.dtype, shape=weight.shape)


def _clamped(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What `int8.rounded` gives, but for the rounding."""
    return x.clamp(-zero * scale, (255 - zero) * scale)


def _unrounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the inputs of its layers clamped where it rounds them to 8 bits."""
    found = onnx.ModelProto.FromString(model.SerializeToString())
    values = {value.name: onnx.numpy_helper.to_array(value) for value in found.graph.initializer}
    inputs = {node.output[0]: node.input for node in found.graph.node if node.op_type == "QuantizeLinear"}
    for node in found.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in inputs:
            x, (scale, zero) = inputs[node.input[0]][0], (values[name] for name in node.input[1:])
            for end, step in (("least", 0), ("most", 255)):
                found.graph.initializer.append(onnx.numpy_helper.from_array((step - zero.astype(np.float32)) * scale, f"{node.output[0]}_{end}"))
            node.op_type, node.input[:] = "Clip", [x, f"{node.output[0]}_least", f"{node.output[0]}_most"]
    return found


_INT8: Replacements = {int8.rounded: _quantized, int8.floats: _dequantized}


def _is_made_here(file: Path) -> bool:
    try:
        model = onnx.load(file, load_external_data=False)
        return any(entry.key == KEY and "schema" in json.loads(entry.value) for entry in model.metadata_props)
    except Exception:  # protobuf's own exceptions
        return False


def _reason(error: BaseException) -> str:
    """The line of an exporter's error, or of one that it came from, that says what is missing."""
    lines = [line.strip() for one in _causes(error) for line in str(one).splitlines()]
    return next((line for line in lines if "No ONNX function found" in line or "No decompositions" in line), first_line(list(_causes(error))[-1]))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
