"""onnxruntime runs every op by the custom-operator library as medssm does, for calls that the contract suite draws."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import medssm
from medssm.kernels import native
from medssm.ops.op import OPS
from tests.ops.calls import Call, any_order, flat
from tests.ops.cases import calls

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
pytestmark = pytest.mark.skipif(not native.path().with_name(f"libmedssm_onnx{native.SUFFIX}").is_file(), reason="the library was not built")


def run(name, tensors, attributes, threads=1):
    """One node of the domain medssm in a session of its own; None is an input that is left out."""
    from medssm.export import custom_ops
    from medssm.export.program import DOMAIN, VERSION

    given = {f"in{i}": t.float().contiguous().numpy() for i, t in enumerate(tensors) if t is not None}
    inputs = ["" if t is None else f"in{i}" for i, t in enumerate(tensors)]
    values = [onnx.helper.make_tensor_value_info(key, onnx.TensorProto.FLOAT, [None] * t.ndim) for key, t in given.items()]
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    node = onnx.helper.make_node(name, inputs, ["out"], domain=DOMAIN, **attributes)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "one", values, [out]), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("medssm.threads", str(threads))
    options.register_custom_ops_library(str(custom_ops()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, given)[0]


def of_one_rank(call):
    """A call of ssd3 with what its node takes: one rank, adjacent pairs, no states."""
    tensors = {name: t for name, t in call.tensors.items() if not name.startswith(("mimo", "initial"))}
    for name in ("B", "C"):
        if tensors[name].dim() > tensors["x"].dim():
            tensors[name] = tensors[name][..., :1, :, :]
    for name in {"B_bias", "C_bias"} & {*tensors}:
        if tensors[name].dim() > 2:
            tensors[name] = tensors[name][:, :1]
    return Call("ssd3", tensors, call.options | {"pairs": "adjacent"})


def as_node(call):
    """The tensors and attributes of the node that an exported call becomes."""
    from medssm.export.program import Replacing, described

    op, seen = OPS[call.op], []

    def keep(*args):
        seen.append(args)
        return op.operators.forward(*args)

    with Replacing({op.operators.forward: keep}):
        call.run("native")
    return described(op, seen[0])


@pytest.mark.parametrize("name", sorted(OPS))
@given(data=st.data())
def test_an_op_in_onnxruntime_equals_medssm(name, data):
    call = data.draw(calls(name)).to(torch.float32)
    if name == "ssd3":
        call = of_one_rank(call)
    assume(not isinstance(call.options.get("order"), torch.Tensor) and call.options.get("cu_seqlens") is None)
    want = flat(call.run("native"))[0]
    assume(want.numel())
    if call.options.get("layout") == "bdl":
        want = want.movedim(1, -1)
    got = run(name, *as_node(call), threads=data.draw(st.integers(1, 3)))
    assert got.shape == tuple(want.shape)
    np.testing.assert_array_equal(got, want.numpy())


def test_what_ssd3_has_no_node_for_is_one_line():
    from medssm.errors import UserError

    x, per_head, rows = torch.ones(1, 5, 2, 3), torch.ones(1, 5, 2), torch.ones(1, 5, 1, 1, 4)
    tensors = {"x": x, "dt": per_head, "A": -per_head, "B": rows, "C": rows, "trap": per_head, "angles": torch.ones(1, 5, 2)}
    assert as_node(Call("ssd3", tensors, {"order": None}))[1]["pairs"] == "adjacent"
    several = rows.expand(1, 5, 2, 1, 4)
    for changed, options in (({"B": several, "C": several}, {}), ({"mimo_x": torch.ones(2, 1, 3)}, {}), ({}, {"pairs": "halves"})):
        with pytest.raises(UserError, match="ssd3 has no export with several ranks"):
            as_node(Call("ssd3", tensors | changed, {"order": None, **options}))


@given(data=st.data(), shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
def test_orders_in_onnxruntime_are_those_of_medssm(data, shape):
    """A convolution of width 2 that takes the token before shows each step's predecessor, and where the walk begins anew."""
    order = data.draw(any_order(len(shape)))
    x = torch.arange(1.0, 1 + np.prod(shape)).reshape(1, *shape, 1)
    weight = torch.tensor([[1.0, 0.0]])
    want = medssm.ops.causal_conv1d(x, weight, order=order, backend="reference")
    np.testing.assert_array_equal(run("causal_conv1d", [x, weight], {"order": order.spec}), want.numpy())


def test_an_order_that_the_library_does_not_know_is_an_error():
    with pytest.raises(Exception, match="medssm: order: this library does not know spiral"):
        run("causal_conv1d", [torch.ones(1, 3, 3, 1), torch.ones(1, 2)], {"order": "spiral(axes=(0, 1))"})


def test_a_missing_library_is_one_line(monkeypatch, tmp_path):
    from medssm.errors import UserError
    from medssm.export import custom_ops

    monkeypatch.setenv("MEDSSM_CPU_LIBRARY", str(tmp_path / "libmedssm_cpu.so"))
    with pytest.raises(UserError, match=r"the library of custom operators for onnxruntime is not there \(.*libmedssm_onnx"):
        custom_ops()


def test_the_library_needs_no_torch(tmp_path):
    """In a process with onnxruntime alone."""
    from medssm.export import custom_ops

    code = (
        "import sys, onnxruntime; options = onnxruntime.SessionOptions();"
        f"options.register_custom_ops_library({str(custom_ops())!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr
