"""selective_scan: the recurrence of Mamba over a sequence, or over a 2D image or 3D volume in any scan order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from medssm import dispatch
from medssm.kernels import native as library
from medssm.kernels.selective_scan import native, plan, reference
from medssm.ops import modes, walk
from medssm.ops.op import Draw, Op
from medssm.ops.shapes import Rules
from medssm.ops.walk import AnyOrder


def _example(draw: Draw, tokens: int, width: int) -> dict[str, Any]:
    u, z = (draw(2, tokens, width) for _ in range(2))
    B, C = (draw(2, tokens, 4) for _ in range(2))
    per_channel = {"A": -draw(width, 4).abs(), "D": draw(width), "delta_bias": draw(width), "delta_proj": draw(width, 2)}
    return {"u": u, "delta": draw(2, tokens, 2), "B": B, "C": C, "z": z, **per_channel, "initial_state": draw(2, width, 4), "delta_softplus": True}


_op = Op(
    "selective_scan",
    {
        "u": "b *l d",
        "delta": "b *l r",
        "A": "d n",
        "B": "b *l [g] n",
        "C": "b *l [g] n",
        "D?": "d",
        "z?": "b *l d",
        "delta_bias?": "d",
        "delta_proj?": "d r",
        "initial_state?": "b d n",
    },
    options={"delta_softplus": "bool"},
    out="b *l d",
    states={"state": "b d n"},
    saved=("checkpoints", lambda b, l, d, n, **_: (b, plan.chunks(l, n), n, d)),
    reference=reference.selective_scan,
    example=_example,
    operations=lambda b, l, d, n, r, **_: b * l * d * (6 * n + 4 + 2 * r),
    backends=("native", "triton", "cuda"),
    rules=Rules(within={"n": (1, 256)}, divides={"g": "d"}, without={"delta_proj": ("r", "d")}),
)


def selective_scan(
    u: Tensor,  # (b, l, d); with an Order (b, *spatial, d)
    delta: Tensor,  # (b, l, d), or (b, l, r) with delta_proj
    A: Tensor,  # (d, n)
    B: Tensor,  # (b, l, n) or (b, l, g, n)
    C: Tensor,  # (b, l, n) or (b, l, g, n)
    D: Tensor | None = None,  # (d,)
    z: Tensor | None = None,  # (b, l, d)
    delta_bias: Tensor | None = None,  # (d,)
    delta_softplus: bool = False,
    *,
    delta_proj: Tensor | None = None,  # (d, r)
    order: AnyOrder = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,  # (n + 1,)
    initial_state: Tensor | None = None,  # (b, d, n)
    return_final_state: bool = False,
    layout: str = "bld",
    backend: str | None = None,
) -> Tensor | Any:
    """Selective scan (Mamba's S6), along the walk p = order.index(spatial):

        s_t = delta_t + delta_bias, softplus(s_t) if delta_softplus
        h_t = exp(s_t A) h_{t-1} + s_t B_t u_t
        y_t = C_t . h_t + D u_t,    out_t = y_t silu(z_t)

    Args:
        u, delta, A: d channels, their steps and their rates; state n from 1 to 256.
        B, C: of g groups: channel j uses group j // (d // g).
        z: gates the output.
        delta_softplus: apply softplus to delta + delta_bias.
        delta_proj: delta is then low-rank and expanded inside the kernel: delta delta_proj^T, which is never stored.
        order: an Order, or a LongTensor (l,), a permutation: the token visited at each step. Outputs stay where their tokens are; where
            the order begins anew (order.starts), so does the state.
        reverse: walk the other way round.
        cu_seqlens: the tokens are packed sequences: (n + 1,) int32 or int64, 0 … l. Batch is 1; sequence i is the steps cu_seqlens[i] to
            cu_seqlens[i + 1] of the walk, each walked on its own. Initial and final states have n rows in place of b.
        initial_state: precedes the first step (zeros if None); differentiable.
        return_final_state: return (out, state), state (b, d, n) in float32 (float64 when computing in it), differentiable.
        layout: "bld", or mamba_ssm's "bdl": u, delta, z (b, d, l); B, C (b, n, l) or (b, g, n, l).
        backend: reference | native | triton | cuda | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out, u's shape and dtype, or (out, state). The recurrence runs in float32, in float64 if any input is; autocast never reaches it.

    Raises:
        ValueError: a wrong shape, dtype, device or order, or a backend that cannot serve. TypeError: what is no tensor.

    Source: Gu and Dao, Mamba, arXiv 2312.00752.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state)
    plain = order is None and initial_state is None and delta_proj is None and not return_final_state and layout == "bld"
    given = u is not None and delta is not None and A is not None and B is not None and C is not None
    if plain and given and dispatch.free(backend, "native") and not library.reason() and modes.direct(tensors):
        segments = None
        if cu_seqlens is not None and u.dim() == 3 and u.shape[0] == 1:
            segments = walk.packed_on_cpu(cu_seqlens, u.shape[1])
        if cu_seqlens is None or segments is not None:
            out = native.forward_usual(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, segments)
            if out is not None:
                return out
    options = {"delta_softplus": delta_softplus}
    return _op(
        *tensors,
        options=options,
        order=order,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
        return_final_state=return_final_state,
        layout=layout,
        backend=backend,
    )


def selective_scan_step(
    state: Tensor,  # (b, d, n)
    u: Tensor,  # (b, d)
    delta: Tensor,  # (b, d), or (b, r) with delta_proj
    A: Tensor,  # (d, n)
    B: Tensor,  # (b, n) or (b, g, n)
    C: Tensor,  # (b, n) or (b, g, n)
    D: Tensor | None = None,  # (d,)
    z: Tensor | None = None,  # (b, d)
    delta_bias: Tensor | None = None,  # (d,)
    delta_softplus: bool = False,
    *,
    delta_proj: Tensor | None = None,  # (d, r)
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `selective_scan`: (out (b, d), the new state). Stepping through a sequence equals scanning it."""
    tensors = (u, delta, A, B, C, D, z, delta_bias, delta_proj)
    return _op.step(state, *tensors, options={"delta_softplus": delta_softplus}, backend=backend)
