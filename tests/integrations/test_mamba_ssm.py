"""The stand-in for mamba_ssm: upstream's imports, signatures, layouts and gradients, and when it steps back."""

import importlib
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import medssm.nn
from medssm.integrations import mamba_ssm as stand_in
from tests.integrations.compare import draw, gradients, same


def scan_inputs(b=2, d=6, n=3, l=7, groups=2, dtype=torch.float64):
    """u, delta, A, B, C, D, z, delta_bias as mamba_ssm takes them."""
    A = -torch.rand(d, n, dtype=torch.float64 if dtype == torch.float64 else torch.float32) - 0.1
    wide = A.dtype
    return (
        draw(b, d, l, dtype=dtype),
        draw(b, d, l, dtype=dtype),
        A.requires_grad_(),
        draw(b, groups, n, l, dtype=dtype),
        draw(b, groups, n, l, dtype=dtype),
        draw(d, dtype=wide),
        draw(b, d, l, dtype=dtype),
        draw(d, dtype=wide),
    )


def recurrence(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The formula, token by token: (out, last state)."""
    heads = [t.shape[1] if t.dim() == 4 else 1 for t in (B, C)]
    B, C = (
        t[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[-1])
        if t.dim() == 2
        else t.reshape(t.shape[0], g, *t.shape[-2:]).repeat_interleave(u.shape[1] // g, 1)
        for t, g in zip((B, C), heads, strict=True)
    )
    steps = delta if delta_bias is None else delta + delta_bias[:, None]
    steps = F.softplus(steps) if delta_softplus else steps
    h, ys = torch.zeros_like(u[:, :, :1] * A), []
    for t in range(u.shape[-1]):
        h = torch.exp(steps[:, :, t, None] * A) * h + (steps * u)[:, :, t, None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, -1) + (0 if D is None else D[:, None] * u)
    return (y if z is None else y * F.silu(z)), h


# -- the scan ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["groups", "one group", "constant B", "constant C", "constant both", "mixed"])
@pytest.mark.parametrize("options", [{}, {"D": 1, "delta_bias": 1, "delta_softplus": True}, {"D": 1, "z": 1, "delta_softplus": True}])
def test_selective_scan_fn_is_the_recurrence(installed, form, options):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

    u, delta, A, B, C, D, z, bias = scan_inputs()
    constant = draw(6, 3)
    B, C = {
        "groups": (B, C),
        "one group": (B[:, 0], C[:, 0]),
        "constant B": (constant, C),
        "constant C": (B, constant),
        "constant both": (constant, constant),
        "mixed": (B, C[:, 0]),
    }[form]
    given = {k: v for k, v in (("D", D), ("z", z), ("delta_bias", bias)) if k in options}
    given["delta_softplus"] = options.get("delta_softplus", False)
    if not given["delta_softplus"]:
        delta = delta.detach().abs().requires_grad_()
    inputs = [u, delta, A, B, C, *[t for t in given.values() if isinstance(t, torch.Tensor)]]
    want, want_state = recurrence(u, delta, A, B, C, **given)
    for function in (selective_scan_fn, selective_scan_ref):
        out, state = function(u, delta, A, B, C, return_last_state=True, **given)
        assert out.is_contiguous()
        same([out, state], [want, want_state])
        same(gradients(out, inputs), gradients(want, inputs))
        same(gradients(state, inputs[:4]), gradients(want_state, inputs[:4]))
        same([function(u, delta, A, B, C, **given)], [want])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_and_gradients_have_upstreams_dtypes(installed, dtype):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    inputs = scan_inputs(dtype=dtype)
    out, state = selective_scan_fn(*inputs, delta_softplus=True, return_last_state=True)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    assert [g.dtype for g in gradients(out, inputs)] == [t.dtype for t in inputs]


# -- the compiled modules ---------------------------------------------------------------------------------------------------------


class KernelScan(torch.autograd.Function):
    """An autograd function around a compiled module, as VMamba and mamba_ssm write them."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, kind):
        ctx.kind, ctx.kernel = kind, importlib.import_module(f"selective_scan_cuda{kind}")
        if kind == "":
            out, x, *rest = ctx.kernel.fwd(u, delta, A, B, C, D, z, delta_bias, True)
        else:
            out, x, *rest = ctx.kernel.fwd(u, delta, A, B, C, D, delta_bias, True, 1, *([True] if kind == "_oflex" else []))
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, x, out)
        return rest[0] if rest else out

    @staticmethod
    def backward(ctx, dout):
        u, delta, A, B, C, D, z, bias, x, out = ctx.saved_tensors
        if ctx.kind == "":
            found = ctx.kernel.bwd(u, delta, A, B, C, D, z, bias, dout, x, out, None, True, False)
        else:
            found = ctx.kernel.bwd(u, delta, A, B, C, D, bias, dout, x, True, 1)
        du, ddelta, dA, dB, dC, dD, dbias, *dz = found
        return du, ddelta, dA, dB, dC, dD, dz[0] if dz else None, dbias, None


