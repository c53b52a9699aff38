"""The contract of DESIGN: what every op does, on every backend of this machine."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import medssm
from medssm import ops
from medssm.ops.op import OPS as DECLARED
from tests.ops.calls import DEVICE, Call, compare, flat, initial, permutation
from tests.ops.cases import CASES, LAYOUTS, OPS, SEQUENCE, available, calls, example, flattened, step_options, tokens, weight

PAIRS = available()
KERNELS = [(op, backend) for op, backend in PAIRS if backend != "reference"]
every = pytest.mark.parametrize("op, backend", PAIRS)
exact = pytest.mark.parametrize("op, backend", [pair for pair in PAIRS if pair[1] != "triton"])  # it has no float64
every_sequence = pytest.mark.parametrize("op, backend", [pair for pair in PAIRS if pair[0] in SEQUENCE])
every_kernel = pytest.mark.parametrize("op, backend", KERNELS)


@pytest.mark.parametrize("op", OPS)
def test_triton_refuses_float64(op):
    if (op, "triton") not in PAIRS:
        pytest.skip("Triton does not serve it here")
    call = example(op).to(torch.float64)
    with pytest.raises(ValueError, match="serves float32, bfloat16, float16 on"):
        call.run("triton")
    assert medssm.explain(op, **call.tensors, **call.options)["chosen"] != "triton"


@exact
@given(data=st.data())
def test_float64_equals_the_reference_to_rounding(op, backend, data):
    call = data.draw(calls(op))
    compare(call.results(backend), call.results("reference"), 1e-10, 1e-9)


@every
@given(data=st.data())
def test_float32_equals_the_float64_reference(op, backend, data):
    call = data.draw(calls(op)).to(torch.float32)
    got, want = call.results(backend), call.to(torch.float64).results("reference")
    own = call.results("reference")  # what float32 itself costs in this very case
    for name, w in want.items():
        if w.numel():
            scale = w.abs().max().clamp_min(0.1)
            rounding = float(((own[name].double() - w).abs() / scale).max())
            floor = 1e-5 if name.startswith("gradient") else 1e-6
            compare({name: got[name]}, {name: w}, 2 * rounding + floor, 2 * rounding + floor)


@every
@given(data=st.data())
def test_half_storage_computes_in_float32(op, backend, data):
    """Rounded inputs, float32 arithmetic, one rounding at the end: within an ulp of the storage type."""
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    call = data.draw(calls(op)).to(dtype)
    got, want = call.results(backend), call.to(torch.float64).results("reference")
    ulp = torch.finfo(dtype).eps
    assert next(iter(got.values())).dtype is dtype
    compare(got, want, ulp + 1e-5, 2 * ulp + 1e-4)


@every
@given(data=st.data())
def test_mixed_types_are_accepted_and_gradients_have_their_inputs_dtype(op, backend, data):
    call = data.draw(calls(op))
    kinds = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    mixed = Call(op, {k: t.to(data.draw(kinds)) for k, t in call.tensors.items()}, call.options)
    got = mixed.results(backend)
    typed = mixed.tensors.get("v", next(iter(mixed.tensors.values())))  # an attention's output has its values' dtype
    assert got["output 0"].dtype is typed.dtype
    for name, t in mixed.tensors.items():
        assert got[f"gradient of {name}"].dtype is t.dtype
    compare(got, mixed.to(torch.float64).results("reference"), 1e-2, 2e-2)


@exact
@settings(max_examples=8)
@given(data=st.data())
def test_gradcheck(op, backend, data):
    call = data.draw(calls(op, small=True)).leaves()
    names = list(call.tensors)
    if not next(iter(call.tensors.values())).numel():
        return
    torch.autograd.gradcheck(
        lambda *ts: flat(Call(op, dict(zip(names, ts, strict=True)), call.options).run(backend)),
        tuple(call.tensors.values()),
        fast_mode=True,
        atol=1e-7,
        rtol=1e-4,
    )


@settings(max_examples=6)
@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_reference_is_differentiable_twice(op, data):
    call = data.draw(calls(op, small=True)).leaves()
    names = list(call.tensors)
    if not next(iter(call.tensors.values())).numel():
        return
    torch.autograd.gradgradcheck(
        lambda *ts: flat(Call(op, dict(zip(names, ts, strict=True)), call.options).run("reference")),
        tuple(call.tensors.values()),
        fast_mode=True,
        atol=1e-6,
        rtol=1e-3,
    )


@every_kernel
def test_second_derivatives_of_a_kernel_raise(op, backend):
    call = example(op).leaves()
    first = next(iter(call.tensors.values()))
    (gradient,) = torch.autograd.grad(output(call.run(backend)).square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives need backend='reference'"):
        gradient.sum().backward()


@every_sequence
@given(data=st.data())
def test_split_with_state_equals_whole(op, backend, data):
    call = flattened(data.draw(calls(op)).to(torch.float32).with_options(order=None, return_final_state=True))
    length = next(iter(call.tensors.values())).shape[1]
    cut = data.draw(st.integers(0, length))
    whole, state = call.run(backend)
    parts = [slice(0, cut), slice(cut, length)]
    if call.options["reverse"]:
        parts.reverse()
    outs, carried = {}, {}
    for part in parts:
        piece = call.but(**{k: t[:, part] for k, t in tokens(call).items()}, **carried)
        outs[part.start, part.stop], last = piece.run(backend)
        carried = initial(last)
    joined = torch.cat([outs[s] for s in sorted(outs)], 1)
    compare({"output": joined, **carried}, {"output": whole, **initial(state)}, 1e-5, 1e-5)


@every_sequence
@given(data=st.data())
def test_reverse_equals_flipped(op, backend, data):
    call = flattened(data.draw(calls(op)).to(torch.float32).with_options(order=None, return_final_state=True))
    out, state = call.run(backend, reverse=True)
    expected, final = call.but(**{k: t.flip(1) for k, t in tokens(call).items()}).run(backend, reverse=False)
    compare({"output": out.flip(1), **initial(state)}, {"output": expected, **initial(final)}, 1e-6, 1e-6)


@every_sequence
@given(data=st.data())
def test_an_order_equals_gather_scan_scatter(op, backend, data):
    call = flattened(data.draw(calls(op)).to(torch.float32).with_options(return_final_state=True, reverse=False))
    length = next(iter(call.tensors.values())).shape[1]
    p = permutation(length, length)
    expected, final = call.but(**{k: t[:, p] for k, t in tokens(call).items()}).run(backend, order=None)
    out, state = call.run(backend, order=p)
    compare({"output": out[:, p], **initial(state)}, {"output": expected, **initial(final)}, 1e-6, 1e-6)


@every
@given(data=st.data())
def test_linear_in_its_input(op, backend, data):
    call = data.draw(calls(op)).to(torch.float32)
    if "activation" in call.options:
        call = call.with_options(activation=None)
    for absent in [name for name in call.tensors if name == "bias" or name.startswith("initial_state")]:
        call.tensors.pop(absent)
    name = next(iter(call.tensors))
    a = call.tensors[name]
    b = torch.randn(a.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    together, one, two = (output(call.but(**{name: t}).run(backend)) for t in (2 * a - 3 * b, a, b))
    if together.numel():
        scale = (2 * one.abs() + 3 * two.abs()).max().clamp_min(1e-3)
        assert float((together - (2 * one - 3 * two)).abs().max() / scale) < 1e-5


@every_kernel
@given(data=st.data())
def test_same_bits_twice_and_for_any_number_of_threads(op, backend, data):
    call = data.draw(calls(op)).to(torch.float32)
    first = None
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        got = call.results(backend)
        first = first or got
        assert all(torch.equal(got[k], first[k]) for k in got), threads


@every_kernel
@given(data=st.data())
def test_any_strides_and_nothing_written_outside(op, backend, data):
    """Every tensor as a strided view of a larger buffer of NaN: the results are the same and the buffer is as it was."""
    call = data.draw(calls(op)).to(torch.float32)
    want = call.results(backend)
    buffers, views = {}, {}
    for name, t in call.tensors.items():
        dims = list(data.draw(st.permutations(range(t.dim()))))
        step = data.draw(st.integers(1, 2))
        big = torch.full([n * step + 2 for n in (t.shape[d] for d in dims)], math.nan, device=DEVICE)
        view = big[tuple(slice(1, 1 + n * step, step) for n in (t.shape[d] for d in dims))].permute([dims.index(i) for i in range(t.dim())])
        view.copy_(t)
        buffers[name], views[name] = big, view
    before = {k: b.clone() for k, b in buffers.items()}
    strided = Call(op, views, call.options)
    out = output(strided.run(backend))
    leaves = {k: v.requires_grad_() if v.is_leaf else v for k, v in ((k, v.detach()) for k, v in views.items())}
    assert torch.equal(out, want["output 0"])
    outs = flat(Call(op, leaves, call.options).run(backend))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).bfloat16().to(o) for o in outs]
    grads = torch.autograd.grad(outs, list(leaves.values()), cotangents, allow_unused=True)
    for (k, t), g in zip(leaves.items(), grads, strict=True):
        assert torch.equal(torch.zeros_like(t) if g is None else g, want[f"gradient of {k}"]), k
    for k, b in buffers.items():
        assert torch.equal(b.isnan(), before[k].isnan()) and torch.equal(b.nan_to_num(), before[k].nan_to_num()), k


@pytest.mark.parametrize("op, backend", [pair for pair in PAIRS if pair[0] in LAYOUTS])
@given(data=st.data())
def test_bdl_layout_equals_bld(op, backend, data):
    call = data.draw(calls(op)).to(torch.float32).with_options(return_final_state=True)
    moved, first = {}, next(iter(call.tensors.values()))
    for name, t in tokens(call).items():
        grouped = name in ("B", "C") and t.dim() == first.dim() + 1
        moved[name] = t.movedim((-2, -1), (1, 2)) if grouped else t.movedim(-1, 1)
    out, state = call.run(backend)
    got, final = call.but(**moved).run(backend, layout="bdl")
    assert torch.equal(got.movedim(1, -1), out) and torch.equal(final, state)


@every_sequence
@given(data=st.data())
def test_steps_equal_the_scan(op, backend, data):
    call = flattened(data.draw(calls(op, small=True)).to(torch.float32).with_options(order=None, reverse=False, return_final_state=True))
    whole, final = call.run(backend)
    assume(0 < whole.shape[1] <= 9)
    arguments = call.arguments()
    state = arguments.pop("initial_state", tuple(map(torch.zeros_like, final)) if isinstance(final, tuple) else torch.zeros_like(final))
    options = {k: v for k, v in call.options.items() if k in step_options(op)}
    outs = []
    for t in range(whole.shape[1]):
        token = {k: v[:, t] if k in tokens(call) else v for k, v in arguments.items()}
        out, state = getattr(ops, f"{op}_step")(state, **token, **options, backend=backend)
        outs.append(out)
    compare({"output": torch.stack(outs, 1), **initial(state)}, {"output": whole, **initial(final)}, 1e-5, 1e-5)


@every_sequence
@given(data=st.data())
def test_state_is_never_an_alias_and_empty_sequences_return_it(op, backend, data):
    call = data.draw(calls(op)).to(torch.float32).with_options(return_final_state=True)
    out, final = call.run(backend)
    for name, state in initial(final).items():
        before = call.tensors.get(name)
        if before is not None and state.numel():
            assert state.data_ptr() != before.data_ptr()
        if not out.numel() and state.numel() and out.shape[-1]:
            assert torch.equal(state, torch.zeros_like(state) if before is None else before)


@every
@pytest.mark.parametrize("causal", [False, True])
def test_no_tokens_have_gradients(op, backend, causal):
    """Zeros, and an initial state's is the final state's."""
    call = example(op).with_options(**getattr(CASES[op], "SEQUENCE", {}) if causal else {})
    call = call.but(**{name: t[:, :0] for name, t in tokens(call).items()}).leaves()
    outputs = flat(call.run(backend))
    cotangents = [torch.randn_like(o) for o in outputs]
    gradients = dict(zip(call.tensors, torch.autograd.grad(outputs, list(call.tensors.values()), cotangents), strict=True))
    states = iter(cotangents[1:])
    for name, t in call.tensors.items():
        assert torch.equal(gradients[name], next(states) if name.startswith("initial_state") else torch.zeros_like(t)), name


# -- PyTorch ----------------------------------------------------------------------------------------------------------------------


def output(result):
    return result[0] if isinstance(result, tuple) else result


class Module(torch.nn.Module):
    """An op as a module of its first argument, its other tensors as parameters."""

    def __init__(self, call: Call, backend: str):
        super().__init__()
        self.name, *rest = call.tensors
        self.weights = torch.nn.ParameterDict({k: torch.nn.Parameter(call.tensors[k]) for k in rest})
        self.call, self.backend = Call(call.op, {}, call.options), backend

    def forward(self, x):
        return output(Call(self.call.op, {self.name: x, **dict(self.weights.items())}, self.call.options).run(self.backend))


@pytest.fixture
def fresh_compiler():
    """Without what earlier tests compiled: a function may be compiled eight times only."""
    torch._dynamo.reset()


@every_kernel
def test_opcheck(op, backend, monkeypatch):
    """torch.library's own check of schema, fake kernel, autograd registration and compiled use, on the operator as it is called."""
    call = example(op).leaves()
    operators, seen = DECLARED[op].operators, []
    eager = operators.eager
    monkeypatch.setattr(operators, "eager", lambda *args: seen.append(args) or eager(*args))
    output(call.run(backend))
    assert seen, "the call asked for no gradient"
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(operators.forward, seen[0][:-1])


