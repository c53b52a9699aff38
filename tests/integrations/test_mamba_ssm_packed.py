"""Packed sequences in the stand-in: by seq_idx, by cu_seqlens and by both, each equals its sequences one by one."""

import itertools
import types

import pytest
import torch

from tests.integrations.compare import draw, gradients, same
from tests.integrations.test_mamba_ssm_ssd import convolved, recurrence, scan_inputs

ENDS = [0, 3, 3, 8, 9]  # of four sequences, the second empty
PIECES = [slice(a, b) for a, b in itertools.pairwise(ENDS)]
CU = torch.tensor(ENDS, dtype=torch.int32)
NUMBERS = torch.tensor([[0, 0, 0, 2, 2, 2, 2, 2, 3]], dtype=torch.int32)
TWO_ROWS = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [5, 5, 5, 5, 4, 6, 6]], dtype=torch.int32)


def rows_of(numbers):
    """Of each row, its sequences as slices."""
    return [[slice(a, a + n) for a, n in zip(itertools.accumulate([0, *n]), n, strict=False)] for n in map(lengths, numbers.tolist())]


def lengths(row):
    return [len(list(run)) for _, run in itertools.groupby(row)]


# -- the convolution --------------------------------------------------------------------------------------------------------------


def test_the_convolutions_taps_begin_anew(installed):
    from causal_conv1d import causal_conv1d_fn

    x, weight, bias, before = draw(2, 6, 7), draw(6, 4), draw(6), draw(2, 6, 3)
    want = torch.stack(
        [torch.cat([convolved(x[r : r + 1, :, s].mT, weight, bias, "silu")[0] for s in row]).T for r, row in enumerate(rows_of(TWO_ROWS))]
    )
    got = causal_conv1d_fn(x, weight, bias, seq_idx=TWO_ROWS, activation="silu")
    assert got.is_contiguous()
    same([got], [want])
    same(gradients(got, (x, weight, bias)), gradients(want.contiguous(), (x, weight, bias)))
    padded = TWO_ROWS.masked_fill(TWO_ROWS == 6, -1)
    same([causal_conv1d_fn(x, weight, bias, seq_idx=padded, activation="silu")], [want.masked_fill((padded < 0)[:, None], 0)])
    whole, final = causal_conv1d_fn(x, weight, bias, initial_states=before, return_final_states=True)
    same(causal_conv1d_fn(x, weight, bias, torch.zeros(2, 7).int(), before, True), [whole, final])
    # A row's initial state enters its first sequence, its final state leaves its last one.
    got, final = causal_conv1d_fn(x, weight, bias, TWO_ROWS, before, True)
    same([got[0, :, :2], got[1, :, :4]], [whole[0, :, :2], whole[1, :, :4]])
    same([got[0, :, 2:], final[0], final[1, :, 1:]], [causal_conv1d_fn(x[:1, :, 2:], weight, bias)[0], x[0, :, 4:], x[1, :, 5:]])
    assert not final[1, :, 0].any()
    with pytest.raises(ValueError, match=r"seq_idx: expected \(2, 7\), a number per token, got \(1, 7\)"):
        causal_conv1d_fn(x, weight, bias, TWO_ROWS[:1])


# -- the scan ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["seq_idx", "cu_seqlens", "both"])
def test_the_scans_state_begins_anew(installed, told):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B, C = scan_inputs(b=1, l=9)
    D, z, bias, initial = draw(4), draw(1, 9, 4, 3), draw(4), draw(1, 4, 3, 5)
    wants = [
        recurrence(x[:, s], dt[:, s], A, B[:, s], C[:, s], D, z[:, s], bias, initial if s.start == 0 and s.stop else None, True)
        for s in PIECES
        if s.stop > s.start
    ]
    given = {"seq_idx": NUMBERS if told != "cu_seqlens" else None, "cu_seqlens": CU if told != "seq_idx" else None, "state_dtype": torch.float32}
    found = mamba_chunk_scan_combined(
        x, dt, A, B, C, 4, D, z, bias, initial, **given, dt_softplus=True, return_final_states=True, return_varlen_states=told != "seq_idx"
    )
    out, last, *states = found
    want = torch.cat([w[0] for w in wants], 1)
    same([out, last], [want, wants[-1][1]])
    leaves = (x, dt, A, B, C, D, z, bias, initial)
    same(gradients(out, leaves), gradients(want, leaves))
    if states:
        wanted = torch.cat([wants[0][1], torch.zeros_like(initial), wants[1][1], wants[2][1]])
        same(states, [wanted])
        same(gradients(states[0], leaves[:4]), gradients(wanted, leaves[:4]))
        alone = mamba_chunk_scan_combined(x, dt, A, B, C, 4, D, z, bias, initial, **given, dt_softplus=True, return_varlen_states=True)
        same(alone, [out, states[0]])


