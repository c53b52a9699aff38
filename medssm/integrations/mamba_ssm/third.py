"""mamba_ssm's Mamba3, and the functions of its kernels on medssm's op."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from medssm import nn as layers
from medssm import ops, orders
from medssm.integrations.mamba_ssm import states
from medssm.integrations.mamba_ssm.norm_gated import RMSNorm, rmsnorm_fn
from medssm.integrations.mamba_ssm.packing import packing
from medssm.nn.inner import weight_dtype
from medssm.nn.mamba3 import heavy_tail
from medssm.ops.ssd3 import State

heavy_tail_activation = heavy_tail


class Mamba3(layers.Mamba3):
    """mamba_ssm.Mamba3: medssm's, along one row-major scan, under upstream's arguments, attributes and weight names.

    Args:
        d_model to mimo_rank: as medssm.nn.Mamba3. layer_idx: key of the state that inference_params keeps. device, dtype: of the weights; dt_bias,
            B_bias and C_bias stay in float32, D and mimo_* in the default dtype.
        fuse_pregate_headwise_norm, chunk_size, dropout, n_layer, kwargs: of no effect.

    Input and output (b, l, d_model). Raises ValueError as medssm.nn.Mamba3.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        fuse_pregate_headwise_norm: bool = True,
        chunk_size: int = 64,
        dropout: float = 0.0,
        layer_idx: int | None = None,
        n_layer: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        with contextlib.nullcontext() if device is None else torch.device(device):
            super().__init__(
                *(d_model, d_state, expand, headdim, ngroups, rope_fraction, dt_min, dt_max, dt_init_floor, A_floor),
                *(is_outproj_norm, is_mimo, mimo_rank),
                orders=[orders.raster()],
            )
            # Upstream's modules for the same norms, since upstream's code reads their attributes.
            self.B_norm, self.C_norm = RMSNorm(d_state), RMSNorm(d_state)
            self.d_inner, self.nheads = self.split[0], self.split[4]
            if is_outproj_norm:
                self.norm = RMSNorm(self.d_inner, group_size=headdim, norm_before_gate=True)
        for parameter in (self.dt_bias, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        for part in self.children():
            part.to(dtype)
        for parameter in (self.dt_bias, self.B_bias, self.C_bias):
            parameter.data = parameter.data.float()
        self.d_model, self.expand, self.chunk_size, self.layer_idx = d_model, expand, chunk_size, layer_idx
        self.fuse_pregate_headwise_norm = fuse_pregate_headwise_norm and is_mimo and is_outproj_norm
        self.num_bc_heads, self.num_rope_angles = ngroups, self.split[7]
        self.rotary_dim_divisor, self.split_tensor_size = int(2 / rope_fraction), 2 * self.num_rope_angles

    def forward(self, u: Tensor, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, inference_params: Any = None) -> Tensor:
        """(b, l, d_model) -> the same.

        seq_idx (b, l), cu_seqlens (sequences + 1,) of a batch of 1: packed sequences, as in Mamba2. inference_params keeps the states from call to
        call, with cu_seqlens those of each sequence, so that the next call is a batch of one token of each.
        """
        kept = None
        if inference_params is not None:
            kept = states.kept(self, len(u) if cu_seqlens is None else len(cu_seqlens) - 1, inference_params)
            if inference_params.seqlen_offset > 0:
                return self.step(u, *kept)[0]
        pack = packing(seq_idx, cu_seqlens, u.shape[0], u.shape[1])
        operands, z = self._operands(u if pack is None else pack.flat(u))
        y = ops.ssd3(**operands, return_final_state=kept is not None, cu_seqlens=None if pack is None else pack.bounds)
        if kept is not None:
            y, last = y
            for state, new in zip(kept, last, strict=True):
                state.copy_(new if pack is None else pack.final(new))
        out = self._out(y, z)
        return out if pack is None else pack.back(out)

    def step(  # type: ignore[override]
        self, u: Tensor, angle_state: Tensor, ssm_state: Tensor, k_state: Tensor, v_state: Tensor, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """One token, (b, d_model) or (b, 1, d_model) -> (out of u's shape, the four states), which are updated in place.

        Stepping through a sequence equals the scan, its gradients too. Raises ValueError for another batch than the states'.
        """
        given = (angle_state, ssm_state, k_state, v_state)
        operands, z = self._operands(states.one_token(self, u if u.dim() == 3 else u.unsqueeze(1), *given))
        angle, ssm, k, v = map(states.before, given)
        y, last = ops.ssd3_step((angle, ssm, k, v), **operands)
        for state, new in zip(given, last, strict=True):
            state.copy_(new)
        return self._out(y, z).view_as(u), *given

    def allocate_inference_cache(  # type: ignore[override]
        self,
        batch_size: int,
        max_seqlen: int | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        inplace_state: Any = None,
        **kwargs: Any,
    ) -> State:
        """The states of `step`, zeros: before the first token. dtype: of k_state (b, r, h, n) and v_state (b, h, p); None is in_proj's."""
        found = super().allocate_inference_cache(batch_size, dtype or weight_dtype(self.in_proj, self.D))
        angle, ssm, k, v = (state if device is None else state.to(device) for state in found)
        return angle, ssm, k, v

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a whole model that upstream's code pickled, which carries upstream's attributes alone."""
        super().__setstate__(state)
        if "split" not in state:
            self.orders, self.ngroups, rows = [orders.raster()], self.num_bc_heads, self.mimo_rank * self.num_bc_heads * self.d_state
            self.split = (self.d_inner, self.d_inner, rows, rows, self.nheads, self.nheads, self.nheads, self.num_rope_angles)


def mamba3_siso_combined(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    Angles: Tensor,
    D: Tensor | None = None,
    Z: Tensor | None = None,
    Input_States: State | None = None,
    chunk_size: int = 64,
    return_final_states: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-3's recurrence of one rank, `medssm.ops.ssd3` under upstream's arguments.

    Args:
        Q, K: (b, l, g, n). V, Z: (b, l, h, p). ADT (the log of the decay), DT, Trap (a logit): (b, h, l). Q_bias, K_bias: (h, n). D: (h,).
        Angles: (b, l, h, a). Input_States: angle (b, h, a), S (b, h, p, n), k (b, h, n), v (b, h, p); with cu_seqlens (sequences, …).
        cu_seqlens: (sequences + 1,), of a batch of 1: each sequence on its own. chunk_size: of no effect.

    Returns out (b, l, h, p) in V's dtype, and where asked for the four states behind it, in float32.
    """
    initial = None
    if Input_States is not None:
        angle, S, k, v = Input_States
        initial = angle, S, k.unsqueeze(1), v
    operands = _operands(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D)
    out, (angle, S, k, v) = ops.ssd3(**operands, z=Z, cu_seqlens=cu_seqlens, initial_state=initial, return_final_state=True)
    return (out, angle, S, k.squeeze(1), v) if return_final_states else out


def mamba3_siso_step(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    Angles: Tensor,
    D: Tensor | None,
    Z: Tensor | None,
    Input_States: State,
) -> tuple[Tensor, State]:
    """One token of mamba3_siso_combined: tensors without the axis of tokens -> (out (b, h, p), the four states behind it)."""
    Q, K, V, Angles = (t.unsqueeze(1) for t in (Q, K, V, Angles))
    ADT, DT, Trap = (t.unsqueeze(-1) for t in (ADT, DT, Trap))
    gate = None if Z is None else Z.unsqueeze(1)
    found = mamba3_siso_combined(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, gate, Input_States, return_final_states=True)
    out, angle, S, k, v = found
    return out.squeeze(1), (angle, S, k, v)


def mamba3_mimo(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    MIMO_V: Tensor,
    MIMO_Z: Tensor | None,
    MIMO_Out: Tensor | None,
    Angles: Tensor,
    D: Tensor | None,
    Z: Tensor | None,
    chunk_size: int,
    rotary_dim_divisor: int,
    dtype: torch.dtype,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    fuse_pregate_headwise_rms_norm: bool = False,
    outproj_norm_weight: Tensor | None = None,
    outproj_norm_eps: float = 1e-5,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-3's recurrence of several ranks, `medssm.ops.ssd3` under upstream's arguments; channels i and i + n/2 turn together.

    Args:
        Q, K: (b, l, r, g, n). Q_bias, K_bias: (h, r, n). MIMO_V, MIMO_Z, MIMO_Out: (h, r, p). The others as in mamba3_siso_combined.
        fuse_pregate_headwise_rms_norm: an RMS norm of each head with outproj_norm_weight (h p) before the gate, which Z, MIMO_Z and MIMO_Out must
            be given for. chunk_size, rotary_dim_divisor, dtype: of no effect; as many pairs turn as there are Angles.

    Returns out (b, l, h, p) in V's dtype, (b, l, r, h, p) without MIMO_Out, and where asked for the four states: angle, S, k (b, r, h, n), v.
    """
    norm = fuse_pregate_headwise_rms_norm
    operands = _operands(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D) | {"mimo_x": MIMO_V, "pairs": "halves"}
    if not norm:
        operands |= {"mimo_o": MIMO_Out, "z": Z, "mimo_z": None if Z is None else MIMO_Z}
    out, last = ops.ssd3(**operands, cu_seqlens=cu_seqlens, return_final_state=True)
    if MIMO_V.shape[1] == 1 and (norm or MIMO_Out is None):
        out = out.unsqueeze(2)
    if norm:
        if Z is None or MIMO_Z is None or MIMO_Out is None or outproj_norm_weight is None:
            raise ValueError("Z: expected Z, MIMO_Z, MIMO_Out and outproj_norm_weight with fuse_pregate_headwise_rms_norm=True, got None for some")
        gate = Z.unsqueeze(2) * MIMO_Z.transpose(0, 1)
        out = rmsnorm_fn(out.flatten(-2), outproj_norm_weight.flatten(), None, gate.flatten(-2), outproj_norm_eps, V.shape[-1])
        out = (out.unflatten(-1, (-1, V.shape[-1])) * MIMO_Out.transpose(0, 1)).sum(2).to(V.dtype)
    return (out, *last) if return_state else out


def _operands(
    Q: Tensor, K: Tensor, V: Tensor, ADT: Tensor, DT: Tensor, Trap: Tensor, Q_bias: Tensor, K_bias: Tensor, Angles: Tensor, D: Tensor | None
) -> dict[str, Any]:
    """The tensors of ops.ssd3, tokens before heads."""
    log_decay, dt, trap = (t.transpose(1, 2) for t in (ADT, DT, Trap))
    A = log_decay / torch.where(dt == 0, 1, dt)
    return {"x": V, "dt": dt, "A": A, "B": K, "C": Q, "trap": trap, "angles": Angles, "D": D, "B_bias": K_bias, "C_bias": Q_bias}
