"""mamba_ssm's Mamba2 and Mamba2Simple."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medssm import nn as layers
from medssm import ops, orders
from medssm.integrations.mamba_ssm import states
from medssm.integrations.mamba_ssm.absent import refuse
from medssm.integrations.mamba_ssm.convolution import causal_conv1d_varlen_states
from medssm.integrations.mamba_ssm.norm_gated import RMSNorm, rmsnorm_fn
from medssm.integrations.mamba_ssm.packing import Packing, packing
from medssm.nn.blocks import causal
from medssm.nn.inner import weight_dtype
from medssm.ops import shapes


class Mamba2(layers.Mamba2):
    """mamba_ssm.Mamba2: medssm's, along one row-major scan, under upstream's arguments, attributes and weight names.

    Args:
        d_model to conv_bias: as medssm.nn.Mamba2. conv_init: conv1d.weight starts uniform within +-conv_init.
        d_ssm: how many of the inner channels are scanned, in heads of headdim; the rest are a gated MLP beside the scan. None scans all.
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
        scanned = inner if d_ssm is None else d_ssm
        refuse(process_group=process_group)
        if not 0 < scanned <= inner:
            raise ValueError(f"d_ssm: expected 1 to the {inner} inner channels, got {d_ssm}")
        with contextlib.nullcontext() if device is None else torch.device(device):
            super().__init__(
                d_model,
                d_state,
                d_conv,
                cast(float, Fraction(scanned, d_model)),
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
                self.norm = RMSNorm(scanned, group_size=scanned // ngroups, norm_before_gate=norm_before_gate)
            if scanned < inner:
                self.in_proj = nn.Linear(d_model, 2 * (inner - scanned) + sum(self.split), bias=bias)
                self.out_proj = nn.Linear(inner, d_model, bias=bias)
        for parameter in self.parameters(recurse=False):  # dt_bias, A_log and D
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        for part in self.children():
            part.to(dtype)
        for parameter in (self.dt_bias, self.A_log):
            parameter.data = parameter.data.to(dtype or parameter.dtype)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.d_model, self.d_conv, self.conv_init, self.expand = d_model, d_conv, conv_init, expand
        self.d_inner, self.d_ssm, self.nheads = inner, scanned, scanned // headdim
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate, self.activation, self.act = D_has_hdim, rmsnorm, norm_before_gate, "silu", nn.SiLU()
        self.chunk_size, self.use_mem_eff_path, self.layer_idx = chunk_size, use_mem_eff_path, layer_idx
        self.process_group, self.sequence_parallel, self.world_size, self.local_rank = None, sequence_parallel, 1, 0

    def forward(
        self, u: Tensor, seqlen: int | None = None, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, inference_params: Any = None
    ) -> Tensor:
        """(b, l, d_model), or (b l, d_model) with seqlen = l, -> the same.

        seq_idx (b, l), cu_seqlens (sequences + 1,) of a batch of 1: packed sequences, as in mamba_chunk_scan_combined. inference_params keeps the
        state from call to call, as in Mamba; with cu_seqlens one of each sequence, so that the next call is a batch of one token of each.
        """
        x = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        kept = None
        if inference_params is not None:
            kept = states.kept(self, len(x) if cu_seqlens is None else len(cu_seqlens) - 1, inference_params)
            if inference_params.seqlen_offset > 0:
                return self.step(u, *kept)[0]
        out = self._sequence(x, packing(seq_idx, cu_seqlens, x.shape[0], x.shape[1]), kept)
        return out if seqlen is None else out.flatten(0, 1)

    def _sequence(self, x: Tensor, pack: Packing | None, kept: tuple[Tensor, Tensor] | None) -> Tensor:
        """All tokens (b, l, d_model) at once; the states that are kept become those behind the last ones."""
        mlp, z, u, dt = self._projected(x)
        initial, bounds = self._initial_states(len(x)), None
        if pack is not None:
            bounds, u, dt, initial = pack.bounds, pack.flat(u), pack.flat(dt), pack.entering(initial)
        if kept is not None and pack is None:
            states.last_tokens(u, kept[0])
        elif kept is not None and pack is not None:
            kept[0].copy_(pack.final(causal_conv1d_varlen_states(u.squeeze(0), pack.bounds, self.d_conv)))
        u = causal(self.conv1d, u, cu_seqlens=bounds)
        y = ops.ssd(*self._operands(u, dt), dt_limit=self.dt_limit, initial_state=initial, return_final_state=kept is not None, cu_seqlens=bounds)
        if kept is not None:
            y, last = y
            kept[1].copy_(last if pack is None else pack.final(last))
        return self._out(mlp, y if pack is None else pack.back(y), z)

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """The MLP's two halves (the first is the gate), z, the convolution's channels and dt."""
        return self.in_proj(x).split((2 * (self.d_inner - self.split[0]), *self.split), dim=-1)

    def _out(self, mlp: Tensor, y: Tensor, z: Tensor) -> Tensor:
        y = self._gate(y.flatten(-2), z)
        if mlp.shape[-1]:
            gate, value = mlp.chunk(2, dim=-1)
            y = torch.cat([F.silu(gate) * value, y], dim=-1)
        out: Tensor = self.out_proj(y)
        return out

    def _initial_states(self, batch: int) -> Tensor | None:
        """The state before the first token, (b, h, headdim, d_state), None for zeros."""
        return None

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token, (b, 1, d_model) -> (out, conv_state, ssm_state), both updated in place; dt_limit holds here too.

        Stepping through a sequence equals the scan, its gradients too. Raises ValueError for another batch than the states'.
        """
        mlp, z, u, dt = self._projected(states.one_token(self, hidden_states, conv_state, ssm_state))
        u = states.convolve(self.conv1d, u, conv_state)
        y, state = ops.ssd_step(states.before(ssm_state), *self._operands(u, dt), dt_limit=self.dt_limit)
        ssm_state.copy_(state)
        return self._out(mlp, y, z).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """(conv_state (b, inner + 2 groups d_state, d_conv), ssm_state (b, h, headdim, d_state)) of `step`, zeros: before the first token."""
        shapes, dtype = ((self.split[1], self.d_conv), (self.nheads, self.headdim, self.d_state)), dtype or weight_dtype(self.conv1d, self.A_log)
        return tuple(self.A_log.new_zeros((batch_size, *shape), dtype=dtype) for shape in shapes)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a whole model that upstream's code pickled, which carries upstream's attributes alone."""
        super().__setstate__(state)
        if "split" not in state:
            scanned = self.nheads * self.headdim
            self.orders, self.split = [orders.raster()], (scanned, scanned + 2 * self.ngroups * self.d_state, self.nheads)
            if not self.rmsnorm:
                self.norm = None


class Mamba2Simple(Mamba2):
    """mamba_ssm's Mamba2Simple: Mamba2 with fewer arguments, other defaults, D per head and its norm behind the gate.

    use_mem_eff_path: as upstream, with groups (ngroups > 1) the norm is each group's own on that path, and of all inner channels without it.
    activation: "swish" or "silu", the same. learnable_init_states: a weight init_states (h, headdim, d_state), which starts as zeros, is the state
    before every row's first token. The rest as Mamba2.
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
        self.learnable_init_states, self.activation = learnable_init_states, activation
        if learnable_init_states:
            self.init_states = nn.Parameter(self.out_proj.weight.new_zeros(self.nheads, self.headdim, self.d_state))
            self.init_states._no_weight_decay = True  # type: ignore[attr-defined]
        cast(RMSNorm, self.norm).group_size = None

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(b, l, d_model) -> the same. seq_idx (b, l): packed sequences."""
        return super().forward(u, seq_idx=seq_idx)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """(conv_state, ssm_state) of `step` as in Mamba2, with the learnt state before the first token."""
        conv_state, ssm_state = super().allocate_inference_cache(batch_size, max_seqlen, dtype, **kwargs)
        initial = self._initial_states(batch_size)
        return conv_state, ssm_state if initial is None else ssm_state + initial

    def _initial_states(self, batch: int) -> Tensor | None:
        return self.init_states.expand(batch, -1, -1, -1) if self.learnable_init_states else None

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        norm, size = cast(RMSNorm, self.norm), self.d_inner // self.ngroups if self.use_mem_eff_path else None
        return rmsnorm_fn(y, norm.weight, None, z, norm.eps, size, False)