@every_kernel
def test_compile_fullgraph_with_gradients(op, backend, fresh_compiler):
    call = example(op)
    module = Module(call, backend)
    x = next(iter(call.tensors.values())).clone().requires_grad_()
    want = module(x)
    wanted = torch.autograd.grad(want.square().sum(), [x, *module.parameters()])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got.square().sum(), [x, *module.parameters()]), wanted, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("op, backend", KERNELS[:2])  # what is tested is the same of every op
def test_compile_sees_the_context_manager(op, backend, fresh_compiler):
    call = example(op)

    def run(x):
        with medssm.use_backend(backend, strict=True):
            return output(call.but(**{next(iter(call.tensors)): x}).run(None))

    x = next(iter(call.tensors.values()))
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


@every_kernel
def test_export_keeps_one_operator(op, backend):
    call = example(op)
    module = Module(call, backend).eval()
    x = next(iter(call.tensors.values()))
    with torch.no_grad():
        program = torch.export.export(module, (x,))
    assert any(f"medssm.{op}_forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), module(x))


@every
def test_autocast_never_reaches_the_recurrence(op, backend):
    call = example(op)
    want = output(call.run(backend))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = output(call.run(backend))
    assert got.dtype is torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize("op", OPS)
def test_a_meta_tensor_costs_no_loop(op):
    """Shapes and dtypes of the outputs and gradients, of lengths that nothing could compute."""
    call, described = example(op), []
    for device in (DEVICE, "meta"):
        tensors = {name: t.detach().to(device).requires_grad_() for name, t in call.tensors.items()}
        outputs = flat(call.but(**tensors).run(None))
        gradients = torch.autograd.grad(outputs, list(tensors.values()), [torch.ones_like(o) for o in outputs])
        assert all(t.device.type == device for t in (*outputs, *gradients))
        described.append([(t.shape, t.dtype) for t in (*outputs, *gradients)])
    assert described[0] == described[1]


def test_a_meta_scan_never_runs_the_recurrence(monkeypatch):
    for op in ("selective_scan", "selective_scan_nd"):
        monkeypatch.setattr(DECLARED[op], "reference", lambda **_: pytest.fail("the reference ran"))
    u, A = torch.empty(1, 10**7, 8, device="meta"), torch.empty(8, 16, device="meta")
    B = torch.empty(1, 10**7, 16, device="meta")
    assert medssm.ops.selective_scan(u, u, A, B, B).shape == u.shape
    assert medssm.ops.selective_scan_nd(u, u.unsqueeze(2), A[None], B.unsqueeze(2), B.unsqueeze(2), orders=[medssm.orders.raster()]).shape == u.shape


@every
def test_metatensor(op, backend):
    MetaTensor = pytest.importorskip("monai.data").MetaTensor
    call = example(op)
    name = next(iter(call.tensors))
    wrapped = call.but(**{name: MetaTensor(call.tensors[name])})
    got = output(wrapped.run(backend))
    assert torch.equal(torch.as_tensor(got), output(call.run(backend)))
    leaf = MetaTensor(call.tensors[name]).requires_grad_()
    (gradient,) = torch.autograd.grad(output(call.but(**{name: leaf}).run(backend)).sum(), leaf)
    assert torch.isfinite(gradient).all()


@every_kernel
def test_vmap_folds_tokens_and_refuses_weights(op, backend):
    call = example(op)
    name = next(iter(call.tensors))
    batched = torch.stack([call.tensors[name], 2 * call.tensors[name], -call.tensors[name]])
    got = torch.vmap(lambda t: output(call.but(**{name: t}).run(backend)))(batched)
    for i in range(3):
        torch.testing.assert_close(got[i], output(call.but(**{name: batched[i]}).run(backend)))
    shared = weight(op)
    if shared is None:
        return
    with pytest.raises(ValueError, match=f"{shared}: vmap over weights"):
        torch.vmap(lambda t: output(call.but(**{shared: t}).run(backend)))(torch.stack([call.tensors[shared]] * 2))


@every_kernel
def test_func_transforms_need_the_reference(op, backend):
    call = example(op)
    name = next(iter(call.tensors))

    def loss(t, chosen):
        return output(call.but(**{name: t}).run(chosen)).square().sum()

    x = call.tensors[name]
    for transform in (lambda f: torch.func.grad(f)(x), lambda f: torch.func.jvp(f, (x,), (torch.ones_like(x),))):
        with pytest.raises(ValueError, match=r"need.* backend='reference'"):
            transform(lambda t: loss(t, backend))
        transform(lambda t: loss(t, "reference"))
    torch.testing.assert_close(torch.func.grad(lambda t: loss(t, None))(x), torch.func.grad(lambda t: loss(t, "reference"))(x))


@every
def test_complex_and_integers_are_refused(op, backend):
    call = example(op)
    name = next(iter(call.tensors))
    for dtype in (torch.complex64, torch.int32):
        with pytest.raises(ValueError, match=f"{name}: expected float32"):
            call.but(**{name: call.tensors[name].to(dtype)}).run(backend)


@every
def test_a_wrong_shape_names_the_argument(op, backend):
    call = example(op)
    for name, t in call.tensors.items():
        if name in ("x", "u"):
            continue
        with pytest.raises(ValueError, match=r"\w+: expected .*got"):
            call.but(**{name: torch.cat([t, t], -1) if t.dim() else t}).run(backend)
    first = next(iter(call.tensors))
    with pytest.raises(ValueError, match=f"{first}: expected|expected"):
        call.but(**{first: call.tensors[first][0]}).run(backend)


@every
def test_a_wrong_device_names_the_argument(op, backend):
    call = example(op)
    name = list(call.tensors)[1]
    with pytest.raises(ValueError, match=f"{name}: expected device {DEVICE}"):
        call.but(**{name: call.tensors[name].to("meta")}).run(backend)


@every
def test_what_is_no_tensor_raises(op, backend):
    call = example(op)
    name = list(call.tensors)[1]
    with pytest.raises(TypeError, match=f"{name}: expected a tensor, got list"):
        call.but(**{name: [1.0]}).run(backend)


@every_sequence
def test_an_order_that_is_no_permutation_raises(op, backend):
    call = example(op)
    with pytest.raises(ValueError, match="order: expected a permutation"):
        call.run(backend, order=torch.zeros(13, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="order: expected an int64"):
        call.run(backend, order=torch.arange(5, device=DEVICE))
    with pytest.raises(TypeError, match="order: expected an Order"):
        call.run(backend, order="raster")


@every
def test_more_than_two_to_the_31_elements_are_addressed(op, backend):
    """Offsets are 64-bit: a strided view whose last token lies beyond 2**31 elements (a sparse buffer, never touched in between)."""
    case, stride = CASES[op], (2**31 + 4096) // 2
    generator = torch.Generator().manual_seed(0)

    def n(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    small = n(*getattr(case, "FAR", (1, 3, 4)))
    sparse = torch.UntypedStorage(4 * (2 * stride + 8), device=DEVICE)
    big = torch.empty(0, device=DEVICE).set_(sparse, 0, small.shape, (0, stride, *small.stride()[2:]))
    big.copy_(small)
    rest, options = case.far(n)
    name = next(iter(example(op).tensors))
    got, want = (Call(op, {name: t, **rest}, options).run(backend) for t in (big, small))
    assert torch.equal(got, want)