def test_rows_are_packed_each_on_its_own(installed):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B, C = scan_inputs()
    initial = draw(2, 4, 3, 5)
    out, last = mamba_chunk_scan_combined(x, dt, A, B, C, 4, initial_states=initial, seq_idx=TWO_ROWS, return_final_states=True)
    for r, row in enumerate(rows_of(TWO_ROWS)):
        one = slice(r, r + 1)
        wants = [recurrence(x[one, s], dt[one, s], A, B[one, s], C[one, s], state=None if s.start else initial[one]) for s in row]
        same([out[one], last[one]], [torch.cat([w[0] for w in wants], 1), wants[-1][1]])
    plain = mamba_chunk_scan_combined(x, dt, A, B, C, 4, initial_states=initial, return_final_states=True)
    same(mamba_chunk_scan_combined(x, dt, A, B, C, 4, initial_states=initial, seq_idx=torch.zeros(2, 7), return_final_states=True), plain)


def test_tokens_behind_the_last_sequence_are_padding(installed):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B, C = scan_inputs(b=1, l=9)
    ends, numbers = torch.tensor([0, 3, 7, 7], dtype=torch.int32), torch.tensor([[0] * 3 + [1] * 4 + [-1] * 2])
    wants = [recurrence(x[:, s], dt[:, s], A, B[:, s], C[:, s]) for s in (slice(0, 3), slice(3, 7))]
    out, states = mamba_chunk_scan_combined(x, dt, A, B, C, 4, seq_idx=numbers, cu_seqlens=ends, return_varlen_states=True)
    same([out[:, :7], states], [torch.cat([w[0] for w in wants], 1), torch.cat([wants[0][1], wants[1][1], torch.zeros(1, 4, 3, 5).double()])])