@pytest.mark.parametrize("kind", ["", "_core", "_oflex"])
@pytest.mark.parametrize("optional", [True, False])
def test_a_function_around_the_kernel_has_the_ops_gradients(installed, kind, optional):
    from mamba_ssm import selective_scan_fn

    u, delta, A, B, C, D, z, bias = scan_inputs()
    D, z, bias = (D, z if kind == "" else None, bias) if optional else (None, None, None)
    out, want = KernelScan.apply(u, delta, A, B, C, D, z, bias, kind), selective_scan_fn(u, delta, A, B, C, D, z, bias, True)
    same([out], [want])
    same(gradients(out, (u, delta, A, B, C, D, z, bias)), gradients(want, (u, delta, A, B, C, D, z, bias)))


def test_kernels_keep_the_last_state_every_2048_tokens(installed):
    import selective_scan_cuda

    u, delta, A, B, C, D, z, bias = (t.detach() for t in scan_inputs(b=1, d=2, l=2500, groups=1))
    out, x, out_z = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True)
    want, state = recurrence(u, delta, A, B, C, D, None, bias, True)
    decay = torch.exp(F.softplus(delta + bias[:, None])[..., :2048].sum(-1, keepdim=True) * A)
    assert x.shape == (1, 2, 2, 6)
    same([out, x[:, :, -1, 1::2], x[:, :, 0, ::2], out_z], [want, state, decay, want * F.silu(z)])


def test_backward_writes_dz_and_recomputes_the_gated_output(installed):
    import selective_scan_cuda

    inputs = [t.detach() for t in scan_inputs()]
    u, z, both = inputs[0], inputs[6], torch.empty(2, 12, 7, dtype=torch.float64)
    out, x, out_z = selective_scan_cuda.fwd(*inputs, True)
    found = selective_scan_cuda.bwd(*inputs, torch.ones_like(u), x, out, both[:, 6:], True, True)
    assert len(found) == 9
    same([both[:, 6:], found[8]], [out * torch.autograd.functional.vjp(F.silu, z, torch.ones_like(z))[1], out_z])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oflex_shares_steps_and_returns_float32(installed, dtype):
    import selective_scan_cuda_oflex as oflex
    from mamba_ssm import selective_scan_fn

    u, delta, A, B, C, D, _, bias = (t.detach() for t in scan_inputs(dtype=dtype))
    delta, bias = delta[:, :2], bias[:2]
    inputs = [t.requires_grad_() for t in (u, delta.float(), A, B, C, D, bias)]
    want = selective_scan_fn(u.float(), inputs[1].repeat_interleave(3, 1), A, B, C, D, None, bias.repeat_interleave(3), True)
    out, x = oflex.fwd(u, delta, A, B, C, D, bias, True, 1, True)
    assert out.dtype is torch.float32 and oflex.fwd(u, delta, A, B, C, D, bias, True, 1, False)[0].dtype is dtype
    same([out], [want], 1e-5)
    found = oflex.bwd(u, delta, A, B, C, D, bias, torch.ones_like(out), x, True, 1)
    for got, expected, source in zip(found, torch.autograd.grad(want.sum(), inputs), (u, delta, A, B, C, D, bias), strict=True):
        assert got.dtype is source.dtype and got.shape == source.shape
        torch.testing.assert_close(got.float(), expected.float(), rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-4)


