"""Every op has every part: adding one is a file on each floor and a line in medssm/ops/__init__.py, and nothing may be missing."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import medssm
from medssm import nn, ops, orders
from medssm.ops.op import OPS
from tests.ops.cases import example, step_options

ROOT = Path(__file__).resolve().parent.parent.parent
every = pytest.mark.parametrize("name", OPS)


def test_the_public_functions_are_the_declared_ops_and_their_steps():
    public = {name for name in vars(ops) if inspect.isfunction(getattr(ops, name))}
    assert public == {name for op in OPS for name in (op, f"{op}_step") if hasattr(importlib.import_module(f"medssm.ops.{op}"), name)}
    assert set(OPS) == {path.stem for path in (ROOT / "medssm" / "ops").glob("*.py")} - {
        "__init__",
        "cut",
        "modes",
        "op",
        "registration",
        "shapes",
        "walk",
    }


@every
def test_it_has_a_reference_and_a_module_for_each_backend_that_it_names(name):
    op, folder = OPS[name], ROOT / "kernels" / OPS[name].folder
    assert (folder / "reference.py").is_file() and inspect.getmodule(op.reference).__name__.endswith(f"{op.folder}.reference")
    for backend, why in medssm.backends()[name].items():
        named = why == "ok" or "in this release" not in why
        assert (folder / f"{backend}.py").is_file() == named, backend


@every
def test_its_reference_takes_every_tensor_and_option_by_name(name):
    op = OPS[name]
    taken = set(inspect.signature(op.reference).parameters)
    assert {*op.names, *op.options} <= taken
    assert {"one": {"index", "starts", "reverse"}, "many": {"walks"}, "none": set()}[op.walk] <= taken


@every
def test_its_signature_is_typed_and_its_docstring_says_formula_arguments_errors_and_source(name):
    for function in filter(None, (getattr(ops, name), getattr(ops, f"{name}_step", None))):
        signature = inspect.signature(function)
        assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
        assert signature.return_annotation is not inspect.Signature.empty
    text = inspect.getdoc(getattr(ops, name))
    assert "=" in text.split("Args:")[0] and "Raises:" in text
    for parameter in inspect.signature(getattr(ops, name)).parameters:
        assert parameter in text, f"{parameter} is not in the docstring"


@every
def test_its_example_uses_every_tensor_and_runs(name):
    call = example(name)
    given = {tensor.partition("_0")[0].partition("_1")[0] for tensor in call.tensors}
    assert {shown.public for shown in OPS[name].inputs if shown.public != "rotary"} <= given
    result = call.run(None)
    assert all(torch.isfinite(t).all() for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor))


@every
def test_a_step_function_takes_the_options_of_the_whole(name):
    if hasattr(ops, f"{name}_step"):
        walk = {"order", "reverse", "cu_seqlens", "return_final_state", "initial_state", "layout", "backend", "causal"}
        whole = set(inspect.signature(getattr(ops, name)).parameters) - walk
        assert whole <= step_options(name)


@every
def test_the_contract_suite_the_benchmark_and_the_docs_know_it(name):
    assert importlib.util.find_spec(f"tests.ops.cases.{name}") is not None
    rows = "".join(path.read_text() for path in (ROOT / "medssm" / "bench").glob("*.py"))
    assert re.search(rf"\bops\.{name}\b", rows), "no row of the benchmark"
    assert name in (ROOT / "docs" / "reference" / "ops.md").read_text()
    assert any(name in page.read_text() for page in (ROOT / "docs" / "how").glob("*.md"))


@every
def test_a_missing_tensor_is_named(name):
    """Of a call with everything, and of one with the required tensors alone, which may take a shorter way."""
    call, required = example(name), [given.name for given in OPS[name].inputs if not given.optional]
    options = {key: value for key, value in call.options.items() if key == "orders"}
    alone = {key: call.tensors[key] for key in required}
    if "delta" in alone:  # the example's is low-rank
        alone["delta"] = alone["delta"][..., :1].expand(*alone["delta"].shape[:-1], 6)
    getattr(ops, name)(**alone, **options)
    for arguments in ({**call.arguments(), **call.options}, {**alone, **options}):
        for missing in required:
            with pytest.raises(TypeError, match=f"^{missing}: expected a tensor, got None"):
                getattr(ops, name)(**{**arguments, missing: None})


@every
def test_operations_are_counted_forward_and_twice_that_backward(name):
    call = example(name).leaves()
    with FlopCounterMode(display=False) as forward:
        result = call.run("native")
    out = result[0] if isinstance(result, tuple) else result
    with FlopCounterMode(display=False) as both:
        result = call.run("native")
        out = result[0] if isinstance(result, tuple) else result
        out.sum().backward()
    assert forward.get_total_flops() > out.numel()
    assert both.get_total_flops() == 3 * forward.get_total_flops()


def test_the_count_of_a_selective_scan_is_that_of_its_recurrence():
    u, A, B = torch.rand(2, 7, 5), -torch.rand(5, 3), torch.rand(2, 7, 3)
    with FlopCounterMode(display=False) as counter:
        ops.selective_scan(u, u, A, B, B, backend="native")
    assert counter.get_total_flops() == 2 * 7 * 5 * (6 * 3 + 4)


def test_the_projection_of_the_steps_inside_a_scan_is_counted_as_the_linear_layer_that_it_replaces():
    u, A, B, low, project = torch.rand(2, 7, 5), -torch.rand(5, 3), torch.rand(2, 7, 3), torch.rand(2, 7, 4), torch.rand(5, 4)
    with FlopCounterMode(display=False) as fused:
        ops.selective_scan(u, low, A, B, B, delta_proj=project, backend="native")
    with FlopCounterMode(display=False) as apart:
        ops.selective_scan(u, torch.nn.functional.linear(low, project), A, B, B, backend="native")
    assert fused.get_total_flops() == apart.get_total_flops()
    nd = {"A": A[None], "B": B[:, :, None], "C": B[:, :, None], "orders": [orders.raster()], "backend": "native"}
    with FlopCounterMode(display=False) as of_orders:
        ops.selective_scan_nd(u, low[:, :, None], delta_proj=project[None], **nd)
    assert of_orders.get_total_flops() == fused.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_is_counted_once(device):
    """Projections, the convolution and the scan of Mamba, each by its own formula."""
    with torch.device(device), FlopCounterMode(display=False) as counter, torch.no_grad():
        nn.Mamba(8, d_state=4)(torch.zeros(2, 9, 8))
    tokens, d, n, rank, taps = 2 * 9, 16, 4, 1, 4
    linear = 2 * tokens * (8 * 2 * d + d * (rank + 2 * n) + d * 8)
    assert counter.get_total_flops() == linear + 2 * tokens * d * taps + tokens * d * (6 * n + 4 + 2 * rank)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are checked while tracing, and only then
@every
def test_a_trace_equals_eager_at_another_size(name):
    """torch.jit.trace keeps one operator that takes any size."""
    calls = []
    for tokens in (13, 31):
        generator = torch.Generator().manual_seed(0)
        call = OPS[name].example(lambda *shape, generator=generator: torch.randn(shape, generator=generator), tokens, 6)
        call.pop("initial_state", None)
        calls.append(call)
    tensors = [key for key, value in calls[0].items() if isinstance(value, torch.Tensor)]
    rest = {key: value for key, value in calls[0].items() if key not in tensors}
    traced = torch.jit.trace(
        lambda *args: getattr(ops, name)(**dict(zip(tensors, args, strict=True)), **rest), tuple(calls[0][key] for key in tensors), check_trace=False
    )
    for call in calls:
        torch.testing.assert_close(traced(*(call[key] for key in tensors)), getattr(ops, name)(**call))
