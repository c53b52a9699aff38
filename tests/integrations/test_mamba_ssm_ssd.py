"""Mamba-2's functions in the stand-in for mamba_ssm: the scans and the gated norms against their formulas, token by token."""

import pytest
import torch
from torch.nn import functional as F

from tests.integrations.compare import draw, gradients, same

DOUBLE = torch.float64


def recurrence(x, dt, A, B, C, D=None, z=None, bias=None, state=None, softplus=False, limit=(0.0, float("inf"))):
    """Mamba-2's formula: (out, last state)."""
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    S = torch.zeros_like(x[:, 0, :, :, None] * B[:, 0, :, None]) if state is None else state
    outs = []
    for t in range(x.shape[1]):
        s = dt[:, t] if bias is None else dt[:, t] + bias
        s = (F.softplus(s) if softplus else s).clamp(*limit)[..., None, None]
        S = torch.exp(s * A[:, None, None]) * S + s * x[:, t, :, :, None] * B[:, t, :, None]
        y = (S * C[:, t, :, None]).sum(-1)
        if D is not None:
            y = y + (D if D.dim() == 2 else D[:, None]) * x[:, t]
        outs.append(y if z is None else y * F.silu(z[:, t]))
    return torch.stack(outs, 1), S


def convolved(u, weight, bias, activation):
    """u (b, l, d) under a causal convolution, token by token."""
    width, outs = weight.shape[1], []
    for t in range(u.shape[1]):
        total = sum(weight[:, width - 1 - k] * u[:, t - k] for k in range(width) if t >= k)
        outs.append(total if bias is None else total + bias)
    out = torch.stack(outs, 1)
    return F.silu(out) if activation else out


def unit(x, size, eps, rms=True):
    """x over the root mean square, or after centring the deviation, of each group of `size` channels."""
    groups = x.unflatten(-1, (-1, size))
    groups = groups if rms else groups - groups.mean(-1, keepdim=True)
    return (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)


def scan_inputs(b=2, l=7, h=4, p=3, g=2, n=5):
    """x, dt, A, B, C in float64."""
    return draw(b, l, h, p), draw(b, l, h), (-torch.rand(h, dtype=DOUBLE) - 0.1).requires_grad_(), draw(b, l, g, n), draw(b, l, g, n)


# -- the scans --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"D": (4,), "dt_bias": (4,), "dt_softplus": True},
        {"D": (4, 3), "z": (2, 7, 4, 3)},
        {"z": (2, 7, 4, 3), "dt_softplus": True, "dt_limit": (0.4, 0.9), "initial_states": (2, 4, 3, 5)},
    ],
)
def test_mamba_chunk_scan_combined_is_the_recurrence(installed, groups, options):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    inputs = scan_inputs(g=groups)
    given = {k: draw(*v) if k not in ("dt_softplus", "dt_limit") else v for k, v in options.items()}
    names = {"dt_bias": "bias", "dt_softplus": "softplus", "dt_limit": "limit", "initial_states": "state"}
    want = recurrence(*inputs, **{names.get(k, k): v for k, v in given.items()})
    got = mamba_chunk_scan_combined(*inputs, 256, **given, return_final_states=True)
    same(got, want)
    same([mamba_chunk_scan_combined(*inputs, chunk_size=4, **given)], want[:1])
    leaves = (*inputs, *(t for t in given.values() if isinstance(t, torch.Tensor)))
    same(gradients(got[0], leaves), gradients(want[0], leaves))
    same(gradients(got[1], inputs[:4]), gradients(want[1], inputs[:4]))


def test_the_scan_takes_its_arguments_in_upstreams_order(installed):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B, C = scan_inputs()
    D, z, bias, state = draw(4), draw(2, 7, 4, 3), draw(4), draw(2, 4, 3, 5)
    out, last = mamba_chunk_scan_combined(x, dt, A, B, C, 64, D, z, bias, state, None, None, True, (0.1, 0.8), True, False)
    same([out, last], recurrence(x, dt, A, B, C, D, z, bias, state, True, (0.1, 0.8)))


