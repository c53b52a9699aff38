"""selective_scan_nd: several selective scans through one image or volume, each in its own order, merged in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from medssm.kernels.selective_scan import plan, reference
from medssm.ops import shapes
from medssm.ops.op import Draw, Op
from medssm.orders import Order, cross2d


def _example(draw: Draw, tokens: int, width: int) -> dict[str, Any]:
    spatial = (2, 3, max(1, tokens // 3))
    x, z = (draw(*spatial, width) for _ in range(2))
    B, C = (draw(*spatial, 4, 4) for _ in range(2))
    per_order = {"A": -draw(4, width, 4).abs(), "D": draw(4, width), "delta_bias": draw(4, width), "delta_proj": draw(4, width, 2)}
    return {"x": x, "delta": draw(*spatial, 4, 2), "B": B, "C": C, "z": z, **per_order, "delta_softplus": True, "orders": cross2d()}


_op = Op(
    "selective_scan_nd",
    {
        "x": "b *l d | b *l k d",
        "delta": "b *l k r",
        "A": "k d n",
        "B": "b *l k [g] n",
        "C": "b *l k [g] n",
        "D?": "k d",
        "z?": "b *l d",
        "delta_bias?": "k d",
        "delta_proj?": "k d r",
    },
    options={"delta_softplus": "bool", "merge": "str"},
    out=lambda options: "b *l k d" if options["merge"] == "stack" else "b *l d",
    saved=("checkpoints", lambda b, l, d, k, n, **_: (b, k, plan.chunks(l, n), n, d)),
    reference=reference.selective_scan_nd,
    example=_example,
    operations=lambda b, l, d, k, n, r, **_: b * l * k * d * (6 * n + 4 + 2 * r),
    walk="many",
    kernels="selective_scan",
    suffix="_nd",
    backends=("native", "triton", "cuda"),
    rules=shapes.Rules(first=("delta", "A"), within={"n": (1, 256), "k": (1, 2**31)}, divides={"g": "d"}, without={"delta_proj": ("r", "d")}),
)


def selective_scan_nd(
    x: Tensor,  # (b, *spatial, d), or one per order (b, *spatial, k, d)
    delta: Tensor,  # (b, *spatial, k, d), or (b, *spatial, k, r) with delta_proj
    A: Tensor,  # (k, d, n)
    B: Tensor,  # (b, *spatial, k, n) or (b, *spatial, k, g, n)
    C: Tensor,  # (b, *spatial, k, n) or (b, *spatial, k, g, n)
    D: Tensor | None = None,  # (k, d)
    z: Tensor | None = None,  # (b, *spatial, d)
    delta_bias: Tensor | None = None,  # (k, d)
    delta_softplus: bool = False,
    *,
    delta_proj: Tensor | None = None,  # (k, d, r)
    orders: Iterable[Order],
    merge: str = "sum",
    backend: str | None = None,
) -> Tensor:
    """Scan x along every order in place, each with its own parameters, and merge: the core of VMamba's SS2D, in any dimension.

        y_k = selective_scan(x, delta_k, A_k, B_k, C_k, D_k, order=orders[k]),    out = merge_k(y_k) silu(z)

    Nothing is flipped, transposed or copied; the merge adds in float32 in list order.

    Args:
        x: shared by the orders, or one per order.
        delta, A, B, C, D, delta_bias, delta_softplus: as in `selective_scan`, of each order.
        z: gates after the merge (every slice of a stack).
        delta_proj: expands the low-rank delta inside the kernel.
        orders: k Orders.
        merge: "sum" | "mean" -> (b, *spatial, d); "stack" -> (b, *spatial, k, d).
        backend: reference | native | triton | cuda | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Raises:
        ValueError, TypeError: as `selective_scan` does.

    Source: Liu et al., VMamba, arXiv 2401.10166.
    """
    orders, tensors = list(orders), (x, delta, A, B, C, D, z, delta_bias, delta_proj)
    shapes.choice("merge", merge, ("sum", "mean", "stack"))
    sizes = _op.check(tensors)
    if len(orders) != sizes["k"]:
        raise ValueError(f"orders: expected {sizes['k']} orders, one per row of A {tuple(A.shape)}, got {len(orders)}")
    out: Tensor = _op(*tensors, options={"delta_softplus": delta_softplus, "merge": merge}, sizes=sizes, order=orders, backend=backend)
    return out
