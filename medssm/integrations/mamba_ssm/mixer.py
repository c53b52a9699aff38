"""mamba_ssm's Mamba with the arguments of its forks (Vim, SegMamba)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from medssm import nn as layers
from medssm import ops
from medssm.integrations.mamba_ssm import states
from medssm.kernels.dtypes import widened
from medssm.nn.blocks import causal
from medssm.nn.inner import weight_dtype
from medssm.orders import Order

_KINDS = {"none": layers.Mamba, "v1": layers.Mamba, "v2": layers.BiMamba, "v3": layers.TriMamba}


class Mamba(layers.Mamba):
    """mamba_ssm.Mamba, and Vim's and SegMamba's: medssm's Mamba, BiMamba ("v2") or TriMamba ("v3") under upstream's arguments and attributes.

    Args:
        d_model to bias: as medssm.nn.Mamba. device, dtype: of the weights; A_log and D stay in float32.
        bimamba_type: "none"; "v1", a reversed scan with its own A_b (Vim); "v2", two directions (Vim); "v3", three (SegMamba).
        nslices: of "v3", into how many slices the sequence falls. if_divide_out: of "v2", halve the sum. init_layer_scale: start of `gamma`, which
            scales the output (Vim). use_fast_path: of no effect. layer_idx: key of the state that inference_params keeps.

    Input and output (b, l, d_model). Weights as upstream. Each direction's step projection starts like the first one's.
    """

    # Also for a whole model that upstream's code pickled: it carries no more than its own version's attributes.
    bimamba_type, nslices, if_divide_out, init_layer_scale = "none", 5, False, None

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str = "none",
        nslices: int = 5,
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
    ) -> None:
        if bimamba_type not in _KINDS:
            raise ValueError(f"bimamba_type: expected {', '.join(map(repr, _KINDS))}, got {bimamba_type!r}")
        self.bimamba_type = bimamba_type  # before the weights, which are one set per direction
        with contextlib.nullcontext() if device is None else torch.device(device):
            super().__init__(d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias)
            if bimamba_type == "v1":
                self.A_b_log = nn.Parameter(self.A_log.detach().clone())
            gamma = None if init_layer_scale is None else nn.Parameter(init_layer_scale * torch.ones(d_model))
        for parameter in self.parameters(recurse=False):  # A_log and D of every direction
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        if gamma is not None:
            self.gamma = gamma
        for suffix in self.suffixes:
            getattr(self, f"dt_proj{suffix}").bias._no_reinit = True
        for projection in self.children():
            projection.to(dtype)
        self.d_conv, self.expand, self.d_inner = d_conv, expand, int(expand * d_model)
        self.use_fast_path, self.layer_idx, self.activation, self.act = use_fast_path, layer_idx, "silu", nn.SiLU()
        self.nslices, self.if_divide_out, self.init_layer_scale = nslices, if_divide_out, init_layer_scale

    @property
    def suffixes(self) -> tuple[str, ...]:  # type: ignore[override]
        return _KINDS[self.bimamba_type].suffixes

    @property
    def slices(self) -> int:
        return self.nslices

    @property
    def divide_out(self) -> bool:
        return self.if_divide_out

    def orders(self, x: Tensor) -> list[Order]:
        return _KINDS[self.bimamba_type].orders(self, x)

    def merge(self, y: Tensor) -> Tensor:
        return _KINDS[self.bimamba_type].merge(self, y)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:  # type: ignore[override]
        """(b, l, d_model) -> the same. inference_params, with key_value_memory_dict and seqlen_offset, keeps the state from call to call."""
        if inference_params is not None:
            out = self._continue(hidden_states, inference_params)
        elif self.bimamba_type == "v1":
            u, z = self.in_proj(hidden_states).chunk(2, dim=-1)
            operands = self._operands(causal(self.conv1d, u), z)
            back = {**operands, "A": -torch.exp(widened(self.A_b_log))}
            out = self.out_proj(ops.selective_scan(**operands) + ops.selective_scan(**back, reverse=True))
        else:
            out = super().forward(hidden_states)
        return out if self.init_layer_scale is None else out * self.gamma

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token, (b, 1, d_model) -> (out, conv_state (b, inner, d_conv), ssm_state (b, inner, d_state)), both updated in place.

        Stepping through a sequence equals the scan, its gradients too. Raises ValueError for another batch than the states'.
        """
        self._one_way()
        u, z = self.in_proj(states.one_token(self, hidden_states, conv_state, ssm_state)).chunk(2, dim=-1)
        u = states.convolve(self.conv1d, u, conv_state)
        y, state = ops.selective_scan_step(states.before(ssm_state), **self._operands(u, z))
        ssm_state.copy_(state)
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """(conv_state, ssm_state) of `step`, zeros: before the first token."""
        self._one_way()
        sizes = (self.conv1d, self.d_conv), (self.dt_proj, self.d_state)
        return tuple(self.A_log.new_zeros((batch_size, self.d_inner, n), dtype=dtype or weight_dtype(layer, self.A_log)) for layer, n in sizes)

    def _continue(self, x: Tensor, inference_params: Any) -> Tensor:
        """The sequence's first part, or one more token, with the state that inference_params keeps for this layer."""
        self._one_way()
        conv_state, ssm_state = states.kept(self, len(x), inference_params)
        if inference_params.seqlen_offset > 0:
            return self.step(x, conv_state, ssm_state)[0]
        u, z = self.in_proj(x).chunk(2, dim=-1)
        states.last_tokens(u, conv_state)
        y, state = ops.selective_scan(**self._operands(causal(self.conv1d, u), z), return_final_state=True)
        ssm_state.copy_(state)
        return self.out_proj(y)

    def _one_way(self) -> None:
        if self.bimamba_type != "none":
            raise ValueError(f"bimamba_type: expected 'none', since only a forward scan runs token by token, got {self.bimamba_type!r}")
