"""onnxruntime's LinearAttention (domain com.microsoft) as a peer: a model of that one node, on tokens as our ops take them.

    linear       S_t = S_{t-1} + k_t v_t^T
    gated        S_t = exp(g_t) S_{t-1} + k_t v_t^T
    delta        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
    gated_delta  S' = exp(g_t) S_{t-1};  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T

with o_t = scale q_t^T S_t. Its decay g is one for each head or one for each key. It has no backward.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

NAME, WITH_PYTORCH = "onnxruntime", "onnxruntime, the rest in PyTorch"
_INPUTS = ("query", "key", "value", "past_state", "decay", "beta")
_CHECKED = 256  # tokens whose outputs are compared


@cache
def installed() -> bool:
    """Whether onnx and onnxruntime are here, and the latter has the op."""
    try:
        _session("linear", 1, 1.0, ("query", "key", "value"), 1)
    except Exception:  # of an import, or one of onnxruntime's own kinds, which differ by version
        return False
    return True


def linear_attention(
    rule: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, beta: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """q, k (b, l, h, dk), v (b, l, h, dv), g (b, l, h) or (b, l, h, dk), beta (b, l, h), all float32 -> (b, l, h, dv).

    It runs on as many threads as PyTorch does, and writes into memory that PyTorch allocates, as our ops do: nothing is copied.
    """
    tensors = {name: t.contiguous() for name, t in zip(_INPUTS, (q, k, v, None, g, beta), strict=True) if t is not None}
    session = _session(rule, q.shape[2], q.shape[3] ** -0.5 if scale is None else scale, tuple(tensors), torch.get_num_threads())
    out, binding = torch.empty(v.shape), session.io_binding()
    for name, t in tensors.items():
        binding.bind_input(name, "cpu", 0, "float32", [*t.shape[:2], t[0, 0].numel()], t.data_ptr())
    binding.bind_output("output", "cpu", 0, "float32", [*v.shape[:2], v[0, 0].numel()], out.data_ptr())
    binding.bind_output("present_state", "cpu")
    session.run_with_iobinding(binding)
    return out


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """`ops.ssd` with softplus as its gated rule; what is before and behind the recurrence is PyTorch's."""
    step, heads = softplus(dt + dt_bias), x.shape[2]
    q, k = (t.expand(-1, -1, heads, -1) for t in (C, B))
    y = linear_attention("gated", q, k, x * step[..., None], step * A, scale=1.0)
    return (y + D[:, None] * x) * silu(z)


def check(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], tensors: dict[str, Tensor]) -> None:
    """Compare both on the first tokens: tensors of three dimensions and more have them as their second.

    Raises:
        ValueError: the outputs differ by more than 1e-3 of the largest: what computes something else is no peer.
    """
    first = {name: t[:, :_CHECKED].detach() if t.dim() > 2 else t.detach() for name, t in tensors.items()}
    want, got = ours(**first), theirs(**first)
    error = float((got - want).abs().max() / want.abs().max())
    if not error <= 1e-3:
        raise ValueError(f"a peer of onnxruntime: expected our output to 1e-3, got a difference of {error:.2g} of the largest")


@cache
def _session(rule: str, heads: int, scale: float, inputs: tuple[str, ...], threads: int) -> Any:
    import onnxruntime
    from onnx import TensorProto, helper

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its idle threads would take a core from the other sides
    options.log_severity_level = 3

    names = [name if name in inputs else "" for name in _INPUTS[: 1 + _INPUTS.index(inputs[-1])]]
    node = helper.make_node(
        "LinearAttention",
        names,
        ["output", "present_state"],
        domain="com.microsoft",
        update_rule=rule,
        q_num_heads=heads,
        kv_num_heads=heads,
        scale=scale,
    )
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*inputs, *node.output)}
    graph = helper.make_graph([node], "peer", [values[name] for name in inputs], [values[name] for name in node.output])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    with _unbound():
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _unbound() -> Iterator[None]:
    """In this block all cores are allowed: the threads that a session starts would else share the one core that this thread may be bound to."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)
