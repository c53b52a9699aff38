"""linear_attention: attention without the softmax, over all tokens or causal along any scan order, in linear time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from medssm.kernels.linear_attention import reference
from medssm.ops import shapes, walk
from medssm.ops.op import Draw, Op
from medssm.ops.walk import AnyOrder

_FEATURES = ("elu", "relu", None)


def _example(draw: Draw, tokens: int, width: int) -> dict[str, Any]:
    q, k, v = draw(2, tokens, 4, width), draw(2, tokens, 2, width), draw(2, tokens, 2, width - 1)
    return {"q": q, "k": k, "v": v, "initial_state": (draw(2, 2, width, width - 1), draw(2, 2, width).abs()), "scale": 0.5}


_op = Op(
    "linear_attention",
    {
        "q": "b *q h dk",
        "k": "b *l g dk",
        "v": "b *l g dv",
        "rotary:cos?!": "s g dk",
        "rotary:sin?!": "s g dk",
        "initial_state:initial_kv?": "b g dk dv",
        "initial_state:initial_k?": "b g dk",
    },
    options={"feature_map": "str?", "causal": "bool", "normalize": "bool", "scale": "float", "eps": "float"},
    out="b *q h dv",
    main="v",
    states={"kv": "b g dk dv", "z": "b g dk"},
    skips_state=False,
    saves_states=True,
    reference=reference.linear_attention,
    example=_example,
    operations=lambda b, q, l, h, g, dk, dv, **_: 2 * b * (l * g + q * h) * dk * (dv + 1),
    rules=shapes.Rules(divides={"g": "h"}),
)


def linear_attention(
    q: Tensor,  # (b, l, h, dk); with an Order (b, *spatial, h, dk)
    k: Tensor,  # (b, l, g, dk)
    v: Tensor,  # (b, l, g, dv)
    *,
    feature_map: str | Callable[[Tensor], Tensor] | None = "elu",
    rotary: tuple[Tensor, Tensor] | None = None,  # each (l, dk) or (l, g, dk)
    causal: bool = False,
    normalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-6,
    order: AnyOrder = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,  # (n + 1,)
    initial_state: tuple[Tensor, Tensor] | None = None,  # (b, g, dk, dv), (b, g, dk)
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | Any:
    """Linear attention. With q' = f(q), k' = f(k), f the feature map, and R the rotation of a token's position:

        kv = sum_s R_s k'_s v_s^T,    z = sum_s k'_s
        o_t = scale (R_t q'_t) kv / (q'_t . z + eps)

    The sums run over all tokens, or, causal, along the walk p = order.index(spatial) up to step t.

    Args:
        q: not causal, its length may differ from k's.
        k, v: of g groups that divide h (usually g = h): head j of q uses group j // (h // g).
        feature_map: "elu" (elu + 1), "relu", None (as they are), or a function, called on q and on k in PyTorch before everything else.
        rotary: (cos, sin), tokens in memory's order: the pair of channels (2i, 2i+1), taken as a complex number, turns by the angle whose cosine and
            sine stand, the same, at 2i and 2i+1. The numerator alone is rotated. Constants.
        causal: token t sees the tokens up to its own step alone.
        normalize: divide by q' . z + eps; without, eps plays no part.
        scale, eps: numbers.
        order: an Order, or a LongTensor (l,), a permutation: the token visited at each step; causal sums begin anew where order.starts says. Outputs
            stay where their tokens are. Without `causal`, order and reverse change nothing.
        reverse: walk the other way round.
        cu_seqlens: causal only; the tokens are packed sequences: (n + 1,) int32 or int64, 0 … l. Batch is 1; sequence i is the steps cu_seqlens[i] to
            cu_seqlens[i + 1] of the walk, each walked on its own. Initial and final states have n rows in place of b.
        initial_state: (kv, z), added before the first step; differentiable.
        return_final_state: return (out, (kv, z)), the sums after the last step, in float32 (float64 when computing in it), differentiable. A
            sequence cut in two, the state passed on, gives the same when causal; not causal, the state is the total, initial_state included.
        backend: reference | native | triton | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        out (b, l, h, dv), or (b, *spatial, h, dv), in v's dtype; or (out, state). The sums run in float32, in float64 if any input is; autocast never
        reaches them.

    Raises:
        ValueError: a wrong shape, dtype, device or order, or a backend that cannot serve. TypeError: what is no tensor.

    Source: Katharopoulos et al., arXiv 2006.16236, section 3; the rotation of the numerator alone: Han et al., arXiv 2405.16605, section 4.2.
    """
    if callable(feature_map):
        q, k, feature_map = feature_map(q), feature_map(k), None
    shapes.choice("feature_map", feature_map, _FEATURES)
    cos, sin = _pair("rotary", rotary, "(cos, sin)")
    kv, z = _pair("initial_state", initial_state, "(sum k' v^T, sum k')")
    sizes = _op.check((q, k, v, None, None, kv, z), order, cu_seqlens)
    if (causal or cos is not None) and sizes["*q"] != sizes["*l"]:
        raise ValueError(f"k: expected the tokens of q, {sizes['*q']}, got {sizes['*l']}")
    if cos is not None and sin is not None:
        cos, sin = _turns(cos, sizes), _turns(sin, sizes)
    if not causal:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens: expected causal=True with packed sequences, got causal=False")
        walk.parse(order, sizes["*l"])
        order, reverse = None, False
    tensors = (q, k, v, cos, sin, kv, z)
    options = {"feature_map": feature_map, "causal": causal, "normalize": normalize, "scale": float(scale), "eps": float(eps)}
    return _op(
        *tensors,
        options=options,
        sizes=sizes,
        order=order,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
        return_final_state=return_final_state,
        backend=backend,
    )


def linear_attention_step(
    state: tuple[Tensor, Tensor],  # (b, g, dk, dv), (b, g, dk)
    q: Tensor,  # (b, h, dk)
    k: Tensor,  # (b, g, dk)
    v: Tensor,  # (b, g, dv)
    *,
    feature_map: str | Callable[[Tensor], Tensor] | None = "elu",
    rotary: tuple[Tensor, Tensor] | None = None,  # each (dk,) or (g, dk)
    normalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One token of causal `linear_attention`: (out (b, h, dv), the new state). Stepping through a sequence equals causal attention over it."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        shapes.floating(name, t)
        if t.dim() != 3:
            raise ValueError(f"{name}: expected (b, h, d), got {tuple(t.shape)}")
    cos, sin = _pair("rotary", rotary, "(cos, sin)")
    turns = None if cos is None or sin is None else (cos.unsqueeze(0), sin.unsqueeze(0))
    q, k, v = (t.unsqueeze(1) for t in (q, k, v))
    options = {"feature_map": feature_map, "rotary": turns, "causal": True, "normalize": normalize, "scale": scale, "eps": eps}
    out, last = linear_attention(q, k, v, **options, initial_state=state, return_final_state=True, backend=backend)  # type: ignore[arg-type]
    return out.squeeze(1), last


def _pair(name: str, value: Any, form: str) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Both tensors of a pair, or twice None."""
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(t, Tensor) for t in value):
        raise TypeError(f"{name}: expected a pair of tensors {form}, got {type(value).__name__}")
    return value[0], value[1]


def _turns(t: Tensor, sizes: shapes.Sizes) -> Tensor:
    """Cosines or sines (l, dk), (*spatial, dk), or with g before dk, as (l, g, dk)."""
    spatial, groups, dk = sizes["*l"], sizes["g"], sizes["dk"]
    length = math.prod(spatial)
    shared, own = ((length, dk), (*spatial, dk)), ((length, groups, dk), (*spatial, groups, dk))
    if tuple(t.shape) not in (*shared, *own):
        raise ValueError(f"rotary: expected {' or '.join(str(form) for form in dict.fromkeys((*shared, *own)))}, got {tuple(t.shape)}")
    if dk % 2:
        raise ValueError(f"rotary: expected an even number of channels to pair, got dk = {dk}")
    if t.requires_grad:
        raise ValueError("rotary: expected constants, got tensors that require a gradient")
    return t.reshape(length, 1 if tuple(t.shape) in shared else groups, dk).expand(length, groups, dk)
