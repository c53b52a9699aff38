"""mamba_ssm's Block and create_block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medssm.integrations.mamba_ssm import norm
from medssm.integrations.mamba_ssm.mixer import Mamba
from medssm.integrations.mamba_ssm.second import Mamba2
from medssm.ops import shapes

_LAYERS = {"Mamba1": Mamba, "Mamba2": Mamba2}


class Block(nn.Module):
    """mamba_ssm's residual block: (x, residual) -> (mixer(norm(x + residual)), x + residual), and likewise an mlp behind it.

    Args:
        dim: channels. mixer_cls, mlp_cls, norm_cls: made with dim; an mlp_cls of nn.Identity leaves the mlp out.
        fused_add_norm: round the sum only once, by layer_norm_fn. residual_in_fp32: keep the sum in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[..., nn.Module],
        mlp_cls: Callable[..., nn.Module] = nn.Identity,
        norm_cls: Callable[..., nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.layer_idx: int | None = None
        self.norm = norm_cls(dim)
        self.mixer: Any = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None, **mixer_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(b, l, dim) and the residual of that shape, None before the first block -> both after this one."""
        x, residual = self._add_norm(self.norm, hidden_states, residual)
        x = self.mixer(x, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            x, residual = self._add_norm(self.norm2, x, residual)
            x = self.mlp(x)
        return x, residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int | None, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        """The mixer's."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def _add_norm(self, layer: Any, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            x, residual = norm.layer_norm_fn(
                x,
                layer.weight,
                layer.bias,
                residual,
                eps=layer.eps,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
                is_rms_norm=isinstance(layer, norm.RMSNorm),
            )
            return x, residual
        residual = x if residual is None else x + residual
        x = layer(residual.to(layer.weight.dtype))
        return x, residual.float() if self.residual_in_fp32 else residual


def create_block(
    d_model: int,
    d_intermediate: int | Mapping[str, Any] = 0,
    ssm_cfg: Mapping[str, Any] | None = None,
    attn_layer_idx: Sequence[int] | None = None,
    attn_cfg: Mapping[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """A Block of Mamba or Mamba2 with a layer or RMS norm.

    ssm_cfg: the mixer's arguments, and "layer", "Mamba1" (the default) or "Mamba2"; mamba_ssm 1 has it in d_intermediate's place, as a call here may.
    Raises NotImplementedError for attention and the gated MLP (d_intermediate > 0), ValueError for another layer.
    """
    if isinstance(d_intermediate, Mapping):
        ssm_cfg = d_intermediate
        d_intermediate = 0
    config = dict(ssm_cfg or {})
    kind = config.pop("layer", "Mamba1")
    shapes.choice("ssm_cfg['layer']", kind, tuple(_LAYERS))
    for name, given, expected in (("d_intermediate", d_intermediate, 0), ("attn_layer_idx", layer_idx in (attn_layer_idx or ()), False)):
        if given != expected:
            raise NotImplementedError(f"{name}: expected {expected!r} (more is not in this release of medssm), got {given!r}")
    mixer = functools.partial(_LAYERS[kind], layer_idx=layer_idx, device=device, dtype=dtype, **config)
    normed = functools.partial(norm.RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, device=device, dtype=dtype)
    block = Block(d_model, mixer, norm_cls=normed, fused_add_norm=fused_add_norm, residual_in_fp32=residual_in_fp32)
    block.layer_idx = layer_idx
    return block
