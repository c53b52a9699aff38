"""The selective scan with complex rates (S4D), in PyTorch: no kernel computes with complex numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from medssm.kernels.autocast import without_autocast
from medssm.ops import shapes


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The scan of medssm.ops.selective_scan with complex A, B, C and states, a token at a time:

        s_t = delta_t + delta_bias, softplus(s_t) if delta_softplus
        h_t = exp(s_t A) h_{t-1} + s_t B_t u_t,    y_t = 2 Re(C_t . h_t) + D u_t,    out_t = y_t silu(z_t)

    Every state stands for itself and its complex conjugate, hence the 2.

    Args:
        u, delta, z: (b, d, l). A: (d, n). D, delta_bias: (d,).
        B, C: (d, n), complex; or, if they change with the token, real (b, n, 2 l) or (b, g, n, 2 l): each token's real part, then its imaginary part.
        reverse: from the last token to the first.

    Returns out (b, d, l) in u's dtype and the last state (b, d, n): complex128 if any input is in double precision, else complex64.
    """
    for name, given in {"u": u, "delta": delta, "D": D, "z": z, "delta_bias": delta_bias}.items():
        shapes.floating(name, given, optional=name not in ("u", "delta"))
    sizes = shapes.agree({"u": "b d l", "delta": "b d l", "A": "d n", "D?": "d", "z?": "b d l", "delta_bias?": "d"}, u, delta, A, D, z, delta_bias)
    double = any(t is not None and t.dtype in (torch.float64, torch.complex128) for t in (u, delta, A, B, C, D, z, delta_bias))
    real, kind = (torch.float64, torch.complex128) if double else (torch.float32, torch.complex64)
    with without_autocast(u.device):
        x, s, A = u.to(real), delta.to(real), A.to(kind)
        B_of, C_of = (_of_tokens(name, given, kind, sizes) for name, given in (("B", B), ("C", C)))
        if delta_bias is not None:
            s = s + delta_bias.to(real).unsqueeze(-1)
        if delta_softplus:
            s = F.softplus(s)
        h, steps = A.new_zeros(sizes["b"], *A.shape), range(sizes["l"])
        y = []
        for t in reversed(steps) if reverse else steps:
            h = torch.exp(s[..., t, None] * A) * h + (s[..., t] * x[..., t])[..., None] * B_of(t)
            y.append(2 * (C_of(t) * h).sum(-1).real)
        out = torch.stack(y[::-1] if reverse else y, -1) if y else torch.zeros_like(x)
        if D is not None:
            out = out + D.to(real).unsqueeze(-1) * x
        if z is not None:
            out = out * F.silu(z.to(real))
        return out.to(u.dtype), h


def _of_tokens(name: str, given: Tensor, kind: torch.dtype, sizes: shapes.Sizes) -> Callable[[int], Tensor]:
    """A function that gives B or C of a token: (1 or b, d, n)."""
    b, d, n, length = (sizes[axis] for axis in ("b", "d", "n", "l"))
    if given.is_complex() and given.shape == (d, n):
        constant = given.to(kind).unsqueeze(0)
        return lambda t: constant
    groups = given.shape[1] if given.dim() == 4 else 1
    if given.is_complex() or given.shape not in ((b, n, 2 * length), (b, groups, n, 2 * length)) or groups == 0 or d % groups:
        expected = f"complex ({d}, {n}), or real ({b}, {n}, {2 * length}) or ({b}, g, {n}, {2 * length}) with g dividing {d}"
        got = str(given.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected {expected}, as A is complex, got {got} {tuple(given.shape)}")
    pairs = given.to(kind.to_real()).reshape(b, groups, n, length, 2)
    tokens = torch.view_as_complex(pairs.contiguous()).unbind(-1)
    return lambda t: tokens[t].repeat_interleave(d // groups, dim=1)
