"""ssd: the recurrence of Mamba-2 (state space duality) over a sequence, or over a 2D image or 3D volume in any scan order."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from medssm.kernels.ssd import reference
from medssm.ops.op import Draw, Op
from medssm.ops.shapes import Rules
from medssm.ops.walk import AnyOrder


def _example(draw: Draw, tokens: int, width: int) -> dict[str, Any]:
    B, C = (draw(2, tokens, 2, width) for _ in range(2))
    x, z = (draw(2, tokens, 4, width - 1) for _ in range(2))
    per_head = {"A": -draw(4).abs(), "D": draw(4), "dt_bias": draw(4), "dt_softplus": True, "dt_limit": (0.01, 2.0)}
    return {"x": x, "dt": draw(2, tokens, 4), "B": B, "C": C, "z": z, **per_head, "initial_state": draw(2, 4, width - 1, width)}


_op = Op(
    "ssd",
    {
        "x": "b *l h p",
        "dt": "b *l h",
        "A": "h",
        "B": "b *l g n",
        "C": "b *l g n",
        "D?": "h | h p",
        "z?": "b *l h p",
        "dt_bias?": "h",
        "initial_state?": "b h p n",
    },
    options={"dt_softplus": "bool", "low": "float", "high": "float"},
    out="b *l h p",
    states={"state": "b h p n"},
    saved=("y", lambda b, l, h, p, **_: (b, l, h, p)),  # the output before the gate, for the gradient of z
    saved_with="z",
    reference=reference.ssd,
    example=_example,
    operations=lambda b, l, h, p, n, **_: b * l * h * p * (5 * n + 3),
    rules=Rules(within={"n": (1, math.inf)}, divides={"g": "h"}),
)


def ssd(
    x: Tensor,  # (b, l, h, p); with an Order (b, *spatial, h, p)
    dt: Tensor,  # (b, l, h)
    A: Tensor,  # (h,)
    B: Tensor,  # (b, l, g, n)
    C: Tensor,  # (b, l, g, n)
    D: Tensor | None = None,  # (h,) or (h, p)
    z: Tensor | None = None,  # (b, l, h, p)
    dt_bias: Tensor | None = None,  # (h,)
    dt_softplus: bool = False,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    order: AnyOrder = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,  # (n + 1,)
    initial_state: Tensor | None = None,  # (b, h, p, n)
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | Any:
    """State space duality (Mamba-2): a matrix state per head, along the walk p = order.index(spatial):

        s_t = clamp(dt_t + dt_bias, *dt_limit), of softplus(dt_t + dt_bias) if dt_softplus
        S_t = exp(s_t A) S_{t-1} + s_t x_t B_t^T
        y_t = S_t C_t + D x_t,    out_t = y_t silu(z_t)

    Args:
        x, dt, A: h heads of size p, their steps and their rates.
        B, C: of g groups: head j uses group j // (h // g).
        z: gates the output; no norm inside.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: (low, high), what the step is clamped to; as upstream, the default makes a negative step 0. Its gradient is torch.clamp's.
        order: an Order, or a LongTensor (l,), a permutation: the token visited at each step. Outputs stay where their tokens are; where
            the order begins anew (order.starts), so does the state.
        reverse: walk the other way round.
        cu_seqlens: the tokens are packed sequences: (n + 1,) int32 or int64, 0 … l. Batch is 1; sequence i is the steps cu_seqlens[i] to
            cu_seqlens[i + 1] of the walk, each walked on its own. Initial and final states have n rows in place of b.
        initial_state: precedes the first step (zeros if None); differentiable.
        return_final_state: return (out, state), state (b, h, p, n) in float32 (float64 when computing in it), differentiable.
        backend: reference | native | triton | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out, x's shape and dtype, or (out, state). The recurrence runs in float32, in float64 if any input is; autocast never reaches it.

    Raises:
        ValueError: a wrong shape, dtype, device or order, or a backend that cannot serve. TypeError: what is no tensor.

    Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060.
    """
    tensors, options = (x, dt, A, B, C, D, z, dt_bias, initial_state), _options(dt_softplus, dt_limit)
    return _op(*tensors, options=options, order=order, reverse=reverse, cu_seqlens=cu_seqlens, return_final_state=return_final_state, backend=backend)


def ssd_step(
    state: Tensor,  # (b, h, p, n)
    x: Tensor,  # (b, h, p)
    dt: Tensor,  # (b, h)
    A: Tensor,  # (h,)
    B: Tensor,  # (b, g, n)
    C: Tensor,  # (b, g, n)
    D: Tensor | None = None,  # (h,) or (h, p)
    z: Tensor | None = None,  # (b, h, p)
    dt_bias: Tensor | None = None,  # (h,)
    dt_softplus: bool = False,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `ssd`: (out (b, h, p), the new state). Stepping through a sequence equals scanning it."""
    return _op.step(state, x, dt, A, B, C, D, z, dt_bias, options=_options(dt_softplus, dt_limit), backend=backend)


def _options(dt_softplus: bool, dt_limit: tuple[float, float]) -> dict[str, Any]:
    if not (isinstance(dt_limit, (tuple, list)) and len(dt_limit) == 2 and dt_limit[0] <= dt_limit[1]):
        raise ValueError(f"dt_limit: expected (low, high) with low at most high, got {dt_limit!r}")
    return {"dt_softplus": dt_softplus, "low": float(dt_limit[0]), "high": float(dt_limit[1])}
