"""depthwise_conv: every channel convolved with its own small kernel, over a 1D sequence, a 2D image or a 3D volume."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from medssm.kernels.depthwise_conv import reference
from medssm.ops import shapes
from medssm.ops.op import Draw, Op


def _example(draw: Draw, tokens: int, width: int) -> dict[str, Any]:
    return {"x": draw(2, 4, 5, max(1, tokens // 20), width), "weight": draw(width, 3, 3, 3), "bias": draw(width), "activation": "silu"}


def _limit(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return None if x.dim() <= 5 else f"it serves up to three spatial axes, x has {x.dim() - 2}"


_op = Op(
    "depthwise_conv",
    {"x": "b *l d", "weight": "d *kernel", "bias?": "d"},
    options={"activation": "str?"},
    out="b *l d",
    reference=reference.depthwise_conv,
    example=_example,
    operations=lambda b, l, d, kernel: 2 * b * l * d * kernel,
    walk="none",
    backends=("native", "triton", "cuda"),
    limits={"native": _limit, "triton": _limit, "cuda": _limit},
)


def depthwise_conv(
    x: Tensor,  # (b, *spatial, d), one or more spatial axes
    weight: Tensor,  # (d, *kernel), one odd side per spatial axis
    bias: Tensor | None = None,  # (d,)
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Depthwise convolution (cross-correlation) with stride 1 and zero padding to the same size:

        y_p = act(bias + sum_o weight_o x_{p+o}),    o from -(side-1)/2 to (side-1)/2 along each axis

    Args:
        x, weight, bias: d channels, a kernel and a number for each.
        activation: None or "silu".
        backend: reference | native | triton | cuda | auto; None takes use_backend's or MEDSSM_BACKEND's choice.

    Returns:
        x's shape and dtype. The sum runs in float32, in float64 if any input is; autocast never reaches it.

    Raises:
        ValueError: a wrong shape, an even side, a wrong dtype or device, or a backend that cannot serve. TypeError: what is no tensor.
    """
    shapes.choice("activation", activation, (None, "silu"))
    sizes = _op.check((x, weight, bias))
    if len(sizes["*kernel"]) != len(sizes["*l"]):
        raise ValueError(f"weight: expected (d, *kernel) with {len(sizes['*l'])} sides, got {tuple(weight.shape)}")
    if any(side % 2 == 0 for side in sizes["*kernel"]):
        raise ValueError(f"weight: expected odd kernel sides, got {sizes['*kernel']}")
    out: Tensor = _op(x, weight, bias, options={"activation": activation}, sizes=sizes, backend=backend)
    return out
