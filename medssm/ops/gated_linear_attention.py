"""gated_linear_attention: linear attention whose state decays, over a sequence, or over a 2D image or 3D volume in any scan order."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from medssm.kernels.gated_linear_attention import reference
from medssm.ops.op import Draw, Op
from medssm.ops.shapes import Rules
from medssm.ops.walk import AnyOrder


def _example(draw: Draw, tokens: int, width: int) -> dict[str, Any]:
    q, k, g = (draw(2, tokens, 3, width) for _ in range(3))
    return {"q": q, "k": k, "v": draw(2, tokens, 3, width - 1), "g": -g.abs(), "initial_state": draw(2, 3, width, width - 1)}


_op = Op(
    "gated_linear_attention",
    {"q": "b *l h dk", "k": "b *l h dk", "v": "b *l h dv", "g": "b *l h | b *l h dk", "initial_state?": "b h dk dv"},
    options={"scale": "float"},
    defaults={"scale": lambda sizes: sizes["dk"] ** -0.5},
    out="b *l h dv",
    main="v",
    states={"state": "b h dk dv"},
    reference=reference.gated_linear_attention,
    example=_example,
    operations=lambda b, l, h, dk, dv: 5 * b * l * h * dk * dv,
    rules=Rules(within={"dk": (1, math.inf)}),
)


def gated_linear_attention(
    q: Tensor,  # (b, l, h, dk); with an Order (b, *spatial, h, dk)
    k: Tensor,  # (b, l, h, dk)
    v: Tensor,  # (b, l, h, dv)
    g: Tensor,  # (b, l, h) or (b, l, h, dk)
    *,
    scale: float | None = None,
    order: AnyOrder = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,  # (n + 1,)
    initial_state: Tensor | None = None,  # (b, h, dk, dv)
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | Any:
    """Gated linear attention along the walk p = order.index(spatial):

        S_t = exp(g_t) S_{t-1} + k_t v_t^T
        o_t = scale q_t S_t

    Args:
        q, k, v: queries, keys and values of h heads.
        g: the logarithm of the decay, at most 0: one for a head's state (retention, simple gated linear attention), or one for each of its rows.
        scale: a number; None is dk**-0.5.
        order: an Order, or a LongTensor (l,), a permutation: the token visited at each step. Outputs stay where their tokens are; where
            the order begins anew (order.starts), so does the state.
        reverse: walk the other way round.
        cu_seqlens: the tokens are packed sequences: (n + 1,) int32 or int64, 0 … l. Batch is 1; sequence i is the steps cu_seqlens[i] to
            cu_seqlens[i + 1] of the walk, each walked on its own. Initial and final states have n rows in place of b.
        initial_state: precedes the first step (zeros if None); differentiable.
        return_final_state: return (out, state), state (b, h, dk, dv) in float32 (float64 when computing in it), differentiable.
        backend: reference | native | triton | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out, v's shape and dtype, or (out, state). The recurrence runs in float32, in float64 if any input is; autocast never reaches it.

    Raises:
        ValueError: a wrong shape, dtype, device or order, or a backend that cannot serve. TypeError: what is no tensor.

    Source: Yang et al., Gated Linear Attention Transformers, arXiv 2312.06635; Sun et al., Retentive Network, arXiv 2307.08621.
    """
    tensors, options = (q, k, v, g, initial_state), {"scale": scale}
    return _op(*tensors, options=options, order=order, reverse=reverse, cu_seqlens=cu_seqlens, return_final_state=return_final_state, backend=backend)


def gated_linear_attention_step(
    state: Tensor,  # (b, h, dk, dv)
    q: Tensor,  # (b, h, dk)
    k: Tensor,  # (b, h, dk)
    v: Tensor,  # (b, h, dv)
    g: Tensor,  # (b, h) or (b, h, dk)
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `gated_linear_attention`: (out (b, h, dv), the new state). Stepping through a sequence equals scanning it."""
    return _op.step(state, q, k, v, g, options={"scale": scale}, backend=backend)
