"""mamba_ssm's Block, GatedMLP and create_block."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medssm.integrations.mamba_ssm import norm
from medssm.integrations.mamba_ssm.mixer import Mamba
from medssm.integrations.mamba_ssm.second import Mamba2
from medssm.integrations.mamba_ssm.third import Mamba3
from medssm.kernels.dtypes import widened
from medssm.nn.inner import plain, weight_dtype
from medssm.ops import shapes

_LAYERS: dict[str, Callable[..., nn.Module]] = {"Mamba1": Mamba, "Mamba2": Mamba2, "Mamba3": Mamba3}


class Block(nn.Module):
    """mamba_ssm's residual block: (x, residual) -> (mixer(norm(x + residual)), x + residual), and likewise an mlp behind it.

    Args:
        dim: channels. mixer_cls, mlp_cls, norm_cls: made with dim; an mlp_cls of nn.Identity leaves the mlp out.
        fused_add_norm: round the sum only once, by layer_norm_fn. residual_in_fp32: keep the sum in float32 at least.
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
        x, residual = add_norm(self.norm, hidden_states, residual, self.fused_add_norm, self.residual_in_fp32)
        x = self.mixer(x, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            x, residual = add_norm(self.norm2, x, residual, self.fused_add_norm, self.residual_in_fp32)
            x = self.mlp(x)
        return x, residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int | None, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        """The mixer's."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


def add_norm(layer: Any, x: Tensor, residual: Tensor | None, fused: bool, residual_in_fp32: bool) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual), with Block's fused_add_norm and residual_in_fp32."""
    if fused and plain(layer, (nn.LayerNorm, norm.RMSNorm)):
        x, residual = norm.layer_norm_fn(
            x,
            layer.weight,
            layer.bias,
            residual,
            eps=layer.eps,
            prenorm=True,
            residual_in_fp32=residual_in_fp32,
            is_rms_norm=isinstance(layer, norm.RMSNorm),
        )
        return x, residual
    residual = x if residual is None else x + residual
    x = layer(residual.to(weight_dtype(layer, residual)))
    return x, widened(residual) if residual_in_fp32 else residual


class GatedMLP(nn.Module):
    """mamba_ssm's MLP: fc2(y activation(gate)) with y, gate = split(fc1(x)), on the last dimension.

    hidden_features: channels of y, rounded up to a multiple of multiple_of; None takes 8/3 in_features. out_features: None takes in_features.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = math.ceil((int(8 * in_features / 3) if hidden_features is None else hidden_features) / multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, in_features if out_features is None else out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        out: Tensor = self.fc2(y * self.activation(gate))
        return out


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
    """A Block of Mamba, Mamba2 or Mamba3 with a layer or RMS norm, and a GatedMLP behind it where d_intermediate > 0.

    ssm_cfg: the mixer's arguments, and "layer", "Mamba1" (the default), "Mamba2" or "Mamba3"; mamba_ssm 1 has it in d_intermediate's place.
    Raises NotImplementedError for a layer_idx in attn_layer_idx (attention), ValueError for another layer. attn_cfg: of no effect.
    """
    if isinstance(d_intermediate, Mapping):
        ssm_cfg = d_intermediate
        d_intermediate = 0
    config = dict(ssm_cfg or {})
    kind = config.pop("layer", "Mamba1")
    shapes.choice("ssm_cfg['layer']", kind, tuple(_LAYERS))
    if layer_idx in (attn_layer_idx or ()):
        raise NotImplementedError(f"attn_layer_idx: expected none (MHA, attention, is not in this release of medssm), got {attn_layer_idx}")
    given: dict[str, Any] = {"device": device, "dtype": dtype}
    block = Block(
        d_model,
        functools.partial(_LAYERS[kind], layer_idx=layer_idx, **given, **config),
        functools.partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **given) if d_intermediate else nn.Identity,
        functools.partial(norm.RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **given),
        fused_add_norm,
        residual_in_fp32,
    )
    block.layer_idx = layer_idx
    return block