def test_ndstate_is_the_core_with_one_state(installed):
    import selective_scan_cuda_core as core
    import selective_scan_cuda_ndstate as ndstate

    u, delta, A, B, C, D, _, bias = (t.detach() for t in scan_inputs(n=1))
    (out, x), flat = core.fwd(u, delta, A, B, C, D, bias, True), (A[:, 0], B[:, :, 0], C[:, :, 0])
    same([ndstate.fwd(u, delta, *flat, D, bias, True, 1)[0]], [out])
    found, want = ndstate.bwd(u, delta, *flat, D, bias, out, x, True, 1), core.bwd(u, delta, A, B, C, D, bias, out, x, True, 1)
    assert [found[i].shape for i in (2, 3, 4)] == [t.shape for t in flat]
    same([g.flatten() for g in found], [g.flatten() for g in want])


def test_causal_conv1d_cuda_serves_every_versions_call(installed):
    import causal_conv1d_cuda as kernel

    x, weight, bias, dout = (t.detach() for t in (draw(2, 6, 7), draw(6, 4), draw(6), draw(2, 6, 7)))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    want = F.silu(F.conv1d(leaves[0], leaves[1][:, None], leaves[2], padding=3, groups=6)[..., :7])
    expected = torch.autograd.grad(want, leaves, dout)
    same([kernel.causal_conv1d_fwd(x, weight, bias, *rest) for rest in ((True,), (None, True), (None, None, None, True))], [want] * 3)
    for rest in ((None, True), (None, None, True)):
        same(kernel.causal_conv1d_bwd(x, weight, bias, dout, *rest), expected)
    dx = torch.empty_like(x)
    *found, dinitial = kernel.causal_conv1d_bwd(x, weight, bias, dout, None, None, None, dx, False, True)
    same(found, expected)
    assert found[0] is dx and dinitial is None
    out, written = torch.empty_like(x), [torch.empty_like(t) for t in (x, weight, bias)]
    assert kernel.causal_conv1d_fwd(x, weight, bias, None, None, out, None, True) is out
    assert kernel.causal_conv1d_bwd(x, weight, bias, dout, None, None, None, *written, None, True) is None
    same([out, *written], [want, *expected])
    states = [torch.zeros(2, 6, 4, dtype=torch.float64) for _ in range(2)]
    kernel.causal_conv1d_update(x, states[0], weight, bias, out, True, None, None)
    same([out, kernel.causal_conv1d_update(x, states[1], weight, bias, True), states[0]], [want, want, states[1]])
    with pytest.raises(TypeError, match="got 3 arguments"):
        kernel.causal_conv1d_fwd(x, weight, bias, None, None, True)


def test_the_convolutions_functions_under_its_interface(installed):
    from causal_conv1d.cpp_functions import LIBRARY_NAME, causal_conv1d_bwd_function, causal_conv1d_fwd_function, causal_conv1d_update_function

    x, weight, bias, before, dout, dstates = (
        draw(2, 6, 7),
        draw(6, 4),
        draw(6),
        draw(2, 6, 3),
        torch.randn(2, 6, 7).double(),
        torch.randn(2, 6, 3).double(),
    )
    want = F.silu(F.conv1d(torch.cat([before, x], -1), weight[:, None], bias, groups=6))
    final = torch.empty(2, 6, 3, dtype=torch.float64)
    out = causal_conv1d_fwd_function(x, weight, bias, None, before, final, True)
    same([out, final], [want, x[..., -3:]])
    assert not out.requires_grad and LIBRARY_NAME == "DaoAILab"
    found = causal_conv1d_bwd_function(x, weight, bias, dout, None, before, dstates, None, True, True)
    same(found, torch.autograd.grad((want, x[..., -3:]), (x, weight, bias, before), (dout, dstates)))
    state = before.detach().clone()
    same([causal_conv1d_update_function(x, state, weight, bias, True, None, None), state], [want, x[..., -3:]])