@pytest.mark.parametrize("beside", [0, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"headdim": 3},
        {"headdim": 3, "activation": None, "ngroups": 2, "outproj": True, "dt_limit": (0.2, 0.9)},
        {"rmsnorm": True, "ngroups": 2, "outproj": True, "initial": True},
        {"headdim": 3, "rmsnorm": True, "norm_before_gate": False, "ngroups": 2},
    ],
)
def test_mamba_split_conv1d_scan_combined_is_its_formula(installed, options, beside):
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    given = dict(options)
    rms, projected, initial = (given.pop(k, False) for k in ("rmsnorm", "outproj", "initial"))
    h, p, n, g = 4, 3, 5, given.get("ngroups", 1)
    inner, rows = h * p, g * n
    zxbcdt, weight, bias = draw(2, 7, 2 * beside + 2 * inner + 2 * rows + h), draw(inner + 2 * rows, 4), draw(inner + 2 * rows)
    dt_bias, A, D = draw(h), (-torch.rand(h, dtype=DOUBLE)).requires_grad_(), draw(h) if "headdim" in given else draw(h, p)
    norm, state = draw(inner) if rms else None, draw(2, h, p, n) if initial else None
    out_weight, out_bias = (draw(6, beside + inner), draw(6)) if projected else (None, None)

    first, second, z, u, dt = zxbcdt.split([beside, beside, inner, inner + 2 * rows, h], -1)
    x, B, C = convolved(u, weight, bias, given.get("activation", "silu")).split([inner, rows, rows], -1)
    y, last = recurrence(
        x.unflatten(-1, (h, p)),
        dt,
        A,
        B.unflatten(-1, (g, n)),
        C.unflatten(-1, (g, n)),
        D,
        None,
        dt_bias,
        state,
        True,
        given.get("dt_limit", (0.0, float("inf"))),
    )
    y = y.flatten(-2)
    if not rms:
        y = y * F.silu(z)
    elif given.get("norm_before_gate", True):
        y = unit(y, inner // g, 1e-6) * norm * F.silu(z)
    else:
        y = unit(y * F.silu(z), inner // g, 1e-6) * norm
    y = torch.cat([F.silu(first) * second, y], -1)
    want = y @ out_weight.T + out_bias if projected else y

    got, state_out = mamba_split_conv1d_scan_combined(
        zxbcdt,
        weight,
        bias,
        dt_bias,
        A,
        D,
        256,
        state,
        return_final_states=True,
        rmsnorm_weight=norm,
        outproj_weight=out_weight,
        outproj_bias=out_bias,
        **given,
    )
    same([got, state_out], [want, last])
    leaves = [t for t in (zxbcdt, weight, bias, dt_bias, A, D, state, norm, out_weight, out_bias) if t is not None]
    same(gradients(got, leaves), gradients(want, leaves))


@pytest.mark.parametrize("initial", [False, True])
def test_ssd_minimal_discrete_takes_steps_already_in(installed, initial):
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete

    x, dt, A, B, C = scan_inputs(l=8, g=4)
    dt = F.softplus(dt)
    state = draw(2, 1, 4, 3, 5) if initial else None
    want = recurrence(x, dt, A, B, C, state=state[:, 0] if initial else None)
    got = ssd_minimal_discrete(x * dt[..., None], A * dt, B, C, 4, state)
    same(got, want)
    leaves = [x, A, B, C] + [state] * initial
    for a, b in zip(got, want, strict=True):
        same(gradients(a, leaves[:3] + leaves[4:]), gradients(b, leaves[:3] + leaves[4:]))
    same(gradients(got[0], leaves), gradients(want[0], leaves))
    low = ssd_minimal_discrete(*(t.detach().to(torch.bfloat16) for t in (x, A * dt, B, C)), 4)
    assert {t.dtype for t in low} == {torch.bfloat16}


@pytest.mark.parametrize("gated", [False, True])
def test_selective_state_update_steps_through_mamba_2(installed, gated):
    """As upstream's Mamba2 calls it: what a head has is expanded over its channels."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B, C = (t.detach() for t in scan_inputs())
    D, bias, z = (torch.randn(*shape, dtype=DOUBLE) for shape in ((4,), (4,), (2, 7, 4, 3)))
    want = mamba_chunk_scan_combined(x, dt, A, B, C, 64, D, z if gated else None, bias, dt_softplus=True, return_final_states=True)
    state, wide = torch.zeros(2, 4, 3, 5, dtype=DOUBLE), (4, 3)
    rates, D, bias = A[:, None, None].expand(4, 3, 5), D[:, None].expand(wide), bias[:, None].expand(wide)
    outs = [
        selective_state_update(
            state,
            x[:, t],
            dt[:, t, :, None].expand(2, *wide),
            rates,
            B[:, t],
            C[:, t],
            D,
            z=z[:, t] if gated else None,
            dt_bias=bias,
            dt_softplus=True,
        )
        for t in range(7)
    ]
    same([torch.stack(outs, 1), state], want)


# -- the gated norms --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("gate", [None, "before", "after"])
def test_gated_norms_are_their_formula(installed, rms, size, gate):
    from mamba_ssm.ops.triton import layernorm_gated

    x, weight, bias, z = draw(2, 5, 12), draw(12), draw(12), draw(2, 5, 12) if gate else None
    want = unit(x * F.silu(z) if gate == "after" else x, size or 12, 1e-4, rms) * weight + bias
    want = want * F.silu(z) if gate == "before" else want
    options = {"z": z, "eps": 1e-4, "group_size": size, "norm_before_gate": gate != "after"}
    got = layernorm_gated.layernorm_fn(x, weight, bias, **options, is_rms_norm=rms)
    same([got], [want])
    leaves = [t for t in (x, weight, bias, z) if t is not None]
    same(gradients(got, leaves), gradients(want, leaves))
    if rms:
        same([layernorm_gated.rmsnorm_fn(x, weight, bias, **options)], [want])

    module = (layernorm_gated.RMSNorm if rms else layernorm_gated.LayerNorm)(12, 1e-4, size, gate != "after", dtype=DOUBLE)
    assert list(module.state_dict()) == ["weight"] + ["bias"] * (not rms) and (module.bias is None) is rms
    same([module(x, z)], [layernorm_gated.layernorm_fn(x, torch.ones(12, dtype=DOUBLE), None, **options, is_rms_norm=rms)])


def test_gated_norms_keep_the_dtype_and_name_what_does_not_fit(installed):
    from mamba_ssm.ops.triton.layernorm_gated import LayerNorm, RMSNorm, rmsnorm_fn

    norm = RMSNorm(8)
    assert norm.norm_before_gate and norm.group_size is None and norm.eps == 1e-5 and RMSNorm(8, device="meta").weight.is_meta
    x, z = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    low = norm(x.bfloat16(), z.bfloat16())
    assert low.dtype is torch.bfloat16
    same([low.float()], [norm(x, z)], 0.05)
    layer = LayerNorm(8)
    with torch.no_grad():
        layer.bias.add_(1), layer.weight.zero_()
    layer.reset_parameters()
    same([layer(x)], [F.layer_norm(x, (8,))], 1e-5)
    for bad, message in (
        ({"group_size": 3}, "group_size: expected a divisor of the 8 channels, got 3"),
        ({"z": z[:1]}, r"z: expected \(2, 3, 8\) or \(8,\), got \(1, 3, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            rmsnorm_fn(x, norm.weight, None, **bad)
    with pytest.raises(ValueError, match=r"weight: expected \(8,\)"):
        rmsnorm_fn(x, torch.ones(1), None)


# -- what is refused --------------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named(installed):
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

    x, dt, A, B, C = scan_inputs(g=4)
    rest = (torch.randn(4), torch.rand(4), torch.randn(4), 64)
    for wrong, message in (
        (lambda: mamba_chunk_scan_combined(x, dt[..., :3], A, B, C, 64), r"dt: expected \(2, 7, 4\), got \(2, 7, 3\)"),
        (lambda: mamba_split_conv1d_scan_combined(torch.randn(2, 7, 38), torch.randn(22, 4), None, *rest), "headdim: expected the size of a head"),
        (
            lambda: mamba_split_conv1d_scan_combined(torch.randn(2, 7, 39), torch.randn(22, 4), None, *rest, headdim=3),
            r"zxbcdt: expected \(b, l, 2m \+ 12 \+ 22 \+ 4\).*got \(2, 7, 39\)",
        ),
        (
            lambda: mamba_split_conv1d_scan_combined(torch.randn(2, 7, 38), torch.randn(22, 4), None, *rest, headdim=3, activation="gelu"),
            "activation: expected None, 'silu' or 'swish', got 'gelu'",
        ),
        (lambda: ssd_minimal_discrete(x, A, B, C, 4), r"A: expected \(2, 7, 4\), got \(4,\)"),
        (lambda: ssd_minimal_discrete(x, dt, B[:, :, :2], C, 4), r"B: expected \(2, 7, 4, n\), got \(2, 7, 2, 5\)"),
        (lambda: ssd_minimal_discrete(x, dt, B, C, 4, torch.zeros(2, 4, 3, 5)), r"initial_states: expected \(2, 1, 4, 3, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
