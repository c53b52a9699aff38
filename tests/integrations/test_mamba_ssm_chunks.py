"""The chunked parts of Mamba-2's scan and the functions around it in the stand-in: together they are the recurrence, token by token."""

import importlib
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from tests.integrations.compare import draw, gradients, same
from tests.integrations.test_mamba_ssm_ssd import convolved, recurrence, scan_inputs, unit

SIZE = 3  # tokens of a chunk; scan_inputs has 7


@pytest.mark.parametrize("gated", [False, True])
def test_the_parts_together_are_the_scan(installed, gated):
    from mamba_ssm.ops.triton.ssd_chunk_scan import chunk_scan, chunk_scan_ref
    from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_cumsum_fwd, chunk_state, chunk_state_ref
    from mamba_ssm.ops.triton.ssd_state_passing import state_passing, state_passing_ref

    x, dt, A, B, C = scan_inputs()
    bias, initial, D, z = draw(4), draw(2, 4, 3, 5), draw(4, 3) if gated else draw(4), draw(2, 7, 4, 3) if gated else None
    want = recurrence(x, dt, A, B, C, D, z, bias, initial, True, (0.3, 0.9))
    for state, passing, scan in ((chunk_state, state_passing, chunk_scan), (chunk_state_ref, state_passing_ref, chunk_scan_ref)):
        sums, steps = _chunk_cumsum_fwd(dt, A, SIZE, bias, True, (0.3, 0.9))
        assert sums.shape == steps.shape == (2, 4, 3, SIZE)
        before, last = passing(state(B, x, steps, sums).flatten(-2), sums[..., -1], initial.flatten(-2))
        out = scan(B, C, x, steps, sums, before.unflatten(-1, (3, 5)), D, z)
        same([out, last.unflatten(-1, (3, 5))], want)
        leaves = [t for t in (x, dt, A, B, C, D, z, bias, initial) if t is not None]
        same(gradients(out, leaves), gradients(want[0], leaves))


def test_packed_parts_do_not_mix_sequences(installed):
    from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_fwd
    from mamba_ssm.ops.triton.ssd_chunk_scan import _chunk_scan_fwd
    from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_cumsum_fwd, _chunk_state_fwd, chunk_state_varlen
    from mamba_ssm.ops.triton.ssd_state_passing import _state_passing_fwd

    x, dt, A, B, C = scan_inputs(b=1, l=14)
    ends = [0, 2, 2, 9, 14]
    pieces = [slice(a, b) for a, b in itertools.pairwise(ends)]
    wants = [recurrence(x[:, s], dt[:, s], A, B[:, s], C[:, s]) for s in pieces if s.stop > s.start]
    seq_idx = torch.cat([torch.full((1, s.stop - s.start), i) for i, s in enumerate(pieces)], 1)
    sums, steps = _chunk_cumsum_fwd(dt, A, 4)
    states = _chunk_state_fwd(B, x, steps, sums, seq_idx=seq_idx)
    before, last = _state_passing_fwd(states.flatten(-2), sums[..., -1], seq_idx=seq_idx, chunk_size=4)
    before = before.unflatten(-1, (3, 5))
    products = _bmm_chunk_fwd(C, B, 4, seq_idx=seq_idx, output_dtype=torch.float64)
    out, _ = _chunk_scan_fwd(products, x, steps, sums, C, before, seq_idx=seq_idx)
    same([out, last.unflatten(-1, (3, 5))], [torch.cat([w[0] for w in wants], 1), wants[-1][1]])
    found = chunk_state_varlen(B[0], x[0], steps[0], sums[0], torch.tensor(ends), before[0])
    same([found], [torch.cat([wants[0][1], torch.zeros(1, 4, 3, 5).double(), wants[1][1], wants[2][1]])])


