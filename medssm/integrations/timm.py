"""medssm's 2D encoders in timm: classifiers and feature pyramids under timm.create_model.

    import medssm.integrations.timm
    medssm.integrations.timm.register()
    model = timm.create_model("medssm_vmamba_tiny", num_classes=5, in_chans=1)
    pyramid = timm.create_model("medssm_umamba_enc", in_chans=1, features_only=True, out_indices=(1, 2, 3))

Every model of medssm that has an encoder is there, with its sizes: medssm_vmamba_tiny, medssm_vim_small, medssm_unet_base, medssm_segmamba, ...
Keywords that timm does not know go to the model itself. Weights of a classifier have the names they have under medssm.create_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from torch import Tensor, nn

import medssm
from medssm.models.monai import NETWORKS as MONAIS_OWN
from medssm.models.registry import Features, model_facts
from medssm.nn import Encoder
from medssm.nn.blocks import ChannelNorm
from medssm.nn.vim import VimEncoder

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic", "crop_pct": 0.9}
_NO_DECAY = {"A_log", "A_b_log", "A_s_log", "A_logs", "D", "D_b", "D_s", "Ds", "cls_token", "pos_embed"}

default_cfgs: dict[str, Any] = {}  # timm looks for them in the module of an entrypoint


def register() -> list[str]:
    """Enter the models into timm's registry; returns their names. Calling it again is harmless."""
    names = []
    for model in medssm.list_models():
        if model in MONAIS_OWN:
            continue
        for size in model_facts(model).sizes or (None,):
            name = "medssm_" + "_".join(filter(None, (model.removeprefix("medssm_"), size)))
            if not is_model(name):
                _register(name, model, {"size": size} if size else {})
            names.append(name)
    return names


def _register(name: str, model: str, options: dict[str, Any]) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        builder = partial(TimmVim if model == "vim" else TimmModel, model, **options)
        # out_indices None: all maps
        return build_model_with_cfg(builder, name, pretrained, feature_cfg={"out_indices": None, "feature_cls": "getter"}, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    default_cfgs.update(generate_default_cfgs({name: {"num_classes": 1000, "input_size": (3, 224, 224), "classifier": "head", **_IMAGENET}}))
    globals()[name] = register_model(entrypoint)  # timm adds the name to this module's __all__


class TimmModel(nn.Module):
    """A 2D encoder with timm's interface: (b, in_chans, height, width) -> (b, num_classes).

    Args:
        model: a name of medssm.list_models(); options: its own.
        num_classes: 0 for no classifier. global_pool: "avg", or "" for none. drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, for models that have it.
    """

    def __init__(
        self,
        model: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if drop_path_rate is not None:
            options["drop_path"] = drop_path_rate
        network = medssm.create_model(model, 2, in_chans, max(1, num_classes), **options)
        features = Features(network)
        self.encoder = features.encoder
        self.bottleneck = getattr(network, "bottleneck", None) or nn.Identity()  # U-Mamba Bot has its Mamba there
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": c, "reduction": max(stride), "module": f"encoder.stages.{i}"}
            for i, (c, stride) in enumerate(zip(features.channels, features.strides, strict=True))
        ]
        self.num_features = self.head_hidden_size = features.channels[-1]
        self.in_chans, self.num_classes = in_chans, num_classes
        self.norm = getattr(network, "norm", None) or ChannelNorm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = global_pool
        self.head: nn.Module
        self.reset_classifier(num_classes, global_pool)
        if num_classes and hasattr(network, "head"):
            self.head = cast(nn.Module, network.head)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, height, width) -> (b, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The coarsest map, normalised: (b, num_features, height / reduction, width / reduction)."""
        return self._maps(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What forward_features gives -> (b, num_classes); with pre_logits (b, num_features)."""
        x = self.head_drop(self._pool(x) if self.global_pool else x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps (b, c, height, width), the finest first, and the final features before them unless intermediates_only.

        indices: which maps, the last n for an int, all for None. norm: normalises the coarsest. stop_early changes nothing here: pruning, which
        features_only does, leaves out the stages that no map needs.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        final, maps = self._maps(x)
        if norm:
            maps[-1] = self.norm(maps[-1])
        maps = [maps[i] for i in self._taken(indices)]
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop what the maps at `indices` do not need (SegMamba's stages stay: its encoder has more than a chain of them); returns the indices as
        counted from the finest."""
        taken = self._taken(indices)
        last = max(taken)
        if last < len(self.feature_info) - 1:
            if type(self.encoder).forward is Encoder.forward:
                self.encoder.stages = self.encoder.stages[: last + 1]
            self.bottleneck = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            prune_norm = prune_head = True
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """The linear layer of the logits, or nn.Identity."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for num_classes, none for 0."""
        if global_pool not in (None, "", "avg"):
            raise ValueError(f"global_pool: expected 'avg' or '', got {global_pool!r}")
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm's optimizers leave without decay."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".")[-1] in _NO_DECAY}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """How timm groups the parameters by layers."""
        return {"stem": r"^encoder\.(?:stem|cls_token|pos_embed)", "blocks": r"^encoder\.stages\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refused where it is asked for."""
        if enable:
            raise NotImplementedError("set_grad_checkpointing: expected False; medssm's scans recompute inside already")

    def _maps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The final features, and every map, the finest first."""
        maps = self.encoder(x)
        maps[-1] = self.bottleneck(maps[-1])
        return self.norm(maps[-1]), maps

    def _pool(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(-1)

    def _taken(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.feature_info)
        if indices is None or isinstance(indices, int):
            indices = range(-(count if indices is None else indices), 0)
        if not all(-count <= i < count for i in indices):
            raise ValueError(f"indices: expected -{count} to {count - 1}, the model's maps, got {list(indices)}")
        return [i % count for i in indices]


class TimmVim(TimmModel):
    """Vim: forward_features gives tokens (b, length, num_features), the class tokens first, from which the classifier reads."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.num_prefix_tokens = len(cast(VimEncoder, self.encoder).cls_token)
        self.norm = nn.Identity()  # the encoder has it

    def _maps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        tokens, grid, at = cast(VimEncoder, self.encoder).tokens(x)
        patches = tokens[:, [i for i in range(tokens.shape[1]) if i not in at]]
        return torch.cat((tokens[:, at], patches), 1), [patches.transpose(1, 2).unflatten(2, grid)]

    def _pool(self, x: Tensor) -> Tensor:
        return x[:, : self.num_prefix_tokens or None].mean(1)
