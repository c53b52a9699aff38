"""causal_conv1d.cpp_functions and causal_conv1d_cuda: the convolution's forward, backward and update, which hand-written autograd functions call.

A backward computes its forward again. What is given to be written to (out, dx, …) is written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medssm.integrations.mamba_ssm import convolution
from medssm.integrations.mamba_ssm.kernels import gradients


@torch.no_grad()
def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """The output of causal_conv1d_fn."""
    out: Any = convolution.causal_conv1d_fn(
        x, weight, bias, seq_idx, initial_states, final_states_out is not None, final_states_out, "silu" if silu_activation else None
    )
    return out if final_states_out is None else out[0]


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Any, ...]:
    """(dx, dweight, dbias, dinitial_states), None for what is not given; the last one comes whether or not it is asked for."""
    final = dfinal_states is not None

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None) -> Any:
        return convolution.causal_conv1d_fn(x, weight, bias, seq_idx, initial, final, None, "silu" if silu_activation else None)

    _, (found, dweight, dbias, dinitial) = gradients(
        forward, (x, weight, bias, initial_states), dout if dfinal_states is None else (dout, dfinal_states)
    )
    return found if dx is None else dx.copy_(found), dweight, dbias, dinitial


@torch.no_grad()
def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The output of causal_conv1d_update; conv_state is updated in place."""
    return convolution.causal_conv1d_update(x, conv_state, weight, bias, "silu" if silu_activation else None, cache_seqlens, conv_state_indices)


# causal_conv1d_cuda, whose arguments every release of causal_conv1d changed.


def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    """causal_conv1d_cuda.causal_conv1d_fwd -> out.

    rest: silu; or seq_idx, silu; or seq_idx, initial_states, final_states_out, silu; or seq_idx, initial_states, out, final_states_out, silu.
    """
    given = _named(
        rest,
        ("silu",),
        ("seq_idx", "silu"),
        ("seq_idx", "initial_states", "final_states_out", "silu"),
        ("seq_idx", "initial_states", "out", "final_states_out", "silu"),
    )
    found = causal_conv1d_fwd_function(
        x, weight, bias, given.get("seq_idx"), given.get("initial_states"), given.get("final_states_out"), given["silu"]
    )
    return given["out"].copy_(found) if "out" in given else found


def causal_conv1d_bwd(x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, *rest: Any) -> Any:
    """causal_conv1d_cuda.causal_conv1d_bwd -> (dx, dweight, dbias).

    rest: dx, silu; or seq_idx, dx, silu; or seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu, which returns
    dinitial_states (or None) too; or seq_idx, initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, silu, which only writes to them.
    """
    given = _named(
        rest,
        ("dx", "silu"),
        ("seq_idx", "dx", "silu"),
        ("seq_idx", "initial_states", "dfinal_states", "dx", "return_dinitial_states", "silu"),
        ("seq_idx", "initial_states", "dfinal_states", "dx", "dweight", "dbias", "dinitial_states", "silu"),
    )
    found = causal_conv1d_bwd_function(
        x, weight, bias, dout, given.get("seq_idx"), given.get("initial_states"), given.get("dfinal_states"), given["dx"], True, given["silu"]
    )
    if "dweight" not in given:
        return found if "initial_states" in given else found[:3]
    for name, gradient in zip(("dweight", "dbias", "dinitial_states"), found[1:], strict=True):
        if given[name] is not None and gradient is not None:
            given[name].copy_(gradient)
    return None


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """causal_conv1d_cuda.causal_conv1d_update -> out. rest: silu, cache_seqlens, conv_state_indices, the newest release with out before them."""
    out, rest = (rest[0], rest[1:]) if rest and isinstance(rest[0], Tensor) else (None, rest)
    found = causal_conv1d_update_function(x, conv_state, weight, bias, *rest)
    return found if out is None else out.copy_(found)


def _named(values: Sequence[Any], *forms: tuple[str, ...]) -> dict[str, Any]:
    """The values by name: which of causal_conv1d's versions is calling shows in their number."""
    for form in forms:
        if len(values) == len(form):
            return dict(zip(form, values, strict=True))
    raise TypeError(f"causal_conv1d_cuda: expected after the tensors {', or '.join(map(str, forms))}, got {len(values)} arguments")
