"""Weights that `medssm compress --int8` rounded to 8 bits, as 8-bit integers in an ONNX file too.

    W = Q t,   Q in -127 to 127, one t for each output channel (or row of a matrix)

stands in the file as Cast(Q) and Mul by t, which engines compute once, when they open the file: the weights are then the same to the bit. A
DequantizeLinear would be computed for every image, as onnxruntime takes it for a layer in integers.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import nn

_LEAST = 256  # values of a weight from which integers make a file smaller


def store(model: onnx.ModelProto, network: nn.Module) -> None:
    """Put integers in the place of those weights of the model that the network's own file has in 8 bits, in place."""
    if not any(name.endswith("_int8") for name in network.state_dict()):
        return
    nodes, kept = [], []
    for value in model.graph.initializer:
        found = None
        if value.data_type == onnx.TensorProto.FLOAT and len(value.dims) > 1 and np.prod(value.dims) >= _LEAST:
            found = integers(numpy_helper.to_array(value))
        if found is None:
            kept.append(value)
            continue
        names = [f"{value.name}_{part}" for part in ("int8", "scale", "float")]
        kept += [numpy_helper.from_array(part, name) for part, name in zip(found, names, strict=False)]
        nodes += [
            helper.make_node("Cast", names[:1], names[2:], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [names[2], names[1]], [value.name]),
        ]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    others = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *others])


def integers(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(Q int8, t float32 that broadcasts to the weight) of a weight that is Q t to the bit, whatever axes an exporter exchanged; None of any other.

    t has 16 bits, as `compress.int8` makes it.
    """
    axes = range(weight.ndim)
    for several in itertools.chain.from_iterable(itertools.combinations(axes, count) for count in range(1, weight.ndim)):
        largest = np.abs(weight).max(tuple(axis for axis in axes if axis not in several), keepdims=True)
        if 2 * largest.size > weight.size:
            continue
        fraction, exponent = np.frexp(largest / np.float32(127))
        scale = np.ldexp(np.ceil(fraction * 2**16) / 2**16, exponent).astype(np.float32).clip(np.finfo(np.float32).tiny)
        q = np.rint(weight / scale)
        if np.array_equal(q * scale, weight):
            return q.astype(np.int8), scale
    return None
