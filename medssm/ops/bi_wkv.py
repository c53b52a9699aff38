"""bi_wkv: Vision-RWKV's bidirectional attention over a sequence, or over a 2D image or 3D volume in any scan order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from medssm.kernels.bi_wkv import reference
from medssm.ops import shapes
from medssm.ops.op import Draw, Op
from medssm.ops.walk import AnyOrder


def _example(draw: Draw, tokens: int, width: int) -> dict[str, Any]:
    return {"w": draw(width) / tokens, "u": draw(width), "k": draw(1, tokens, width), "v": draw(1, tokens, width), "mode": "upstream"}


_op = Op(
    "bi_wkv",
    {"w": "d", "u": "d", "k": "b *l d", "v": "b *l d"},
    options={"mode": "str"},
    out="b *l d",
    main="v",
    reference=reference.bi_wkv,
    example=_example,
    operations=lambda b, l, d: 14 * b * l * d,
    rules=shapes.Rules(first=("v",)),
)


def bi_wkv(
    w: Tensor,  # (d,)
    u: Tensor,  # (d,)
    k: Tensor,  # (b, l, d)
    v: Tensor,  # (b, l, d); with an Order (b, *spatial, d)
    *,
    mode: str = "exact",
    order: AnyOrder = None,
    cu_seqlens: Tensor | None = None,  # (n + 1,)
    backend: str | None = None,
) -> Tensor:
    """Bidirectional WKV along the walk p = order.index(spatial); t and i are steps of it:

        o_t = (sum_{i != t} e^{k_i - (|t-i|-1) w} v_i + e^{u+k_t} v_t) / (sum_{i != t} e^{k_i - (|t-i|-1) w} + e^{u+k_t})

    Args:
        w: (d,), how fast a token's weight falls with its distance; of any sign. Vision-RWKV passes its decay divided by the length, here and for u.
        u: (d,), a token's bonus for itself.
        k, v: (b, l, d); with an Order (b, *spatial, d).
        mode: "exact", the formula; "upstream", what the published CUDA kernels compute, for weights that were trained with them: they cut the walk
            into 32 chunks, and weights across a chunk's start fall one step too far (kernels/bi_wkv/reference.py has it term by term).
            Its denominator may come near zero where w times the chunk's length is not small: at 10 the reference in float32 keeps three digits of
            the outputs, and so does every kernel. The gradient is that of this function, eps and its shift taken for constants; the published
            backward kernels leave the extra step out of the gradients of k and v.
        order: an Order, or a LongTensor (l,), a permutation: the token at each step. Outputs stay where their tokens are; where the order
            begins anew (order.starts), so does the attention: tokens of different segments do not see each other, and each has chunks of its own.
        cu_seqlens: the tokens are packed sequences: (n + 1,) int32 or int64, 0 … l. Batch is 1; sequence i is the steps cu_seqlens[i] to
            cu_seqlens[i + 1] of the walk. Tokens of different sequences do not see each other.
        backend: reference | native | triton | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out, v's shape and dtype. The sums run in float32, in float64 if any input is, shifted by their largest exponent or nearly so: keys
        and decays of any size give finite numbers. Autocast never reaches the sums. Over 16,384 tokens, w and u scaled by the length, the CPU kernel
        in float32 is within 1e-5 of float64 in the outputs and 1e-4 in the gradients, relative to the largest. With a negative w weights grow to
        e^{|w| l}; where |w| l is in the hundreds, float32's gradients keep four or five digits, that of w three. With a bonus u of 20 and more an
        output is its own token's value, and of the differences that make the gradients of u and k float32 keeps one digit.

    Raises:
        ValueError: a wrong shape, dtype, device, mode or order, or a backend that cannot serve; TypeError: what is no tensor.

    Source: Duan et al., Vision-RWKV, arXiv 2403.02308, section 3.2.
    """
    shapes.choice("mode", mode, ("exact", "upstream"))
    out: Tensor = _op(w, u, k, v, options={"mode": mode}, order=order, cu_seqlens=cu_seqlens, backend=backend)
    return out