# -- causal_conv1d ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_causal_conv1d_fn(installed, activation):
    from causal_conv1d import causal_conv1d_fn

    x, weight, bias, before = draw(2, 6, 7), draw(6, 4), draw(6), draw(2, 6, 3)
    want = F.conv1d(torch.cat([before, x], -1), weight[:, None], bias, groups=6)
    want = want if activation is None else F.silu(want)
    written = torch.empty(2, 6, 3, dtype=torch.float64)
    out, states = causal_conv1d_fn(x, weight, bias, initial_states=before, return_final_states=True, final_states_out=written, activation=activation)
    assert states is written and out.is_contiguous()
    same([out, states], [want, x[..., -3:]])
    same(gradients(out, (x, weight, bias, before)), gradients(want, (x, weight, bias, before)))
    same([causal_conv1d_fn(x, weight, bias, activation)], [causal_conv1d_fn(x, weight, bias, activation=activation)])


def test_causal_conv1d_update_continues_a_sequence(installed):
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    x, weight, bias = draw(2, 6, 9), draw(6, 4), draw(6)
    want, state = causal_conv1d_fn(x, weight, bias, activation="silu"), torch.zeros(2, 6, 4, dtype=torch.float64)
    parts = [causal_conv1d_update(x[..., :5], state, weight, bias, "silu")]
    parts += [causal_conv1d_update(x[..., t], state, weight, bias, "silu")[..., None] for t in range(5, 9)]
    same([torch.cat(parts, -1), state], [want, x[..., -4:]])
    with pytest.raises(ValueError, match="conv_state: expected"):
        causal_conv1d_update(x[..., 0], state[..., :2], weight)


# -- the mixer --------------------------------------------------------------------------------------------------------------------


WEIGHTS = {"none": ("",), "v2": ("", "_b"), "v3": ("", "_b", "_s")}


@pytest.mark.parametrize("kind", ["none", "v1", "v2", "v3"])
def test_mamba_has_upstreams_weights_and_computes_upstreams_sum(installed, kind):
    """Against the forks' own composition: flips, slices and mamba_inner_fn_no_out_proj."""
    from mamba_ssm import Mamba
    from mamba_ssm.ops.selective_scan_interface import bimamba_inner_fn, mamba_inner_fn_no_out_proj

    m = Mamba(d_model=12, d_state=4, d_conv=4, expand=2, bimamba_type=kind, nslices=4, if_divide_out=kind == "v2")
    suffixes = WEIGHTS.get(kind, ("",))
    names = {f"A{s}_log" for s in suffixes} | {f"D{s}" for s in suffixes} | {"in_proj.weight", "out_proj.weight"}
    names |= {f"{part}{s}.weight" for s in suffixes for part in ("conv1d", "x_proj", "dt_proj")}
    names |= {f"{part}{s}.bias" for s in suffixes for part in ("conv1d", "dt_proj")} | ({"A_b_log"} if kind == "v1" else set())
    assert set(m.state_dict()) == names
    assert m.A_log._no_weight_decay and m.D._no_weight_decay and m.dt_proj.bias._no_reinit and m.d_inner == 24

    x = draw(2, 20, 12, dtype=torch.float32)
    xz = m.in_proj(x).movedim(-1, 1)

    def branch(xz, s):
        return mamba_inner_fn_no_out_proj(
            xz,
            getattr(m, f"conv1d{s}").weight,
            getattr(m, f"conv1d{s}").bias,
            getattr(m, f"x_proj{s}").weight,
            getattr(m, f"dt_proj{s}").weight,
            -torch.exp(getattr(m, f"A{s}_log")),
            None,
            None,
            getattr(m, f"D{s}"),
            delta_bias=getattr(m, f"dt_proj{s}").bias,
            delta_softplus=True,
        )

    if kind == "v1":
        want = bimamba_inner_fn(
            xz,
            m.conv1d.weight,
            m.conv1d.bias,
            m.x_proj.weight,
            m.dt_proj.weight,
            m.out_proj.weight,
            None,
            -torch.exp(m.A_log),
            -torch.exp(m.A_b_log),
            D=m.D,
            delta_bias=m.dt_proj.bias,
        )
    else:
        y = branch(xz, "")
        if "_b" in suffixes:
            y = y + branch(xz.flip(-1), "_b").flip(-1)
        if "_s" in suffixes:
            sliced = branch(torch.stack(xz.chunk(4, dim=-1), -1).flatten(-2), "_s")
            y = y + sliced.unflatten(-1, (5, 4)).transpose(-1, -2).flatten(-2)
        want = F.linear((y / 2 if kind == "v2" else y).movedim(1, -1), m.out_proj.weight)
    same([m(x)], [want], 1e-5)
    same(gradients(m(x), (x, *m.parameters())), gradients(want, (x, *m.parameters())), 1e-4)


