"""delta_rule: a matrix state that forgets a key's old value before it takes the new one, over a sequence, an image or a volume."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from medssm.kernels.delta_rule import reference
from medssm.ops.op import Draw, Op
from medssm.ops.shapes import Rules
from medssm.ops.walk import AnyOrder


def _example(draw: Draw, tokens: int, width: int) -> dict[str, Any]:
    k, a, c = (torch.nn.functional.normalize(draw(2, tokens, 2, width), dim=-1) for _ in range(3))
    return {
        "q": draw(2, tokens, 2, width),
        "k": k,
        "v": draw(2, tokens, 2, width - 1),
        "beta": torch.sigmoid(draw(2, tokens, 2)),
        "g": -draw(2, tokens, 2, width).abs(),
        "erase": 0.5 * a,
        "erase_out": c,
        "write": torch.sigmoid(draw(2, tokens, 2, width - 1)),
        "erase_first": True,
        "initial_state": draw(2, 2, width, width - 1),
    }


_op = Op(
    "delta_rule",
    {
        "q": "b *l h dk",
        "k": "b *l h dk",
        "v": "b *l h dv",
        "beta": "b *l h",
        "g?": "b *l h | b *l h dk",
        "erase?": "b *l h dk",
        "erase_out?": "b *l h dk",
        "write?": "b *l h | b *l h dv",
        "initial_state?": "b h dk dv",
    },
    options={"scale": "float", "erase_first": "bool"},
    defaults={"scale": lambda sizes: sizes["dk"] ** -0.5},
    out="b *l h dv",
    main="v",
    states={"state": "b h dk dv"},
    saved=("recalled", lambda b, l, h, dv, **_: (b, l, h, dv)),  # S'_t^T k_t; S'_t^T a_t in the general form
    reference=reference.delta_rule,
    example=_example,
    operations=lambda b, l, h, dk, dv: b * l * h * dv * (7 * dk + 2),
    rules=Rules(within={"dk": (1, math.inf)}),
)


def delta_rule(
    q: Tensor,  # (b, l, h, dk); with an Order (b, *spatial, h, dk)
    k: Tensor,  # (b, l, h, dk)
    v: Tensor,  # (b, l, h, dv)
    beta: Tensor,  # (b, l, h)
    *,
    g: Tensor | None = None,  # (b, l, h) or (b, l, h, dk)
    erase: Tensor | None = None,  # (b, l, h, dk)
    erase_out: Tensor | None = None,  # (b, l, h, dk)
    write: Tensor | None = None,  # (b, l, h) or (b, l, h, dv)
    erase_first: bool = False,
    scale: float | None = None,
    order: AnyOrder = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,  # (n + 1,)
    initial_state: Tensor | None = None,  # (b, h, dk, dv)
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | Any:
    """The delta rule along the walk p = order.index(spatial): a state S (dk, dv) per head, in which each token replaces the share beta of what
    is recalled for its key by its value:

        S'_t = Diag(exp(g_t)) S_{t-1}
        S_t = S'_t - c_t (S'_t^T a_t)^T + k_t (w_t * v_t)^T
        o_t = scale S_t^T q_t

    By default a = beta k, c = k and w = beta: S_t = S'_t + k_t (beta_t (v_t - S'_t^T k_t))^T. The rules of the literature are settings of it:

        DeltaNet            nothing more
        gated DeltaNet      g per head
        KDA                 g per key
        gated DeltaNet-2    g per key, erase = b * k, write = w
        Comba               g per head, erase = beta p
        RWKV-7              g = log w per key, beta = 1, erase = kappa, erase_out = a * kappa, erase_first

    Args:
        q, k, v: queries, keys and values of h heads. They are not normalised inside: the recurrence is stable for |k| at most 1 and beta in [0, 1].
        beta: how much of the old value each token replaces, where erase and write do not say it.
        g: the logarithm of the decay, at most 0, one for a head's state or one for each of its rows; None: no decay.
        erase: a, the key whose value is recalled and taken away; None: beta k.
        erase_out: c, the key from which it is taken away; None: k.
        write: w, how much of the new value is written, one for a token or one for each value channel; None: beta.
        erase_first: a meets S_{t-1}, before its decay, in place of S'_t. The gradient of a strong decay then has fewer digits.
        scale: of the output; None is dk**-0.5.
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

    Source: Yang et al., arXiv 2406.06484 (DeltaNet) and 2412.06464 (gated DeltaNet); Kimi Team, arXiv 2510.26692 (KDA); arXiv 2605.22791 (gated
    DeltaNet-2); Hu et al., arXiv 2506.02475 (Comba); Peng et al., arXiv 2503.14456 (RWKV-7).
    """
    return _op(
        *(q, k, v, beta, g, erase, erase_out, write, initial_state),
        options={"scale": scale, "erase_first": erase_first},
        order=order,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
        return_final_state=return_final_state,
        backend=backend,
    )


def delta_rule_step(
    state: Tensor,  # (b, h, dk, dv)
    q: Tensor,  # (b, h, dk)
    k: Tensor,  # (b, h, dk)
    v: Tensor,  # (b, h, dv)
    beta: Tensor,  # (b, h)
    *,
    g: Tensor | None = None,  # (b, h) or (b, h, dk)
    erase: Tensor | None = None,  # (b, h, dk)
    erase_out: Tensor | None = None,  # (b, h, dk)
    write: Tensor | None = None,  # (b, h) or (b, h, dv)
    erase_first: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `delta_rule`: (out (b, h, dv), the new state). Stepping through a sequence equals scanning it."""
    options = {"scale": scale, "erase_first": erase_first}
    return _op.step(state, q, k, v, beta, g, erase, erase_out, write, options=options, backend=backend)
