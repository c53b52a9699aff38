"""mamba_ssm's Mamba2 and Mamba2Simple."""

from __future__ import annotations

import contextlib
import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from medssm import nn as layers
from medssm import ops, orders
from medssm.integrations.mamba_ssm import states
from medssm.integrations.mamba_ssm.absent import refuse
from medssm.integrations.mamba_ssm.norm_gated import RMSNorm, rmsnorm_fn
from medssm.nn.blocks import causal
from medssm.nn.inner import weight_dtype
from medssm.ops import shapes


class Mamba2(layers.Mamba2):
    """mamba_ssm.Mamba2: medssm's, along one row-major scan, under upstream's arguments, attributes and weight names.

    Args:
        d_model to conv_bias: as medssm.nn.Mamba2. conv_init: conv1d.weight starts uniform within +-conv_init. d_ssm: None, or the inner channels.
        chunk_size, use_mem_eff_path, sequence_parallel: of no effect. layer_idx: key of the state that inference_params keeps.
        process_group: refused. device, dtype: of the weights; D stays in the default dtype.

    Input and output (b, l, d_model). Raises NotImplementedError for what is refused, ValueError as medssm.nn.Mamba2.
    """

    rmsnorm = True  # of a Mamba2Simple that upstream's code pickled, which does not say

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        inner = int(expand * d_model)
        refuse(process_group=process_group, d_ssm=None if d_ssm == inner else d_ssm)
        with contextlib.nullcontext() if device is None else torch.device(device):
            super().__init__(
                d_model,
                d_state,
                d_conv,
                expand,
                headdim,
                ngroups,
                A_init_range,
                D_has_hdim,
                rmsnorm,
                norm_before_gate,
                dt_min,
                dt_max,
                dt_init_floor,
                dt_limit,
                bias,
                conv_bias,
                orders=[orders.raster()],
            )
            if rmsnorm:  # upstream's module for the same norm, since upstream's code reads its attributes
                self.norm = RMSNorm(inner, group_size=inner // ngroups, norm_before_gate=norm_before_gate)
        for parameter in self.parameters(recurse=False):  # dt_bias, A_log and D
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        for part in self.children():
            part.to(dtype)
        for parameter in (self.dt_bias, self.A_log):
            parameter.data = parameter.data.to(dtype or parameter.dtype)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.d_model, self.d_conv, self.conv_init, self.expand = d_model, d_conv, conv_init, expand
        self.d_inner, self.d_ssm, self.nheads = inner, inner, inner // headdim
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate, self.activation, self.act = D_has_hdim, rmsnorm, norm_before_gate, "silu", nn.SiLU()
        self.chunk_size, self.use_mem_eff_path, self.layer_idx = chunk_size, use_mem_eff_path, layer_idx
        self.process_group, self.sequence_parallel, self.world_size, self.local_rank = None, sequence_parallel, 1, 0

    def forward(
        self, u: Tensor, seqlen: int | None = None, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, inference_params: Any = None
    ) -> Tensor:
        """(b, l, d_model), or (b l, d_model) with seqlen = l, -> the same. inference_params keeps the state from call to call, as in Mamba."""
        refuse(seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        x = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        out = super().forward(x) if inference_params is None else self._continue(x, inference_params)
        return out if seqlen is None else out.flatten(0, 1)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token, (b, 1, d_model) -> (out, conv_state, ssm_state), both updated in place; dt_limit holds here too.

        Stepping through a sequence equals the scan, its gradients too. Raises ValueError for another batch than the states'.
        """
        z, u, dt = self.in_proj(states.one_token(self, hidden_states, conv_state, ssm_state)).split(self.split, dim=-1)
        u = states.convolve(self.conv1d, u, conv_state)
        y, state = ops.ssd_step(states.before(ssm_state), *self._operands(u, dt), dt_limit=self.dt_limit)
        ssm_state.copy_(state)
        return self.out_proj(self._gate(y.flatten(-2), z)).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """(conv_state (b, inner + 2 groups d_state, d_conv), ssm_state (b, h, headdim, d_state)) of `step`, zeros: before the first token."""
        shapes, dtype = ((self.split[1], self.d_conv), (self.nheads, self.headdim, self.d_state)), dtype or weight_dtype(self.conv1d, self.A_log)
        return tuple(self.A_log.new_zeros((batch_size, *shape), dtype=dtype) for shape in shapes)

    def _continue(self, x: Tensor, inference_params: Any) -> Tensor:
        """The sequence's first part, or one more token, with the state that inference_params keeps for this layer."""
        conv_state, ssm_state = states.kept(self, x, inference_params)
        if inference_params.seqlen_offset > 0:
            return self.step(x, conv_state, ssm_state)[0]
        z, u, dt = self.in_proj(x).split(self.split, dim=-1)
        states.last_tokens(u, conv_state)
        y, state = ops.ssd(*self._operands(causal(self.conv1d, u), dt), dt_limit=self.dt_limit, return_final_state=True)
        ssm_state.copy_(state)
        return self.out_proj(self._gate(y.flatten(-2), z))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a whole model that upstream's code pickled, which carries upstream's attributes alone."""
        super().__setstate__(state)
        if "split" not in state:
            self.orders, self.split = [orders.raster()], (self.d_inner, self.d_inner + 2 * self.ngroups * self.d_state, self.nheads)
            if not self.rmsnorm:
                self.norm = None


class Mamba2Simple(Mamba2):
    """mamba_ssm's Mamba2Simple: Mamba2 with fewer arguments, other defaults, D per head and its norm behind the gate.

    use_mem_eff_path: as upstream, with groups (ngroups > 1) the norm is each group's own on that path, and of all inner channels without it.
    activation: "swish" or "silu", the same. learnable_init_states: refused. The rest as Mamba2.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        refuse(learnable_init_states=learnable_init_states)
        shapes.choice("activation", activation, ("swish", "silu"))
        super().__init__(
            d_model,
            d_state,
            d_conv,
            conv_init,
            expand,
            headdim,
            None,
            ngroups,
            A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            bias=bias,
            conv_bias=conv_bias,
            chunk_size=chunk_size,
            use_mem_eff_path=use_mem_eff_path,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
        )
        self.learnable_init_states, self.activation = False, activation
        cast(RMSNorm, self.norm).group_size = None

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(b, l, d_model) -> the same. seq_idx: refused."""
        return super().forward(u, seq_idx=seq_idx)

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        norm, size = cast(RMSNorm, self.norm), self.d_inner // self.ngroups if self.use_mem_eff_path else None
        return rmsnorm_fn(y, norm.weight, None, z, norm.eps, size, False)