def test_mamba_inner_fn_is_the_mixer_and_takes_given_B_and_C(installed):
    from mamba_ssm import Mamba, mamba_inner_fn, selective_scan_fn

    m = Mamba(12, d_state=4, bias=True)
    assert isinstance(m, medssm.nn.Mamba)
    x = draw(2, 9, 12, dtype=torch.float32)
    xz, A = m.in_proj(x).movedim(-1, 1), -torch.exp(m.A_log)
    rest = (m.dt_proj.weight, m.out_proj.weight, m.out_proj.bias, A)
    same([mamba_inner_fn(xz, m.conv1d.weight, m.conv1d.bias, m.x_proj.weight, *rest, D=m.D, delta_bias=m.dt_proj.bias)], [m(x)], 1e-5)

    B, C = draw(24, 4, dtype=torch.float32), draw(2, 4, 9, dtype=torch.float32)
    u, z = xz.chunk(2, 1)
    u = F.silu(m.conv1d(u)[..., :9])
    delta = torch.einsum("rd,bdl->brl", m.dt_proj.weight @ m.x_proj.weight[:1], u)
    want = F.linear(selective_scan_fn(u, delta, A, B, C, m.D, z, m.dt_proj.bias, True).movedim(1, -1), m.out_proj.weight, m.out_proj.bias)
    out = mamba_inner_fn(xz, m.conv1d.weight, m.conv1d.bias, m.x_proj.weight[:1], *rest, B, C, m.D, m.dt_proj.bias)
    same([out], [want], 1e-5)


@pytest.mark.parametrize("normed", ["b", "c", "dt"])
def test_mamba_inner_fn_norms_what_a_weight_is_given_for(installed, normed):
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

    xz, conv, conv_bias, x_proj, dt_proj, out_proj = draw(2, 24, 9), draw(12, 1, 4), draw(12), draw(10, 12), draw(12, 2), draw(6, 12)
    A, D, bias, weight = -torch.rand(12, 4).double(), draw(12), draw(12), draw(12 if normed == "dt" else 4)

    def norm(t):
        return t / (t.square().mean(1, keepdim=True) + 1e-3).sqrt() * weight[:, None]

    u, z = xz.chunk(2, 1)
    u = F.silu(F.conv1d(u, conv, conv_bias, padding=3, groups=12)[..., :9])
    low, B, C = (x_proj @ u).split([2, 4, 4], 1)
    delta = dt_proj @ low
    B, C, delta = norm(B) if normed == "b" else B, norm(C) if normed == "c" else C, norm(delta) if normed == "dt" else delta
    want = F.linear(selective_scan_fn(u, delta, A, B, C, D, z, bias, True).movedim(1, -1), out_proj)
    given = {f"{normed}_rms_weight": weight, "b_c_dt_rms_eps": 1e-3, "D": D, "delta_bias": bias}
    out = mamba_inner_fn(xz, conv, conv_bias, x_proj, dt_proj, out_proj, None, A, **given)
    same([out], [want])
    leaves = (xz, conv, x_proj, dt_proj, out_proj, weight)
    same(gradients(out, leaves), gradients(want, leaves))