def test_what_does_not_fit_is_named(installed):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    inputs = (*scan_inputs(), 4)
    for given, message in (
        ({"return_varlen_states": True}, "cu_seqlens: expected the sequences' bounds, since return_varlen_states is True, got None"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens: expected a batch of 1, sequences one behind the other, got a batch of 2"),
        ({"seq_idx": torch.zeros(2, 6)}, r"seq_idx: expected \(2, 7\), a number per token, got \(2, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            mamba_chunk_scan_combined(*inputs, **given)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected \(n \+ 1,\), rising from 0 to at most 7, the number of tokens, got \[0, 5, 3\]"):
        mamba_chunk_scan_combined(*scan_inputs(b=1), 4, cu_seqlens=torch.tensor([0, 5, 3]))


def test_the_scan_without_a_batch(installed):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined_varlen

    x, dt, A, B, C = (t.detach() for t in scan_inputs(b=1, l=9))
    D, z, bias, initial = (torch.randn(*s).double() for s in ((4,), (1, 9, 4, 3), (4,), (4, 4, 3, 5)))
    wants = [
        recurrence(x[:, s], dt[:, s], A, B[:, s], C[:, s], D, z[:, s], bias, initial[i : i + 1], True)
        if s.stop > s.start
        else (x[:, s], initial[i : i + 1])
        for i, s in enumerate(PIECES)
    ]
    out = torch.empty_like(x[0])
    arguments = (x[0], dt[0], A, B[0], C[0], 4, CU, None, None, None, out, D, z[0], bias, initial, True)
    same([mamba_chunk_scan_combined_varlen(*arguments), out], [torch.cat([w[1] for w in wants]), torch.cat([w[0] for w in wants], 1)[0]])
    assert mamba_chunk_scan_combined_varlen(*arguments, state_dtype=torch.float32).dtype is torch.float32
    with pytest.raises(NotImplementedError, match="return_intermediate_states"):
        mamba_chunk_scan_combined_varlen(*arguments, return_intermediate_states=True)


# -- the mixer --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("options", [{}, {"rmsnorm": False, "ngroups": 2, "d_ssm": 8}])
def test_mamba2_keeps_packed_sequences_apart(installed, told, options):
    from mamba_ssm import Mamba2

    torch.manual_seed(0)
    m, x = Mamba2(8, d_state=5, headdim=4, layer_idx=0, **options).double(), draw(1, 9, 8)
    given = {"seq_idx": NUMBERS} if told == "seq_idx" else {"cu_seqlens": CU}
    want = torch.cat([m(x[:, s]) for s in PIECES if s.stop > s.start], 1)
    same([m(x, **given)], [want])
    same(gradients(m(x, **given), (x, *m.parameters())), gradients(want, (x, *m.parameters())))
    same([m(x[0], seqlen=9, **given)], [want[0]])


def test_a_convolution_that_is_called_keeps_them_apart_too(installed):
    """As an adapter's or a quantized one is."""
    from mamba_ssm import Mamba2

    m, x = Mamba2(8, d_state=5, headdim=4).double(), draw(1, 9, 8)
    want = m(x, cu_seqlens=CU)
    m.conv1d.register_forward_hook(lambda *_: None)
    same([m(x, cu_seqlens=CU)], [want])


def test_mamba2_steps_on_from_packed_sequences(installed):
    """A prompt of several sequences at once, then a token of each per call."""
    from mamba_ssm import Mamba2

    m, x, more = Mamba2(8, d_state=5, headdim=4, layer_idx=0).double(), draw(1, 9, 8), draw(4, 2, 8)
    cache = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    m(x, seq_idx=NUMBERS, cu_seqlens=CU, inference_params=cache)
    got = []
    for t in range(2):
        cache.seqlen_offset += 1
        got.append(m(more[:, t : t + 1], inference_params=cache))
    want = torch.cat([m(torch.cat([x[:, s], more[i : i + 1]], 1))[:, -2:] for i, s in enumerate(PIECES)])
    same([torch.cat(got, 1)], [want])

    one = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    m(x, seq_idx=NUMBERS, inference_params=one)  # without bounds what goes on is the last sequence
    one.seqlen_offset = 9
    same([m(more[3:, :1], inference_params=one)], [want[3:, :1]])


def test_mamba2_simple_packs_and_learns_its_initial_state(installed):
    from mamba_ssm.modules.mamba2_simple import Mamba2Simple
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    m, x = Mamba2Simple(8, d_state=5, headdim=4, learnable_init_states=True).double(), draw(2, 7, 8)
    assert m.init_states.shape == (4, 4, 5) and not m.init_states.any() and m.init_states._no_weight_decay
    plain = Mamba2Simple(8, d_state=5, headdim=4).double()
    plain.load_state_dict({k: v for k, v in m.state_dict().items() if k != "init_states"})
    same([m(x)], [plain(x)])
    with torch.no_grad():
        m.init_states.normal_()
    rest = (m.conv1d.weight.squeeze(1), m.conv1d.bias, m.dt_bias, -torch.exp(m.A_log), m.D, 256, m.init_states.expand(2, -1, -1, -1))
    shape = {"headdim": 4, "rmsnorm_weight": m.norm.weight, "rmsnorm_eps": 1e-5, "norm_before_gate": False, "outproj_weight": m.out_proj.weight}
    for numbers in (None, TWO_ROWS):
        want = mamba_split_conv1d_scan_combined(m.in_proj(x), *rest, seq_idx=numbers, **shape)
        same([m(x, seq_idx=numbers)], [want], 1e-6)
        same(gradients(m(x, seq_idx=numbers), (x, m.init_states)), gradients(want, (x, m.init_states)), 1e-6)
    conv_state, ssm_state = m.allocate_inference_cache(2, 7)
    same([torch.cat([m.step(x[:, t : t + 1], conv_state, ssm_state)[0] for t in range(7)], 1)], [m(x)])
