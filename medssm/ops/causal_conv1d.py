"""causal_conv1d: Mamba's short depthwise convolution over a sequence, or over a 2D image or 3D volume in any scan order."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from medssm.kernels.causal_conv1d import reference
from medssm.ops import shapes
from medssm.ops.op import Draw, Op
from medssm.ops.walk import AnyOrder

_WIDEST = 8  # taps that Triton's kernels unroll


def _example(draw: Draw, tokens: int, width: int) -> dict[str, Any]:
    tensors = {"x": draw(2, tokens, width), "weight": draw(width, 4), "bias": draw(width), "initial_state": draw(2, width, 3)}
    return {**tensors, "activation": "silu"}


def _narrow(weight: Tensor, **_: Tensor | None) -> str | None:
    return None if weight.shape[1] <= _WIDEST else f"it serves kernels of at most {_WIDEST} taps, got {weight.shape[1]}"


_op = Op(
    "causal_conv1d",
    {"x": "b *l d", "weight": "d w", "bias?": "d", "initial_state?": "b d taps"},
    options={"activation": "str?"},
    out="b *l d",
    states={"state": "b d taps"},
    states_like_main=True,
    reference=reference.causal_conv1d,
    example=_example,
    operations=lambda b, l, d, w, **_: 2 * b * l * d * w,
    backends=("native", "triton", "cuda"),
    limits={"triton": _narrow},
    rules=shapes.Rules(within={"w": (1, math.inf)}, derived={"taps": ("w", lambda w: w - 1)}),
)


def causal_conv1d(
    x: Tensor,  # (b, l, d); with an Order (b, *spatial, d)
    weight: Tensor,  # (d, w), any width w from 1
    bias: Tensor | None = None,  # (d,)
    activation: str | None = None,
    *,
    order: AnyOrder = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,  # (n + 1,)
    initial_state: Tensor | None = None,  # (b, d, w-1)
    return_final_state: bool = False,
    layout: str = "bld",
    backend: str | None = None,
) -> Tensor | Any:
    """Causal depthwise convolution along the walk p = order.index(spatial):

        y_t = act(bias + sum_{j=0}^{w-1} weight_j x_{p(t-w+1+j)})

    Args:
        x, weight, bias: d channels, w taps and a number for each.
        activation: None or "silu".
        order: an Order, or a LongTensor (l,), a permutation: the token visited at each step. Outputs stay where their tokens are; where
            the order begins anew (order.starts), so do the taps.
        reverse: walk the other way round.
        cu_seqlens: the tokens are packed sequences: (n + 1,) int32 or int64, 0 … l. Batch is 1; sequence i is the steps cu_seqlens[i] to
            cu_seqlens[i + 1] of the walk, each walked on its own. Initial and final states have n rows in place of b.
        initial_state: the tokens before the first step, oldest first (zeros if None); differentiable.
        return_final_state: return (out, state), state (b, d, w-1) in x's dtype: the tokens that the next step would see; differentiable.
        layout: "bld", or causal_conv1d's "bdl": x (b, d, l).
        backend: reference | native | triton | cuda | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out, x's shape and dtype, or (out, state). The sum runs in float32, in float64 if any input is; autocast never reaches it.

    Raises:
        ValueError: a wrong shape, dtype, device or order, or a backend that cannot serve. TypeError: what is no tensor.

    Source: Gu and Dao, Mamba, arXiv 2312.00752, section 3.4.
    """
    shapes.choice("activation", activation, (None, "silu"))
    tensors, options = (x, weight, bias, initial_state), {"activation": activation}
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


def causal_conv1d_step(
    state: Tensor,  # (b, d, w-1)
    x: Tensor,  # (b, d)
    weight: Tensor,  # (d, w)
    bias: Tensor | None = None,  # (d,)
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv1d`: (out (b, d), the new state). Stepping through a sequence equals convolving it."""
    shapes.choice("activation", activation, (None, "silu"))
    return _op.step(state, x, weight, bias, options={"activation": activation}, backend=backend)
