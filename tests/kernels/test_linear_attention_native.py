"""The CPU kernels of linear attention against the reference: every instruction set, and both sides of every border of tiles, segments and blocks."""

from __future__ import annotations

import itertools

import pytest
import torch

from medssm.kernels.linear_attention import native, reference
from medssm.kernels.walks import walk_steps

TILE, SEGMENT = 32, 512  # csrc/linear_attention/problem.h; a causal walk's tiles end at multiples of 64 steps too
GROWING, LONGEST = 32 * SEGMENT, 32 * 4096  # lengths up to which segments have SEGMENT tokens, and causal ones a 32nd of the length
MAPS = [("elu", True, 1e-6), ("relu", True, 0.5), (None, False, 0.0)]  # feature map, normalize, eps
both = pytest.mark.parametrize("causal", [False, True])


def inputs(length, groups=1, dk=6, dv=5, *, batch=1, per_group=1, q_length=None, rotary=True, initial=True, dtype=torch.float64):
    """q, k, v, cos, sin and the initial sums, the tokens in dtype."""
    g = torch.Generator().manual_seed(length * 31 + dk)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    q, k, v = (
        normal(batch, n, h, d).to(dtype)
        for n, h, d in ((length if q_length is None else q_length, groups * per_group, dk), (length, groups, dk), (length, groups, dv))
    )
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    angles = 3 * normal(length, groups, dk // 2).repeat_interleave(2, -1)
    turn = [angles.cos().to(compute), angles.sin().to(compute)] if rotary and dk % 2 == 0 else [None, None]
    return [q, k, v, *turn, *([normal(batch, groups, dk, dv).to(compute), normal(batch, groups, dk).abs().to(compute)] if initial else [None, None])]


def along_the_walk(q, k, v, cos, sin, initial_kv, initial_k, feature_map, causal, normalize, scale, eps, index, starts, reverse):
    """The reference's causal form with sums along all steps at once in place of its loop."""
    length, groups = k.shape[1:3]
    steps, fresh = walk_steps(length, index, starts, reverse, "cpu")
    f, h = reference.feature(q, feature_map), reference.feature(k, feature_map)
    per_group = q.shape[2] // groups
    turn = [None if t is None else t.repeat_interleave(per_group, 1) for t in (cos, sin)]
    q, q_turned, k, k_turned, v = (t[:, steps] for t in (f, reference.rotate(f, *turn), h, reference.rotate(h, cos, sin), v))

    def sums(of, state):
        bounds = [0, *sorted(fresh), length]
        pieces = [of[:, a:b].cumsum(1) for a, b in itertools.pairwise(bounds)]
        if state is not None:
            pieces[0] = pieces[0] + state.unsqueeze(1)
        return torch.cat(pieces, 1)

    kv, z = sums(k_turned.unsqueeze(-1) * v.unsqueeze(-2), initial_kv), sums(k, initial_k)
    out = scale * torch.einsum("blgjk,blgkv->blgjv", q_turned.unflatten(2, (groups, per_group)), kv)
    if normalize:
        out = out / (torch.einsum("blgjk,blgk->blgj", q.unflatten(2, (groups, per_group)), z) + eps).unsqueeze(-1)
    return out.flatten(2, 3)[:, torch.argsort(steps)], kv[:, -1], z[:, -1]


def results(tensors, options, walk=(None, None, False), with_state=True):
    """What the kernel computes: outputs, gradients, and the gradients' cotangents."""
    outputs = native.forward(*tensors, *options, *walk)
    g = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) if with_state or not i else None for i, t in enumerate(outputs)]
    return [*outputs, *native.backward(*cotangents, *outputs[1:], *tensors, *options, *walk)], cotangents


def check(tensors, tolerance, causal, *, walk=(None, None, False), with_state=True, features=MAPS[0], whole=along_the_walk):
    """Outputs and all gradients equal those of the reference in float64."""
    feature_map, normalize, eps = features
    options = (feature_map, causal, normalize, 0.7, eps)
    got, cotangents = results(tensors, options, walk, with_state)
    leaves = [None if t is None else t.double().requires_grad_(i not in (3, 4)) for i, t in enumerate(tensors)]
    want = (whole if causal else reference.linear_attention)(*leaves, *options, *walk)
    live = [t for t in leaves if t is not None and t.requires_grad]
    cotangents = [torch.zeros_like(w) if c is None else c.double() for w, c in zip(want, cotangents, strict=True)]
    gradients = iter(torch.autograd.grad(want, live, cotangents, materialize_grads=True))
    want = [*want, *(None if leaves[i] is None else next(gradients) for i in (0, 1, 2, 5, 6))]
    for name, a, b in zip(("out", "kv", "z", "dq", "dk", "dv", "dinitial_kv", "dinitial_k"), got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and a.numel():
            error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-3)
            assert error < tolerance, f"{name}: {error:.1e}"


