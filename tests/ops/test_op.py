"""What every op has from its declaration: checks and their memory, the way to a kernel, operators, transforms, orders."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import medssm
from medssm import ops, orders
from medssm.kernels.selective_scan import native
from medssm.ops import modes, op, walk
from medssm.ops.op import OPS
from tests.ops.calls import DEVICE, flat
from tests.ops.cases import example

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="of the same code on every device")
every = pytest.mark.parametrize("name", OPS)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scan_arguments(length=7):
    """u, delta, A, B, C of a selective scan."""
    return draw(2, length, 4), draw(2, length, 4, seed=1).abs(), -draw(4, 3, seed=2).abs(), draw(2, length, 3, seed=3), draw(2, length, 3, seed=4)


# -- checks ---------------------------------------------------------------------------------------------------------------------------


def test_what_passed_lets_nothing_else_pass():
    x, weight, state = draw(2, 6, 4), draw(4, 3), draw(2, 4, 2)
    image = x.unflatten(1, (2, 3))
    ops.causal_conv1d(x, weight)
    ops.causal_conv1d(x, weight, initial_state=state)
    ops.causal_conv1d(image, weight, order=orders.raster())
    for tensors, message in (
        ((x.long(), weight), "x: expected float32, float64, bfloat16 or float16, got int64"),
        ((x, weight.int()), "weight: expected float32, float64, bfloat16 or float16, got int32"),
        ((x, weight.to("meta")), "weight: expected device cpu, where x is, got meta"),
        ((image, weight), r"x: expected \(b, l, d\), got \(2, 2, 3, 4\)"),
        ((x, weight, state), r"bias: expected \(4,\), got \(2, 4, 2\)"),
        ((x[..., :3], weight), r"weight: expected \(3, w\), got \(4, 3\)"),
    ):
        for _ in range(2):  # what failed is no more remembered than what never came
            with pytest.raises(ValueError, match=message):
                ops.causal_conv1d(*tensors)


def test_so_many_passed_calls_are_remembered_and_no_more(monkeypatch):
    conv = OPS["causal_conv1d"]
    monkeypatch.setattr(op, "_REMEMBERED", 3)
    monkeypatch.setattr(conv, "_passed", {})
    for length in range(1, 9):
        tensors = (torch.zeros(2, length, 4), torch.zeros(4, 3), None, None)
        found = conv.check(tensors)
        assert found["*l"] == (length,) and conv.check(tensors) is found
        assert len(conv._passed) <= 3


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are checked while tracing, and only then
def test_nothing_is_remembered_of_a_trace(monkeypatch):
    conv, x, weight = OPS["causal_conv1d"], torch.zeros(2, 6, 4), torch.zeros(4, 3)
    monkeypatch.setattr(conv, "_passed", {})
    with FakeTensorMode() as mode:
        ops.causal_conv1d(mode.from_tensor(x), mode.from_tensor(weight))
    torch.jit.trace(lambda x: ops.causal_conv1d(x, weight), x, check_trace=False)
    assert not conv._passed
    ops.causal_conv1d(x, weight)
    assert conv._passed


def test_the_argument_that_does_not_fit_is_named():
    w, k = torch.zeros(6), torch.zeros(2, 3, 5)
    u, delta, A, B, C = (t.unsqueeze(2) if t.dim() == 3 else t.unsqueeze(0) for t in scan_arguments())
    conv = torch.zeros(4, 3)
    for call, message in (
        (lambda: ops.bi_wkv(w, w, k, k), r"w: expected \(5,\), got \(6,\)"),
        (lambda: ops.selective_scan_nd(u[..., :3], delta, A, B, C, orders=[orders.raster()]), r"x: expected \(2, 7, 4\) or \(2, 7, 1, 4\), got"),
        (lambda: ops.selective_scan_nd(u, delta[..., :3], A, B, C, orders=[orders.raster()]), r"delta: expected \(2, 7, 1, 4\), got \(2, 7, 1, 3\)"),
        (lambda: ops.causal_conv1d_step(torch.zeros(2, 4, 2), torch.zeros(2, 1, 4), conv), r"x: expected \(b, d\), got \(2, 1, 4\)"),
        (lambda: ops.ssd_step(*[torch.zeros(2, 4)] * 6), r"x: expected \(b, h, p\), got \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    for call in (lambda: ops.causal_conv1d(None, conv, layout="bdl"), lambda: ops.causal_conv1d_step(torch.zeros(2, 4, 2), None, conv)):
        with pytest.raises(TypeError, match=r"^x: expected a tensor, got None"):
            call()


def test_a_scale_of_zero_is_no_missing_scale():
    q = draw(2, 5, 3, 4)
    assert not ops.gated_linear_attention(q, q, q, -q[..., 0].abs(), scale=0.0).any()


# -- the way to a kernel --------------------------------------------------------------------------------------------------------------


@every
def test_explain_computes_nothing(name, monkeypatch):
    call = example(name)
    for part in ("reference", "forward", "operators"):
        monkeypatch.setattr(OPS[name], part, lambda *_, **__: pytest.fail("it computed"))
    for backend in ("native", "reference"):
        assert medssm.explain(name, **call.arguments(), **call.options, backend=backend)["chosen"] == backend
    if name == "selective_scan":
        monkeypatch.setattr(native, "forward_usual", lambda *_: pytest.fail("it computed"))
        assert medssm.explain(name, *scan_arguments())["chosen"] == "native"


def test_a_kernel_is_asked_for_what_the_call_needs(monkeypatch):
    """save: what backward reads; final: the state."""
    scan, asked, call = OPS["selective_scan"], [], example("selective_scan")
    forward = scan.forward

    def spy(*args, save=False, final=True):
        asked.append((save, final))
        return forward(*args, save=save, final=final)

    monkeypatch.setattr(scan, "forward", spy)
    call.run("native", return_final_state=False)
    call.run("native")
    with FlopCounterMode(display=False):
        call.run("native")
    out, _ = call.leaves().run("native")
    out.sum().backward()  # asks for no second forward
    with torch.no_grad():
        call.leaves().run("native")
    call.leaves().run("native", return_final_state=False)
    assert asked == [(False, False), (False, True), (False, True), (True, True), (False, True), (True, False)]


@pytest.mark.parametrize("way", ["eager", "forward"])
@pytest.mark.parametrize("name", [name for name, declared in OPS.items() if declared.saved])
def test_backward_computes_what_forward_did_not_keep(name, way, monkeypatch):
    operators, seen = OPS[name].operators, []
    eager, real = operators.eager, getattr(operators, way)
    monkeypatch.setattr(operators, "eager", lambda *args: seen.append(args) or eager(*args))
    example(name).leaves().run("native")
    *rest, save, backend, final = seen[0]
    assert save is True
    given = [t for t in rest if isinstance(t, torch.Tensor) and t.requires_grad]
    kept, lost = (real(*rest, saves, backend, *([final] if way == "eager" else [])) for saves in (True, False))
    assert kept[-1].numel() and lost[-1].shape == (0,)
    want, got = (torch.autograd.grad(outputs[0].square().sum(), given, retain_graph=True) for outputs in (kept, lost))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)) and want[0].any()


@pytest.mark.parametrize("name", OPS)
def test_a_call_without_the_dispatcher_has_the_operators_gradients(name, monkeypatch):
    operators, asked = OPS[name].operators, []
    eager, operator = operators.eager, operators.forward
    monkeypatch.setattr(operators, "eager", lambda *args: asked.append("eager") or eager(*args))
    monkeypatch.setattr(operators, "forward", lambda *args: asked.append("operator") or operator(*args))
    got = example(name).results("native")
    with FlopCounterMode(display=False) as counter:
        want = example(name).results("native")
    assert asked == ["eager", "operator"] and counter.get_total_flops() > 0
    assert all(torch.equal(got[key], want[key]) for key in want)
    call = example(name).leaves()
    outputs = flat(call.run("native"))
    first = torch.autograd.grad(outputs, list(call.tensors.values()), outputs, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives need backend='reference'"):
        sum(g.square().sum() for g in first).backward()


@pytest.mark.parametrize("around", [contextlib.nullcontext, lambda: FlopCounterMode(display=False)], ids=["eager", "operator"])
@pytest.mark.parametrize("name", [name for name, declared in OPS.items() if declared.states])
def test_an_output_without_a_gradient_counts_as_one_with_zeros(name, around):
    call = example(name).leaves()
    leaves = list(call.tensors.values())
    with around():
        outputs = flat(call.run("native"))
        ones, zeros = [torch.ones_like(t) for t in outputs], [torch.zeros_like(t) for t in outputs]
        for used in (slice(1), slice(1, None)):
            got = torch.autograd.grad(outputs[used], leaves, ones[used], retain_graph=True)
            given = [ones[i] if i in range(len(ones))[used] else zeros[i] for i in range(len(ones))]
            want = torch.autograd.grad(outputs, leaves, given, retain_graph=True)
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)) and any(g.any() for g in got)


def test_outputs_with_a_gradient_may_be_changed_in_place():
    x = draw(1, 4, 3, 8).requires_grad_()
    (got,) = torch.autograd.grad(ops.causal_conv1d(x, torch.ones(8, 4), order=orders.raster()).mul_(2).sum(), x)
    (want,) = torch.autograd.grad(ops.causal_conv1d(x, torch.ones(8, 4), order=orders.raster()).sum(), x)
    assert torch.equal(got, 2 * want)


def test_which_calls_go_straight_to_a_kernel():
    x, leaf, subclass = torch.zeros(2), torch.zeros(2, requires_grad=True), torch.zeros(2).as_subclass(type("Own", (torch.Tensor,), {}))
    assert modes.direct([x, None]) and not modes.direct([x, subclass]) and not modes.direct([x, leaf])
    assert not modes.needs_grad([x, None]) and modes.needs_grad([None, leaf])
    with torch.no_grad():
        assert modes.direct([leaf, torch.nn.Parameter(x)]) and not modes.needs_grad([leaf])


def test_a_subclass_of_tensor_stays_one():
    Own = type("Own", (torch.Tensor,), {})
    u, *rest = scan_arguments()
    assert type(ops.selective_scan(u.as_subclass(Own), *rest)) is Own
    assert type(ops.causal_conv1d(u.as_subclass(Own), draw(4, 3))) is Own


# -- transforms -----------------------------------------------------------------------------------------------------------------------


def test_a_dual_tensor_keeps_its_tangent():
    u, *rest = scan_arguments()
    tangent = draw(*u.shape, seed=9)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(u, tangent)
        found = forward_ad.unpack_dual(ops.selective_scan(dual, *rest)).tangent
        with pytest.raises(ValueError, match=r"forward-mode derivatives \(jvp\) need backend='reference'"):
            ops.selective_scan(dual, *rest, backend="native")
    torch.testing.assert_close(found, ops.selective_scan(tangent, *rest))  # linear in u


@pytest.mark.parametrize("inner", [torch.vmap, lambda f: f])
def test_a_gradient_of_torch_func_is_found_at_any_depth(inner):
    u, *rest = scan_arguments()

    def loss(backend):
        return lambda x: inner(lambda t: ops.selective_scan(t, *rest, backend=backend).square().sum())(x).sum()

    batch = torch.stack([u, 2 * u]) if inner is torch.vmap else u
    with pytest.raises(ValueError, match=r"torch\.func\.grad needs backend='reference'"):
        torch.func.grad(loss("native"))(batch)
    torch.testing.assert_close(torch.func.grad(loss(None))(batch), torch.func.grad(loss("reference"))(batch))


def test_vmap_over_any_dimension_states_and_empty_sequences():
    x, weight = draw(3, 2, 6, 4), draw(4, 3)
    for dim in (1, 2, -2):
        got = torch.vmap(lambda t: ops.causal_conv1d(t, weight, return_final_state=True, backend="native"), in_dims=dim)(x.movedim(0, dim))
        for i in range(3):
            torch.testing.assert_close([t[i] for t in got], list(ops.causal_conv1d(x[i], weight, return_final_state=True, backend="native")))
    assert torch.vmap(lambda t: ops.causal_conv1d(t, weight, backend="native"))(x[:, :, :0]).shape == (3, 2, 0, 4)


def test_an_operator_refuses_a_mapped_order():
    x, weight, index = draw(2, 6, 4), draw(4, 3), torch.stack([torch.arange(6)] * 2)
    with pytest.raises(ValueError, match="order: vmap over weights is not supported"):
        torch.vmap(lambda p: OPS["causal_conv1d"].operators.forward(x, weight, None, None, p, "", False, None, None, "native"))(index)


@every
@pytest.mark.parametrize("second", [torch.bfloat16, torch.float64])
def test_a_meta_tensor_has_the_types_of_a_call(name, second):
    """The call in bfloat16, its second tensor in a type of its own."""
    call, described = example(name).to(torch.bfloat16), []
    other = list(call.tensors)[1]
    call = call.but(**{other: call.tensors[other].to(second)})
    for device in ("cpu", "meta"):
        tensors = {key: t.detach().to(device).requires_grad_() for key, t in call.tensors.items()}
        outputs = flat(call.but(**tensors).run(None))
        gradients = torch.autograd.grad(outputs, list(tensors.values()), [torch.ones_like(o) for o in outputs])
        described.append([(t.shape, t.dtype) for t in (*outputs, *gradients)])
    assert described[0] == described[1]


def test_operations_of_an_image_are_those_of_all_its_tokens():
    u, delta, A, B, C = (t.unflatten(1, (2, 3)) if t.dim() == 3 else t for t in scan_arguments(6))
    with FlopCounterMode(display=False) as counter:
        ops.selective_scan(u, delta, A, B, C, order=orders.snake(), backend="native")
    assert counter.get_total_flops() == 2 * 6 * 4 * (6 * 3 + 4)
    with FlopCounterMode(display=False) as counter:
        ops.depthwise_conv(u, torch.zeros(4, 3, 5), backend="native")
    assert counter.get_total_flops() == 2 * 2 * 6 * 4 * 15


# -- orders ---------------------------------------------------------------------------------------------------------------------------


def test_the_reverse_of_a_reversed_raster_is_a_raster():
    x, weight = draw(2, 6, 4), draw(4, 3)
    backward, plain = orders.raster(reverse=True), ops.causal_conv1d(x, weight)
    torch.testing.assert_close(ops.causal_conv1d(x, weight, order=backward, reverse=True), plain)
    torch.testing.assert_close(ops.causal_conv1d(x.flip(1), weight, order=backward).flip(1), plain)


def test_the_tables_of_an_order_are_those_of_the_device():
    for device in ("meta", "cpu"):
        assert walk.resolve("snake()", (3, 5), None, False, None, torch.device(device)).index.device.type == device


def test_the_order_of_a_call_on_meta_tensors_is_checked():
    x, weight = torch.zeros(2, 2, 3, 4, device="meta"), torch.zeros(4, 3, device="meta")
    with pytest.raises(ValueError, match=r"order: raster\(axes=\(0, 1, 2\)\) walks 3 spatial axes, got spatial shape \(2, 3\)"):
        ops.causal_conv1d(x, weight, order=orders.raster((0, 1, 2)))


def test_a_tensor_as_an_order_is_int64_and_of_any_strides():
    x, weight, p = draw(2, 6, 4), draw(4, 3), torch.tensor([3, 0, 5, 1, 4, 2])
    want = ops.causal_conv1d(x, weight, order=p, backend="reference")
    strided = torch.stack([p, torch.zeros_like(p)], 1)[:, 0]
    compiled = torch.compile(lambda x, p: ops.causal_conv1d(x, weight, order=p, backend="native"), fullgraph=True, backend="eager")
    for order in (p, strided):
        torch.testing.assert_close(ops.causal_conv1d(x, weight, order=order, backend="native"), want)
        torch.testing.assert_close(compiled(x, order), want)
    for order, got in ((p.int(), r"int32 \(6,\)"), (p[:, None], r"int64 \(6, 1\)"), (p[:5], r"int64 \(5,\)")):
        with pytest.raises(ValueError, match=rf"order: expected an int64 tensor \(6,\), got {got}"):
            ops.causal_conv1d(x, weight, order=order)
    with pytest.raises(ValueError, match=r"x: expected \(b, l, d\), got \(2, 2, 3, 4\)"):
        ops.causal_conv1d(x.unflatten(1, (2, 3)), weight, order=p)
    with pytest.raises(ValueError, match="order: expected device cpu, where x is, got meta"):
        ops.causal_conv1d(x, weight, order=p.to("meta"))
    for order in (p - 1, p + 1, p.clamp(1)):
        with pytest.raises(ValueError, match=r"order: expected a permutation of 0\.\.5"):
            ops.causal_conv1d(x, weight, order=order)


def test_many_orders_are_orders():
    u, delta, A, B, C = scan_arguments()
    tensors = (u, *(t.unsqueeze(2).expand(2, 7, 2, -1) for t in (delta,)), A.expand(2, 4, 3), *(t.unsqueeze(2).expand(2, 7, 2, 3) for t in (B, C)))
    for second, kind in ((torch.arange(7), "Tensor"), (None, "NoneType"), ("raster()", "str")):
        with pytest.raises(TypeError, match=rf"orders\[1\]: expected an Order, got {kind}"):
            ops.selective_scan_nd(*tensors, orders=[orders.raster(), second])
