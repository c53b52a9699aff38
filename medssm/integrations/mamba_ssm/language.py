"""mamba_ssm's language model: MambaConfig, MixerModel, MambaLMHeadModel, with upstream's weight names and files."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medssm import files
from medssm.integrations.mamba_ssm.block import add_norm, create_block
from medssm.integrations.mamba_ssm.generation import GenerationMixin
from medssm.integrations.mamba_ssm.norm import RMSNorm

_CONFIG, _WEIGHTS = "config.json", "pytorch_model.bin"


@dataclass
class MambaConfig:
    """A MambaLMHeadModel's arguments, as its config.json has them.

    vocab_size: tokens, rounded up to a multiple of pad_vocab_size_multiple. tie_embeddings: lm_head has the embedding's weight. The rest: MixerModel.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


class CausalLMOutput(NamedTuple):
    """logits (b, l, vocabulary)."""

    logits: Tensor


@torch.no_grad()
def _init_weights(
    module: nn.Module, n_layer: int, initializer_range: float = 0.02, rescale_prenorm_residual: bool = True, n_residuals_per_layer: int = 1
) -> None:
    """Start one module's weights, for `nn.Module.apply`.

    Biases of linear layers 0 (not those with _no_reinit); embeddings normal with deviation initializer_range; with rescale_prenorm_residual the
    weights that end on the residual, out_proj and fc2, as nn.Linear has them divided by sqrt(n_residuals_per_layer n_layer).
    """
    if isinstance(module, nn.Linear) and module.bias is not None and not getattr(module.bias, "_no_reinit", False):
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, weight in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                weight.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """mamba_ssm's stack: embedding, blocks with residuals between them, a norm: tokens (b, l) -> (b, l, d_model).

    Args:
        d_model: channels. n_layer: blocks. d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm, fused_add_norm,
            residual_in_fp32: as create_block. vocab_size: rows of the embedding. initializer_cfg: arguments of _init_weights.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int = 0,
        vocab_size: int = 50277,
        ssm_cfg: Mapping[str, Any] | None = None,
        attn_layer_idx: Sequence[int] | None = None,
        attn_cfg: Mapping[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: Mapping[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, device=device, dtype=dtype)
        self.layers: Any = nn.ModuleList(
            create_block(
                d_model,
                d_intermediate,
                ssm_cfg,
                attn_layer_idx,
                attn_cfg,
                norm_epsilon,
                rms_norm,
                residual_in_fp32,
                fused_add_norm,
                layer_idx,
                device,
                dtype,
            )
            for layer_idx in range(n_layer)
        )
        self.norm_f: nn.Module = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, device=device, dtype=dtype)
        self.apply(functools.partial(_init_weights, n_layer=n_layer, n_residuals_per_layer=2 if d_intermediate else 1, **(initializer_cfg or {})))

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int | None, dtype: torch.dtype | None = None, **kwargs: Any) -> dict[int, Any]:
        """{layer: its mixer's states before the first token}."""
        return {i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs) for i, layer in enumerate(self.layers)}

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """(b, l) -> (b, l, d_model). mixer_kwargs go to every mixer."""
        x, residual = self.embedding(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, inference_params=inference_params, **mixer_kwargs)
        return add_norm(self.norm_f, x, residual, self.fused_add_norm, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """mamba_ssm's MambaLMHeadModel: a MixerModel (`backbone`) and logits by `lm_head`, as a MambaConfig says. initializer_cfg: as MixerModel."""

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        vocabulary = math.ceil(config.vocab_size / config.pad_vocab_size_multiple) * config.pad_vocab_size_multiple
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=vocabulary,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, vocabulary, bias=False, device=device, dtype=dtype)
        self.apply(functools.partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Give lm_head the embedding's weight where the config asks for it."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int | None, dtype: torch.dtype | None = None, **kwargs: Any) -> dict[int, Any]:
        """The backbone's."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, inference_params: Any = None, num_last_tokens: int = 0, **mixer_kwargs: Any
    ) -> CausalLMOutput:
        """(b, l) -> logits (b, l, vocabulary), of the last num_last_tokens alone if that is above 0. position_ids: of no effect."""
        x = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(self.lm_head(x[:, -num_last_tokens:]))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> MambaLMHeadModel:
        """The model of a local folder with config.json and pytorch_model.bin; kwargs as __init__. Nothing is downloaded."""
        model = cls(MambaConfig(**load_config_hf(pretrained_model_name)), device=device, dtype=dtype, **kwargs)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype))
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write config.json and pytorch_model.bin, as from_pretrained and mamba_ssm read them, into a folder, which is made if need be."""
        with files.atomic(Path(save_directory, _WEIGHTS)) as path:
            torch.save(self.state_dict(), path)
        files.write_json(Path(save_directory, _CONFIG), asdict(self.config))


def load_config_hf(model_name: str | Path) -> dict[str, Any]:
    """config.json of a local folder."""
    config: dict[str, Any] = files.read_json(_file(model_name, _CONFIG))
    return config


def load_state_dict_hf(model_name: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights in pytorch_model.bin of a local folder, in their own types: on device where dtype is float32 or None, else on the CPU."""
    weights: dict[str, Tensor] = torch.load(
        _file(model_name, _WEIGHTS), map_location=device if dtype in (None, torch.float32) else "cpu", weights_only=True
    )
    return weights


def _file(folder: str | Path, name: str) -> Path:
    path = Path(folder, name)
    if not path.is_file():
        raise FileNotFoundError(f"pretrained_model_name: expected a local folder with {_CONFIG} and {_WEIGHTS}; {name} is not in {str(folder)!r}")
    return path