def test_products_and_segment_sums(installed):
    from mamba_ssm.modules.ssd_minimal import segsum, segsum_unstable
    from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_fwd

    a, b = draw(2, 7, 5), draw(2, 7, 5)
    padded = [F.pad(t, (0, 0, 0, 2)).unflatten(1, (3, 3)) for t in (a, b)]
    want = padded[0] @ padded[1].mT
    same([_bmm_chunk_fwd(a, b, 3), _bmm_chunk_fwd(a, b, 3, causal=True)], [want, want.tril()])
    x = draw(2, 4)
    want = torch.stack([torch.stack([x[:, j + 1 : i + 1].sum(1) if j <= i else x[:, 0] * 0 - math.inf for j in range(4)], 1) for i in range(4)], 1)
    same([segsum(x), segsum_unstable(x)], [want, want])
    assert segsum(x.float()).dtype is torch.float32


def test_whole_scans_of_any_step(installed):
    """mamba_chunk_scan, its twin and the scan by channels leave a negative step as it is."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan, ssd_chunk_scan_combined_ref, ssd_selective_scan

    x, dt, A, B, C = scan_inputs()
    D, z, bias = draw(4, 3), draw(2, 7, 4, 3), draw(4)
    want = recurrence(x, dt, A, B, C, D, z, bias, limit=(-math.inf, math.inf))[0]
    for got in (
        mamba_chunk_scan(x, dt, A, B, C, 4, D, z, bias),
        ssd_chunk_scan_combined_ref(x, dt, A, B, C, 4, D, z, bias),
        ssd_selective_scan(x, dt, A, B, C, D, z, bias),
        ssd_selective_scan(x, dt[..., None].expand(x.shape), A[:, None, None].expand(4, 3, 5).flatten(0, 1), B, C, D, z, bias[:, None].expand(4, 3)),
    ):
        same([got], [want])
        same(gradients(got, (x, dt, A, B, C, D, z, bias)), gradients(want, (x, dt, A, B, C, D, z, bias)))
    limited = recurrence(x, dt, A, B, C, None, None, bias, None, True, (0.4, 0.9))[0]
    same([ssd_selective_scan(x, dt, A, B, C, None, None, bias, True, (0.4, 0.9))], [limited])


@pytest.mark.parametrize("tells", ["z", "D", "headdim"])
def test_scans_behind_the_convolution(installed, tells):
    from mamba_ssm.ops.triton.ssd_combined import mamba_conv1d_scan_ref, mamba_split_conv1d_scan_combined, mamba_split_conv1d_scan_ref

    xBC, weight, conv_bias, dt, bias = draw(2, 7, 32), draw(32, 4), draw(32), draw(2, 7, 4), draw(4)
    A, D, z = -torch.rand(4).double(), draw(4, 3) if tells == "D" else draw(4), draw(2, 7, 12) if tells == "z" else None
    x, B, C = convolved(xBC, weight, conv_bias, "silu").split([12, 10, 10], -1)
    x, B, C = x.unflatten(-1, (4, 3)), B.unflatten(-1, (2, 5)), C.unflatten(-1, (2, 5))
    want = recurrence(x, dt, A, B, C, D, None if z is None else z.unflatten(-1, (4, 3)), bias, None, True)[0].flatten(2)
    given = {"dt_bias": bias, "dt_softplus": True, "ngroups": 2, "headdim": 3 if tells == "headdim" else None}
    same([mamba_conv1d_scan_ref(xBC, weight, conv_bias, dt, A, 4, D, z, **given)], [want])
    if tells == "headdim":
        with pytest.raises(ValueError, match="headdim: expected the size of a head"):
            mamba_conv1d_scan_ref(xBC, weight, conv_bias, dt, A, 4, D, ngroups=2)
    whole = torch.cat([draw(2, 7, 12), xBC, dt], -1)
    rest = (weight, conv_bias, bias, A, D, 4)
    options = {"rmsnorm_weight": draw(12), "outproj_weight": draw(6, 12), "headdim": 3, "ngroups": 2, "dt_limit": (0.1, 0.9), "activation": None}
    same([mamba_split_conv1d_scan_ref(whole, *rest, **options)], [mamba_split_conv1d_scan_combined(whole, *rest, **options)])


# -- norms ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [True, False])
def test_plain_norms_are_their_formula(installed, rms):
    from mamba_ssm.ops.triton import layer_norm

    x, residual, x1, scale = draw(2, 5, 8), draw(2, 5, 8), draw(2, 5, 8), draw(2, 5)
    weight, bias, weight1, bias1 = draw(8), draw(8), draw(8), draw(8)
    kept, kept1 = torch.rand(2, 5, 8) > 0.4, torch.rand(2, 5, 8) > 0.4
    plain, fused = (layer_norm.rms_norm_ref, layer_norm.rms_norm_fn) if rms else (layer_norm.layer_norm_ref, layer_norm.layer_norm_fn)
    total = kept * x * scale[..., None] / 0.6 + kept1 * x1 / 0.6 + residual
    normed = unit(total, 8, 1e-6, rms)
    found = plain(x, weight, bias, residual, x1, weight1, bias1, 1e-6, 0.4, scale, True, kept, kept1)
    same(found, [normed * weight + bias, normed * weight1 + bias1, total])
    same([plain(x, weight, None), plain(x.float(), weight.float(), None, upcast=True).double()], [fused(x, weight, None)] * 2, 1e-5)
    older = importlib.import_module("mamba_ssm.ops.triton.layernorm")
    first = (older.rms_norm_ref if rms else older.layer_norm_ref)(x, weight, bias, residual, 1e-4, True)
    same(first, [unit(x + residual, 8, 1e-4, rms) * weight + bias, x + residual])
    half = plain(x.half(), weight.half(), None, residual.half(), prenorm=True, upcast=True)
    assert [t.dtype for t in half] == [torch.float16, torch.float32]


def test_dropout_masks_tell_what_was_dropped(installed):
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn

    x, x1, weight = draw(20, 30), draw(20, 30), draw(30)
    out, total, kept, kept1 = layer_norm_fn(x, weight, None, x1=x1, dropout_p=0.3, prenorm=True, return_dropout_mask=True)
    same([total, out], [(kept * x + kept1 * x1) / 0.7, unit(total, 30, 1e-6, False) * weight])
    assert 0.6 < kept.double().mean() < 0.8 and not torch.equal(kept, kept1)
    assert layer_norm_fn(x, weight, None, return_dropout_mask=True)[1:] == (None, None)


def test_a_linear_layer_behind_a_norm(installed):
    from mamba_ssm.ops.selective_scan_interface import rms_norm_forward
    from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_linear_fn

    x, residual, weight, bias, matrix, shift = draw(2, 5, 8), draw(2, 5, 8), draw(8), draw(8), draw(6, 8), draw(6)
    want = F.linear(unit(x + residual, 8, 1e-5) * weight + bias, matrix, shift)
    out, total = layer_norm_linear_fn(x, weight, bias, matrix, shift, residual, 1e-5, prenorm=True, is_rms_norm=True)
    same([out, total], [want, x + residual])
    same(gradients(out, (x, residual, weight, bias, matrix, shift)), gradients(want, (x, residual, weight, bias, matrix, shift)))
    same([layer_norm_linear_fn(x, weight, None, matrix, None)], [F.linear(F.layer_norm(x, (8,), weight, eps=1e-6), matrix)])
    same(
        [rms_norm_forward(x, weight, bias), rms_norm_forward(x, weight, None, 1e-5, False)],
        [unit(x, 8, 1e-6) * weight + bias, unit(x, 8, 1e-5, False) * weight],
    )
    assert rms_norm_forward(x.half(), weight, None).dtype is torch.float16
    norm = RMSNorm(8, device="meta").to_empty(device="cpu")
    norm.reset_parameters()
    assert (norm.weight == 1).all() and norm.drop is None


@pytest.mark.parametrize("gate", [None, "before", "after"])
def test_the_plain_gated_norm_is_its_formula(installed, gate):
    from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref

    x, weight, bias, z = draw(2, 5, 12), draw(12), draw(12), draw(2, 5, 12) if gate else None
    want = unit(x * F.silu(z) if gate == "after" else x, 4, 1e-4) * weight + bias
    want = want * F.silu(z) if gate == "before" else want
    options = {"z": z, "eps": 1e-4, "group_size": 4, "norm_before_gate": gate != "after"}
    for upcast in (True, False):
        same([rms_norm_ref(x, weight, bias, upcast=upcast, **options)], [want])
    assert rms_norm_ref(x.half(), weight.float(), None, upcast=False).dtype is torch.float16
