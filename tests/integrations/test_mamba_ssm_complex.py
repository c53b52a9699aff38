"""mamba_ssm's scan with complex rates (S4D) against the sum that solves its recurrence, gradients too."""

import pytest
import torch
from torch.nn import functional as F

b, d, n, length, groups = 2, 6, 3, 7, 2


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def solved(u, delta, A, B, C, reverse=False):
    """y_t = 2 Re sum over s <= t of C_t . exp(A (s_{s+1} + ... + s_t)) B_s s_s u_s, and the last state; B and C (b, d, n, l)."""
    if reverse:
        y, state = solved(*(t.flip(-1) for t in (u, delta)), A, *(t.flip(-1) for t in (B, C)))
        return y.flip(-1), state
    passed = delta.cumsum(-1)
    between = torch.exp(A[..., None, None] * (passed[:, :, None, :, None] - passed[:, :, None, None, :])).tril()
    h = torch.einsum("bdnts,bdns->bdnt", between, B * (delta * u).unsqueeze(2))
    return 2 * (C * h).sum(2).real, h[..., -1]


def per_channel(t):
    """B or C as mamba_ssm takes them, as (b, d, n, l)."""
    if t.is_complex():
        return t[None, :, :, None].expand(b, -1, -1, length)
    pairs = torch.view_as_complex(t.unflatten(-1, (length, 2)))
    return (pairs if pairs.dim() == 4 else pairs.unsqueeze(1)).repeat_interleave(d // (pairs.shape[1] if pairs.dim() == 4 else 1), 1)


def rates():
    return torch.complex(-torch.rand(d, n, dtype=torch.float64) - 0.1, torch.randn(d, n, dtype=torch.float64)).requires_grad_()


FORMS = {
    "constant": lambda: draw(d, n, dtype=torch.complex128),
    "token": lambda: draw(b, n, 2 * length),
    "group": lambda: draw(b, groups, n, 2 * length),
}


@pytest.mark.parametrize("B_form, C_form", [("constant", "token"), ("token", "constant"), ("group", "group"), ("token", "group")])
def test_scan_is_its_solution(installed, B_form, C_form):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

    u, z, D, bias = draw(b, d, length), draw(b, d, length), draw(d), draw(d)
    delta, A, B, C = draw(b, d, length), rates(), FORMS[B_form](), FORMS[C_form]()
    inputs = [u, delta, A, B, C, D, z, bias]
    want, want_state = solved(u, F.softplus(delta + bias[:, None]), A, per_channel(B), per_channel(C))
    want = (want + D[:, None] * u) * F.silu(z)
    weight, of_state = torch.randn_like(want), torch.randn_like(want_state)
    want_gradients = torch.autograd.grad((want * weight).sum() + (want_state * of_state).real.sum(), inputs)
    for function in (selective_scan_fn, selective_scan_ref):
        out, state = function(u, delta, A, B, C, D, z, bias, delta_softplus=True, return_last_state=True)
        torch.testing.assert_close((out, state), (want, want_state), rtol=1e-11, atol=1e-11)
        found = torch.autograd.grad((out * weight).sum() + (state * of_state).real.sum(), inputs)
        torch.testing.assert_close(found, want_gradients, rtol=1e-10, atol=1e-10)


def test_rates_without_an_imaginary_part_give_twice_the_real_scan(installed):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, A = (t.detach().half() for t in (draw(b, d, length), draw(b, d, length), draw(d, n)))
    B, C = (draw(b, n, length).detach() for _ in range(2))
    with_zeros = [torch.stack([t, torch.zeros_like(t)], -1).flatten(-2).half() for t in (B, C)]
    A = -A.float().abs()
    out, state = selective_scan_fn(u, delta, A.to(torch.complex64), *with_zeros, delta_softplus=True, return_last_state=True)
    want, want_state = selective_scan_fn(u.float(), delta, A, B.half(), C.half(), delta_softplus=True, return_last_state=True)
    assert (out.dtype, state.dtype) == (torch.float16, torch.complex64)
    torch.testing.assert_close(out.float(), 2 * want, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(state, want_state.to(torch.complex64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", ["B and C", "neither"])
def test_mixers_are_their_parts(installed, given):
    """mamba_inner_fn, without out_proj, and Vim's of both directions."""
    from mamba_ssm.ops.selective_scan_interface import bimamba_inner_fn, mamba_inner_fn, mamba_inner_fn_no_out_proj

    rank = 2
    xz, conv, conv_bias, delta_proj, out_proj = draw(b, 2 * d, length), draw(d, 1, 3), draw(d), draw(d, rank), draw(4, d)
    D, bias, A, A_b = draw(d), draw(d), rates(), rates()
    x_proj = draw(rank + (0 if given == "B and C" else 4 * n), d)
    B, C = (draw(d, n, dtype=torch.complex128) for _ in range(2)) if given == "B and C" else (None, None)
    u, z = xz.chunk(2, 1)
    u = F.silu(F.conv1d(F.pad(u, (2, 0)), conv, conv_bias, groups=d))
    rows = u.movedim(1, -1) @ x_proj.T
    delta = F.softplus((rows[..., :rank] @ delta_proj.T).movedim(-1, 1) + bias[:, None])
    if B is None:
        of_B, of_C = (
            torch.view_as_complex(t.unflatten(-1, (n, 2)).contiguous()).movedim(1, -1).unsqueeze(1).expand(-1, d, -1, -1)
            for t in rows[..., rank:].chunk(2, -1)
        )
    else:
        of_B, of_C = per_channel(B), per_channel(C)
    one, back = ((solved(u, delta, a, of_B, of_C, reverse)[0] + D[:, None] * u) * F.silu(z) for a, reverse in ((A, False), (A_b, True)))
    weights = (xz, conv, conv_bias, x_proj, delta_proj)
    rest = {"B": B, "C": C, "D": D, "delta_bias": bias}
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(mamba_inner_fn_no_out_proj(*weights, A, **rest), one, **close)
    torch.testing.assert_close(mamba_inner_fn(*weights, out_proj, None, A, **rest), one.movedim(1, -1) @ out_proj.T, **close)
    torch.testing.assert_close(bimamba_inner_fn(*weights, out_proj, None, A, A_b, **rest), (one + back).movedim(1, -1) @ out_proj.T, **close)


def test_what_does_not_fit_is_named(installed):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, A, B = draw(b, d, length), draw(b, d, length), rates(), draw(b, n, 2 * length)
    with pytest.raises(
        ValueError, match=r"B: expected complex \(6, 3\), or real \(2, 3, 14\) or \(2, g, 3, 14\) with g dividing 6.*got float64 \(2, 3, 7\)"
    ):
        selective_scan_fn(u, delta, A, B[..., :length], B)
    with pytest.raises(ValueError, match=r"C: expected .*got complex128 \(2, 3, 7\)"):
        selective_scan_fn(u, delta, A, B, torch.view_as_complex(B.unflatten(-1, (length, 2))))
    with pytest.raises(ValueError, match=r"delta: expected \(2, 6, 7\), got \(2, 6, 6\)"):
        selective_scan_fn(u, delta[..., 1:], A, B, B)
    with pytest.raises(ValueError, match=r"u: expected float32.*got complex128"):
        selective_scan_fn(u.to(torch.complex128), delta, A, B, B)
    with pytest.raises(ValueError, match=r"B: expected float32.*got complex128"):
        selective_scan_fn(u, delta, A.real, draw(d, n, dtype=torch.complex128), B[..., :length])
    import selective_scan_cuda

    with pytest.raises(ValueError, match=r"A: expected float32.*got complex128"):  # the compiled module itself is real only
        selective_scan_cuda.fwd(u, delta, A, B[..., :length], B[..., :length], None, None, None, False)


def test_no_tokens_give_no_output_and_a_state_of_zeros(installed):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    nothing = torch.zeros(b, d, 0)
    out, state = selective_scan_fn(nothing, nothing, rates(), *(torch.zeros(b, n, 0),) * 2, return_last_state=True)
    assert out.shape == (b, d, 0)
    assert torch.equal(state, torch.zeros(b, d, n, dtype=torch.complex128))
