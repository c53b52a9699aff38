"""ssd3: the recurrence of Mamba-3 over a sequence, or over a 2D image or 3D volume in any scan order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from medssm.kernels.ssd3 import reference
from medssm.ops import shapes
from medssm.ops.op import Draw, Op
from medssm.ops.walk import AnyOrder

State = tuple[Tensor, Tensor, Tensor, Tensor]
_PAIRS = ("adjacent", "halves")


def _example(draw: Draw, tokens: int, width: int) -> dict[str, Any]:
    width += width % 2
    angles = width // 4 + 1
    B, C = (draw(2, tokens, 2, 2, width) for _ in range(2))
    x, z = (draw(2, tokens, 4, width - 1) for _ in range(2))
    per_head = {"D": draw(4), "B_bias": draw(4, 2, width), "C_bias": draw(4, 2, width)}
    return {
        **{"x": x, "dt": torch.sigmoid(draw(2, tokens, 4)), "A": -draw(2, tokens, 4).abs(), "B": B, "C": C},
        **{"trap": draw(2, tokens, 4), "angles": draw(2, tokens, 4, angles), "z": z, **per_head},
        **{name: draw(4, 2, width - 1) for name in ("mimo_x", "mimo_z", "mimo_o")},
        "initial_state": (draw(2, 4, angles), draw(2, 4, width - 1, width), draw(2, 2, 4, width), draw(2, 4, width - 1)),
    }


_op = Op(
    "ssd3",
    {
        "x": "b *l h p",
        "dt": "b *l h",
        "A": "b *l h",
        "B": "b *l [r] g n",
        "C": "b *l [r] g n",
        "trap": "b *l h",
        "angles": "b *l h a | b *l a",
        "D?": "h",
        "z?": "b *l h p",
        "B_bias?": "h [r] n",
        "C_bias?": "h [r] n",
        "mimo_x?": "h r p",
        "mimo_z?": "h r p",
        "mimo_o?": "h r p",
        "initial_state:initial_angle?": "b h a",
        "initial_state:initial_state?": "b h p n",
        "initial_state:initial_k?": "b [r] h n",
        "initial_state:initial_v?": "b h p",
    },
    options={"pairs": "str", "per_rank": "bool"},
    out=lambda options: "b *l r h p" if options["per_rank"] else "b *l h p",
    states={"angle": "b h a", "state": "b h p n", "k": "b r h n", "v": "b h p"},
    saved=("y", lambda b, l, r, h, p, **_: (b, l, r, h, p)),  # the output of each rank before the gate
    reference=reference.ssd3,
    example=_example,
    operations=lambda b, l, h, p, n, r, a, **_: b * l * r * h * (5 * n * p + 2 * r * (n + p) + 12 * a),
    rules=shapes.Rules(within={"n": (1, math.inf)}, divides={"g": "h"}),
)


def ssd3(
    x: Tensor,  # (b, l, h, p); with an Order (b, *spatial, h, p)
    dt: Tensor,  # (b, l, h)
    A: Tensor,  # (b, l, h)
    B: Tensor,  # (b, l, g, n) or (b, l, r, g, n)
    C: Tensor,  # (b, l, g, n) or (b, l, r, g, n)
    trap: Tensor,  # (b, l, h)
    angles: Tensor,  # (b, l, h, a) or (b, l, a)
    D: Tensor | None = None,  # (h,)
    z: Tensor | None = None,  # (b, l, h, p)
    *,
    B_bias: Tensor | None = None,  # (h, n) or (h, r, n)
    C_bias: Tensor | None = None,  # (h, n) or (h, r, n)
    mimo_x: Tensor | None = None,  # (h, r, p)
    mimo_z: Tensor | None = None,  # (h, r, p)
    mimo_o: Tensor | None = None,  # (h, r, p)
    pairs: str = "adjacent",
    order: AnyOrder = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,  # (n + 1,)
    initial_state: State | None = None,  # (b, h, a), (b, h, p, n), (b, r, h, n), (b, h, p)
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | Any:
    """State space duality with the trapezoidal rule and rotations (Mamba-3): a matrix state per head, along the walk p = order.index(spatial):

        w_t = w_{t-1} + pi tanh(angles_t) dt_t
        k_t = R(w_t) (B_t + B_bias),    q_t = R(w_t) (C_t + C_bias)
        a_t = exp(dt_t A_t),    m_t = sigmoid(trap_t)
        S_t = a_t S_{t-1} + (1 - m_t) dt_t a_t x_{t-1} k_{t-1}^T + m_t dt_t x_t k_t^T
        y_t = S_t q_t + D x_t,    out_t = y_t silu(z_t)

    R(w) turns each of the first a pairs of channels by its angle. Of rank r (MIMO) every token has r keys and queries: mimo_x_r x_t stands in the
    place of x_t, S sums over the ranks, and out_t = sum_r mimo_o_r y_rt silu(mimo_z_r z_t).

    Args:
        x, dt, A: h heads of size p, the steps (at least 0) and rates (at most 0) of their tokens.
        B, C: of r ranks and g groups: head j uses group j // (h // g).
        trap: how much of a step's input counts at its end, as a logit.
        angles: how fast the pairs turn, before tanh: for every head, or shared.
        D, z: the skip weight of a head, and the gate.
        B_bias, C_bias: of each head.
        mimo_x, mimo_z, mimo_o: weights of the ranks; None is 1 for each of them. Without mimo_o several ranks are not summed: out (b, l, r, h, p).
        pairs: which channels turn together: "adjacent", 2i and 2i+1; "halves", i and i + n/2.
        order: an Order, or a LongTensor (l,), a permutation: the token visited at each step. Outputs stay where their tokens are; where
            the order begins anew (order.starts), so does the state.
        reverse: walk the other way round.
        cu_seqlens: the tokens are packed sequences: (n + 1,) int32 or int64, 0 … l. Batch is 1; sequence i is the steps cu_seqlens[i] to
            cu_seqlens[i + 1] of the walk, each walked on its own. Initial and final states have n rows in place of b.
        initial_state: (w, S, k, x) after the token before the first step (zeros if None); differentiable.
        return_final_state: return (out, state), state (w, S, k, x) after the last step, w from 0 to 2 pi, in float32 (float64 when computing in it),
            differentiable.
        backend: reference | native | triton | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out, x's shape and dtype, or (out, state). The recurrence runs in float32, in float64 if any input is; autocast never reaches it. Of one rank
        with adjacent pairs the CPU has a kernel of its own. Otherwise the kernels are gated linear attention's: q and k, turned beforehand, take
        memory for 2 b l r h n numbers, and in backward their gradients for as many.

    Raises:
        ValueError: a wrong shape, dtype, device or order, or a backend that cannot serve. TypeError: what is no tensor.

    Source: Lahoti et al., Mamba-3, arXiv 2603.15569.
    """
    shapes.choice("pairs", pairs, _PAIRS)
    weights = (mimo_x, mimo_z, mimo_o)
    tensors = (x, dt, A, B, C, trap, angles, D, z, B_bias, C_bias, *weights, *_states(initial_state))
    sizes = _op.check(tensors, order, cu_seqlens)
    if 2 * sizes["a"] > sizes["n"] or (pairs == "halves" and sizes["n"] % 2):
        raise ValueError(f"angles: expected at most n / 2 of them, with n = {sizes['n']} channels in {pairs} pairs, got {sizes['a']}")
    if mimo_z is not None and z is None:
        raise ValueError("mimo_z: expected None without z, got a tensor")
    return _op(
        *tensors,
        options={"pairs": pairs, "per_rank": sizes["r"] > 1 and mimo_o is None},
        sizes=sizes,
        order=order,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
        return_final_state=return_final_state,
        backend=backend,
    )


def ssd3_step(
    state: State,  # (b, h, a), (b, h, p, n), (b, r, h, n), (b, h, p)
    x: Tensor,  # (b, h, p)
    dt: Tensor,  # (b, h)
    A: Tensor,  # (b, h)
    B: Tensor,  # (b, g, n) or (b, r, g, n)
    C: Tensor,  # (b, g, n) or (b, r, g, n)
    trap: Tensor,  # (b, h)
    angles: Tensor,  # (b, h, a) or (b, a)
    D: Tensor | None = None,  # (h,)
    z: Tensor | None = None,  # (b, h, p)
    *,
    B_bias: Tensor | None = None,  # (h, n) or (h, r, n)
    C_bias: Tensor | None = None,  # (h, n) or (h, r, n)
    mimo_x: Tensor | None = None,  # (h, r, p)
    mimo_z: Tensor | None = None,  # (h, r, p)
    mimo_o: Tensor | None = None,  # (h, r, p)
    pairs: str = "adjacent",
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """One token of `ssd3`: (out (b, h, p), the new state). Stepping through a sequence equals scanning it."""
    shapes.floating("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected (b, h, p), got {tuple(x.shape)}")
    x, dt, A, B, C, trap, angles = (t.unsqueeze(1) if isinstance(t, Tensor) else t for t in (x, dt, A, B, C, trap, angles))
    weights: dict[str, Any] = {"B_bias": B_bias, "C_bias": C_bias, "mimo_x": mimo_x, "mimo_z": mimo_z, "mimo_o": mimo_o, "pairs": pairs}
    gate = None if z is None else z.unsqueeze(1)
    out, last = ssd3(x, dt, A, B, C, trap, angles, D, gate, **weights, initial_state=state, return_final_state=True, backend=backend)
    return out.squeeze(1), last


def _states(given: Any) -> tuple[Tensor | None, ...]:
    """The four states, or four times None."""
    if given is None:
        return (None,) * 4
    if not isinstance(given, (tuple, list)) or len(given) != 4 or not all(isinstance(t, Tensor) for t in given):
        raise TypeError(f"initial_state: expected four tensors (w, S, k, x), got {type(given).__name__}")
    return tuple(given)