@both
@pytest.mark.parametrize("dk, dv", [(1, 1), (2, 40), (8, 16), (16, 8), (17, 5), (24, 33), (40, 3), (48, 32)])
def test_widths_that_are_no_multiple_of_the_lanes(isa, dk, dv, causal):
    check(inputs(2 * TILE + 3, 2, dk, dv), 1e-12, causal)
    tensors = inputs(TILE + 1, 1, dk, dv, batch=2, per_group=2, dtype=torch.float32)
    check(tensors, 5e-6, causal, features=("elu", True, 0.5))  # of one key and no eps, dq would cancel


@both
@pytest.mark.parametrize("features", MAPS)
@pytest.mark.parametrize("initial", [False, True])
def test_feature_maps_and_states(isa, features, initial, causal):
    for with_state, rotary in itertools.product((False, True), repeat=2):
        check(inputs(TILE + 5, 2, per_group=2, rotary=rotary, initial=initial), 1e-12, causal, features=features, with_state=with_state)


LENGTHS = [1, 2, 3, *(n * of + i for of in (TILE, SEGMENT) for n in (1, 2, 3) for i in (-1, 0, 1)), 1900]


@both
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_on_both_sides_of_every_border(length, causal):
    check(inputs(length, 2, per_group=2), 1e-12, causal)
    check(inputs(length, 2, 3, 9, batch=2, initial=False), 1e-12, causal, walk=(torch.randperm(length), None, True), with_state=False)