def test_a_medical_block_runs_unmodified_under_autocast(installed):
    """The layer that U-Mamba, LightM-UNet and their kin wrap around Mamba."""

    class MambaLayer(nn.Module):
        def __init__(self, dim):
            from mamba_ssm import Mamba

            super().__init__()
            self.norm, self.mamba = nn.LayerNorm(dim), Mamba(d_model=dim, d_state=16, d_conv=4, expand=2)

        def forward(self, x):
            tokens = x.flatten(2).transpose(-1, -2)
            return self.mamba(self.norm(tokens)).transpose(-1, -2).view(x.shape)

    layer, x = MambaLayer(8), torch.randn(2, 8, 4, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype is torch.bfloat16 and all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(out.float(), layer(x), rtol=0.1, atol=0.05)


def test_token_by_token_equals_the_sequence(installed):
    from mamba_ssm import Mamba

    m, x = Mamba(12, d_state=4, layer_idx=3), torch.randn(2, 9, 12)
    want = m(x)
    states = m.allocate_inference_cache(2, 9)
    same([torch.cat([m.step(x[:, t : t + 1], *states)[0] for t in range(9)], 1)], [want], 1e-5)
    cache = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    parts = [m(x[:, :2], inference_params=cache)]
    cache.seqlen_offset = 2
    parts += [m(x[:, t : t + 1], inference_params=cache) for t in range(2, 9)]
    same([torch.cat(parts, 1)], [want], 1e-5)
    with pytest.raises(ValueError, match="bimamba_type: expected 'none'"):
        Mamba(12, bimamba_type="v2").allocate_inference_cache(2, 9)


def test_heads_of_selective_state_update_are_neighbouring_channels(installed):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    b, h, p, n, g = 2, 4, 3, 5, 2
    state, x, dt, z, D, bias = (torch.randn(*s) for s in ((b, h, p, n), (b, h, p), (b, h, p), (b, h, p), (h, p), (h, p)))
    A, B, C = -torch.rand(h, p, n), torch.randn(b, g, n), torch.randn(b, g, n)
    step = F.softplus(dt + bias)[..., None]
    B_, C_ = (t.repeat_interleave(h // g, 1)[:, :, None] for t in (B, C))
    want_state = state * torch.exp(step * A) + step * B_ * x[..., None]
    out = selective_state_update(state, x, dt, A, B, C, D, z, bias, dt_softplus=True)
    same([out, state], [((want_state * C_).sum(-1) + D * x) * F.silu(z), want_state], 1e-5)


def test_mamba_honours_device_dtype_and_layer_scale(installed):
    from mamba_ssm.modules.mamba_simple import Mamba

    m = Mamba(12, dtype=torch.bfloat16, init_layer_scale=0.5)
    assert {str(t.dtype) for n, t in m.named_parameters() if "." in n} == {"torch.bfloat16"}
    assert m.A_log.dtype is torch.float32 and m.D.dtype is torch.float32 and not hasattr(m.gamma, "_no_weight_decay")
    x = torch.randn(1, 5, 12, dtype=torch.bfloat16)
    out = m(x)
    with torch.no_grad():
        m.gamma.mul_(2)
    same([m(x)], [2 * out])
    assert Mamba(12, device="meta").in_proj.weight.is_meta
    with pytest.raises(ValueError, match="bimamba_type: expected 'none', 'v1', 'v2', 'v3', got 'v4'"):
        Mamba(12, bimamba_type="v4")


def test_a_pickled_model_needs_only_upstreams_attributes(installed):
    from mamba_ssm import Mamba

    m, x = Mamba(12, bimamba_type="v3", nslices=2), torch.randn(1, 8, 12)
    for attribute in ("if_divide_out", "init_layer_scale"):  # SegMamba's version has none of these
        del m.__dict__[attribute]
    same([pickle.loads(pickle.dumps(m))(x)], [m(x)])


# -- norms and blocks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("module", ["layer_norm", "layernorm"])
def test_norms_add_the_residual_first(installed, rms, module):
    upstream = importlib.import_module(f"mamba_ssm.ops.triton.{module}")
    function = upstream.rms_norm_fn if rms else upstream.layer_norm_fn
    x, residual, weight, bias = draw(2, 5, 8), draw(2, 5, 8), draw(8), draw(8)
    total = x + residual
    centred = total if rms else total - total.mean(-1, keepdim=True)
    want = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    out, kept = function(x, weight, bias, residual=residual, prenorm=True, eps=1e-5)
    same([out, kept], [want, total])
    same(gradients(out, (x, residual, weight, bias)), gradients(want, (x, residual, weight, bias)))
    same([upstream.layer_norm_fn(x, weight, bias, residual, eps=1e-5, is_rms_norm=rms)], [want])


def test_norms_keep_upstreams_dtypes_and_parallel_form(installed):
    from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn

    x, weight = torch.randn(3, 8, dtype=torch.bfloat16), torch.ones(8)
    out, kept = layer_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)
    assert (out.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
    first, second, total = layer_norm_fn(x, weight, None, x1=x, weight1=2 * weight, prenorm=True, rowscale=torch.ones(3, dtype=x.dtype))
    same([second.float(), total], [2 * first.float(), 2 * x], 1e-2)
    norm = RMSNorm(8, eps=1e-5)
    assert list(norm.state_dict()) == ["weight"] and norm.bias is None
    assert norm(torch.randn(3, 8), residual=torch.randn(3, 8), prenorm=True)[1].shape == (3, 8)
    dropped = RMSNorm(8, dropout_p=0.9)
    assert (dropped(torch.ones(50, 8)) == 0).any() and (dropped.eval()(torch.ones(50, 8)) != 0).all()


@pytest.mark.parametrize("rms", [True, False])
def test_blocks_fused_or_not_are_the_same(installed, rms):
    from mamba_ssm.models.mixer_seq_simple import create_block

    torch.manual_seed(0)
    fused = create_block(12, ssm_cfg={"d_state": 4}, rms_norm=rms, fused_add_norm=True, residual_in_fp32=True, layer_idx=0)
    plain = create_block(12, {"d_state": 4}, rms_norm=rms, residual_in_fp32=True)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 6, 12)
    once = fused(x)
    same(fused(*once), plain(*plain(x)), 1e-5)
    same([once[1]], [x])
    with pytest.raises(ValueError, match=r"ssm_cfg\['layer'\]: expected 'Mamba1' or 'Mamba2' or 'Mamba3', got 'Mamba4'"):
        create_block(12, ssm_cfg={"layer": "Mamba4"})


def test_a_block_runs_its_mlp_on_the_second_norm(installed):
    from mamba_ssm.modules.block import Block

    class Mixer(nn.Identity):
        def forward(self, x, inference_params=None):
            return 2 * x

    block, x = Block(4, lambda dim: Mixer(), lambda dim: nn.Linear(dim, dim)), torch.randn(2, 3, 4)
    mixed = 2 * block.norm(x)
    same(block(x), (block.mlp(block.norm2(mixed + x)), mixed + x), 1e-6)


# -- what is there, what is not, and stepping back --------------------------------------------------------------------------------


def test_a_module_that_upstream_has_not_is_refused_by_name(installed):
    import mamba_ssm

    with pytest.raises(ModuleNotFoundError, match=r"mamba_ssm\.modules\.mamba9 is not in this release of medssm"):
        importlib.import_module("mamba_ssm.modules.mamba9")
    assert mamba_ssm.ops.selective_scan_interface.selective_scan_fn is mamba_ssm.selective_scan_fn


def fake_package(folder):
    """An installed mamba_ssm, under `folder`."""
    (folder / "mamba_ssm").mkdir()
    (folder / "mamba_ssm" / "__init__.py").write_text("Mamba = 'theirs'\n")
    (folder / "mamba_ssm" / "extra.py").write_text("")


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    fake_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield str(tmp_path / "mamba_ssm" / "__init__.py")
    stand_in.uninstall()
    for name in [n for n in sys.modules if n.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


def test_an_installed_package_stays_unless_forced(theirs, caplog):
    report = stand_in.install()
    assert report["mamba_ssm"] == theirs and f"mamba_ssm: the installed one stays ({theirs})" in caplog.text
    import mamba_ssm

    assert mamba_ssm.Mamba == "theirs"
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'mamba_ssm\.modules'"):
        importlib.import_module("mamba_ssm.modules.mamba_simple")

    assert set(stand_in.install(force=True).values()) == {"medssm"}
    assert issubclass(importlib.import_module("mamba_ssm").Mamba, medssm.nn.Mamba)
    stand_in.uninstall()
    assert importlib.import_module("mamba_ssm") is mamba_ssm


def test_uninstall_takes_it_all_away():
    stand_in.install(force=True)
    stand_in.install(force=True)
    before = len(sys.meta_path)
    import selective_scan_cuda_core
    from mamba_ssm import Mamba

    stand_in.uninstall()
    stand_in.uninstall()
    assert len(sys.meta_path) == before - 1
    assert not [n for n, m in sys.modules.items() if m is selective_scan_cuda_core or n.startswith("mamba_ssm.")]
    assert Mamba(12)(torch.randn(1, 3, 12)).shape == (1, 3, 12)