@both
@pytest.mark.parametrize("length", [GROWING, GROWING + 1, LONGEST, LONGEST + 1])
def test_lengths_at_which_segments_grow(length, causal):
    check(inputs(length, 1, 2, 1), 1e-11, causal, walk=(None, torch.tensor([0, 700, length // 2]), False))


@pytest.mark.parametrize("q_length, length", [(0, 40), (40, 0), (1, SEGMENT + 1), (SEGMENT + 1, 1), (TILE - 1, TILE + 1), (SEGMENT, 2 * SEGMENT + 1)])
def test_the_lengths_of_q_and_k_may_differ(q_length, length):
    check(inputs(length, 2, per_group=2, q_length=q_length, rotary=False), 1e-12, False)


@both
@pytest.mark.parametrize("groups, per_group", [(1, 1), (8, 1), (9, 1), (5, 2), (3, 3), (2, 12)])
def test_groups_on_both_sides_of_a_block(groups, per_group, causal):
    """A task takes as many groups as fit 32 KiB: here 8 of one head, 4 of two, one of twelve."""
    check(inputs(SEGMENT + TILE + 1, groups, 4, 3, per_group=per_group), 1e-12, causal)


STARTS = [
    [*range(4)],
    [5],
    [TILE - 1],
    [TILE],
    [TILE + 1],
    [2 * TILE - 1, 2 * TILE + 1],
    [2 * TILE],
    [SEGMENT - 1],
    [SEGMENT],
    [SEGMENT + 1],
    [SEGMENT, 2 * SEGMENT],
    [SEGMENT - 1, SEGMENT + 1],
    [2 * SEGMENT - 1, 2 * SEGMENT, 2 * SEGMENT + 1],
    [2 * SEGMENT + 5],
    [2 * SEGMENT + 75],
    [*range(SEGMENT - 4, SEGMENT + 4)],
    [*range(0, 2 * SEGMENT + 76, 7)],
    [*range(0, 2 * SEGMENT + 76, TILE)],
]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("begins", STARTS, ids=lambda begins: f"{len(begins)}-from-{begins[0]}")
def test_causal_sums_begin_anew_at_every_start(begins, reverse):
    """`begins`: steps of the walk as it is walked."""
    length = 2 * SEGMENT + 76
    index = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    starts = torch.tensor(sorted(length - s for s in begins if s) if reverse else begins)
    check(inputs(length, 2, 4, 3, per_group=2), 1e-12, True, walk=(index, starts, reverse))
    check(inputs(length, 1, 3, 9, initial=False), 1e-12, True, walk=(None, starts, reverse), features=MAPS[2], with_state=False)


def test_walks_of_up_to_five_steps_with_any_starts():
    for length in range(1, 6):
        for count in range(length):
            for starts, reverse in itertools.product(itertools.combinations(range(1, length), count), (False, True)):
                check(inputs(length, 1, 2, 2), 1e-12, True, walk=(None, torch.tensor([0, *starts]), reverse), whole=reference.linear_attention)


@pytest.mark.parametrize("features", MAPS)
def test_the_reference_s_loop_over_two_segments(features):
    length = SEGMENT + TILE + 1
    walk = (torch.randperm(length), torch.tensor([0, 40, SEGMENT - 1, SEGMENT + 5]), True)
    check(inputs(length, 2, 4, 3, per_group=2), 1e-12, True, walk=walk, features=features, whole=reference.linear_attention)


def test_what_came_before_a_start_is_forgotten_even_if_not_a_number():
    """Forward, nothing of a NaN in k and v before the start; backward, nothing of one in dout behind it."""
    for begin in (TILE + 5, 2 * TILE, SEGMENT - 1, SEGMENT, SEGMENT + TILE + 3):
        tensors, options = inputs(2 * SEGMENT + 40, per_group=2), ("elu", True, True, 1.0, 1e-6)
        walk = (None, torch.tensor([0, begin]), False)
        out, kv, z = native.forward(*tensors, *options, *walk)
        dout = torch.ones_like(out)
        gradients = native.backward(dout, None, None, kv, z, *tensors, *options, *walk)
        dout[:, begin] = torch.nan
        spoilt = native.backward(dout, None, None, kv, z, *tensors, *options, *walk)
        assert all(torch.equal(a[:, :begin], b[:, :begin]) for a, b in zip(gradients[:3], spoilt[:3], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(gradients[3:], spoilt[3:], strict=True))
        tensors[1][:, begin - 1] = tensors[2][:, begin - 1] = torch.nan
        got = native.forward(*tensors, *options, *walk)
        assert torch.equal(got[0][:, begin:], out[:, begin:]) and torch.equal(got[1], kv) and torch.equal(got[2], z)


@both
def test_a_query_that_is_not_a_number_spoils_its_own_row_alone(causal):
    """Rows of an earlier tile lie behind a short one's tokens, where they are read and must not be used."""
    tensors, options = inputs(2 * TILE + 3), ("elu", causal, True, 1.0, 1e-6, None, None, False)
    want = native.forward(*tensors, *options)[0]
    tensors[0][:, TILE - 8 : TILE] = torch.nan
    got = native.forward(*tensors, *options)[0]
    assert got[:, TILE - 8 : TILE].isnan().all()
    assert torch.equal(got[:, : TILE - 8], want[:, : TILE - 8]) and torch.equal(got[:, TILE:], want[:, TILE:])


@both
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_storage_computes_in_float32(isa, dtype, tolerance, causal):
    check(inputs(90, 2, 20, 17, batch=2, per_group=2, dtype=dtype), tolerance, causal)


@both
def test_each_tensor_has_its_own_storage_and_strides(causal):
    """q, k and v of one tensor, k for all groups, an angle for all of them; then each in another type."""
    q, k, v = torch.randn(2, 75, 3, 4, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind(2)
    q, k, v = q[..., 1:7], k[:, :, 1:2, 1:7].expand(2, 75, 4, 6), v.flip(2)
    cos, sin, kv, z = inputs(75, dk=6, dv=11, batch=2)[3:]
    turn, state = [cos.expand(75, 4, 6), sin.expand(75, 4, 6)], [kv.expand(2, 4, 6, 11), z.expand(2, 4, 6)]
    check([q, k, v, *turn, *state], 1e-12, causal)
    check([q.half(), k.float(), v.bfloat16(), *(t.float() for t in turn), *(t.half() for t in state)], 8e-3, causal)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups, per_group", [(1, 1), (9, 1), (2, 2)])
def test_any_number_of_threads_gives_the_same_bits(groups, per_group, dtype, causal):
    tensors = inputs(5 * SEGMENT + 33, groups, 10, 9, per_group=per_group, dtype=dtype)
    walk = (None, torch.tensor([0, 40, SEGMENT, 3 * SEGMENT + 1]), True)
    every = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        every.append(results(tensors, ("elu", causal, True, 0.7, 1e-6), walk)[0])
    for other in every[1:]:
        assert all(torch.equal(a, b) for a, b in zip(every[0], other, strict=True))


@both
def test_large_results_are_written_past_the_caches_to_the_same_bits(causal):
    """Above 4 MiB, where every vector is a whole cache line: that of a batch, against its images one by one."""
    tensors = inputs(900, 2, 16, 32, batch=48, dtype=torch.float32)
    options = ("elu", causal, True, 0.7, 1e-6)
    outputs = native.forward(*tensors, *options, None, None, False)
    dout = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0))
    got = [*outputs, *native.backward(dout, None, None, *outputs[1:], *tensors, *options, None, None, False)]
    for i in (0, 20, 47):
        one = [t if j in (3, 4) else t[i : i + 1] for j, t in enumerate(tensors)]
        alone = native.forward(*one, *options, None, None, False)
        alone = [*alone, *native.backward(dout[i : i + 1], None, None, *alone[1:], *one, *options, None, None, False)]
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(got, alone, strict=True))
