"""medssm's 2D encoders in timm: classifiers and feature pyramids under timm.create_model.

    import medssm.integrations.timm
    medssm.integrations.timm.register()
    model = timm.create_model("medssm_vmamba_tiny", num_classes=5, in_chans=1)
    pyramid = timm.create_model("medssm_umamba_enc", in_chans=1, features_only=True, out_indices=(1, 2, 3))

Every model of medssm that has an encoder is there, with its sizes: medssm_vmamba_tiny, medssm_vim_small, medssm_unet_base, medssm_segmamba, ...
Keywords that timm does not know go to the model itself. Weights of a classifier have the names they have under medssm.create_model; timm fits a
file of them to another number of channels or classes:

    timm.create_model("medssm_vmamba_tiny", pretrained=True, pretrained_cfg_overlay={"file": "weights.pth"}, in_chans=1, num_classes=5)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from torch import Tensor, nn

import medssm
from medssm.models.monai import NETWORKS as MONAIS_OWN
from medssm.models.registry import Features, model_facts
from medssm.models.vrwkv import VRWKVEncoder
from medssm.nn import Encoder
from medssm.nn.blocks import ChannelNorm, image, tokens
from medssm.nn.vim import VimEncoder

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic", "crop_pct": 0.9}
_PROBE = 997  # channels of an image that no layer but the first ones has
_NO_DECAY = {"A_log", "A_b_log", "A_s_log", "A_logs", "D", "D_b", "D_s", "Ds", "cls_token", "pos_embed"}

default_cfgs: dict[str, Any] = {}  # timm looks for them in the module of an entrypoint


def register() -> list[str]:
    """Enter the models into timm's registry; returns their names. Calling it again is harmless.

    Each is built once on the meta device, which tells timm its first convolutions and the size of its coarsest map; one without a 2D encoder is
    left out.
    """
    names = []
    for model in medssm.list_models():
        if model in MONAIS_OWN:
            continue
        for size in model_facts(model).sizes or (None,):
            name = "medssm_" + "_".join(filter(None, (model.removeprefix("medssm_"), size)))
            options: dict[str, Any] = {"size": size} if size else {}
            if is_model(name) or _register(name, partial(_build, model, **options)):
                names.append(name)
    return names


def _register(name: str, builder: Callable[..., TimmModel]) -> bool:
    """Enter a model; False where it has no 2D encoder."""
    try:
        with torch.device("meta"):
            probe = builder(in_chans=_PROBE)
    except ValueError:
        return False

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        # out_indices None: prune_intermediate_layers knows which
        feature_cfg = {"out_indices": None, "feature_cls": "getter"}
        return build_model_with_cfg(builder, name, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=_fit_depthwise, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    default_cfgs.update(generate_default_cfgs({name: {**_cfg(probe), **_IMAGENET}}))
    globals()[name] = register_model(entrypoint)  # timm adds the name to this module's __all__
    return True


def _cfg(probe: TimmModel) -> dict[str, Any]:
    size, reduction = 224, probe.feature_info[-1]["reduction"]
    first = [name for name, m in probe.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == _PROBE and m.groups == 1]
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (-(-size // reduction),) * 2,
        "first_conv": first[0] if len(first) == 1 else tuple(first),
        "classifier": "head",
    }


def _build(
    model: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_path_rate: float | None = None,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    **options: Any,
) -> TimmModel:
    if drop_path_rate is not None:
        options["drop_path"] = drop_path_rate
    network = medssm.create_model(model, 2, in_chans, max(1, num_classes), **options)
    kind = TimmStack if isinstance(getattr(network, "encoder", None), (VimEncoder, VRWKVEncoder)) else TimmModel
    return kind(network, num_classes, in_chans, global_pool, drop_rate)


def _fit_depthwise(state_dict: dict[str, Tensor], model: TimmModel) -> dict[str, Tensor]:
    """timm fits a first convolution to another number of channels, but no depthwise one: each channel gets the mean of the kernels."""
    for name, conv in model.named_modules():
        weight = state_dict.get(f"{name}.weight")
        if weight is not None and isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels == conv.out_channels == model.in_chans:
            state_dict[f"{name}.weight"] = weight if len(weight) == len(conv.weight) else weight.mean(0, keepdim=True).expand_as(conv.weight)
    return state_dict


class TimmModel(nn.Module):
    """A 2D encoder with timm's interface: (b, in_chans, height, width) -> (b, num_classes).

    Args:
        network: of medssm.create_model, for in_chans; what it has beside its encoder, its norm and its classifier is left out.
        num_classes: 0 for no classifier. global_pool: "avg", or "" for none. drop_rate: dropout before the classifier.
    """

    encoder: Encoder

    def __init__(self, network: nn.Module, num_classes: int, in_chans: int, global_pool: str, drop_rate: float) -> None:
        super().__init__()
        features = Features(network)
        self.encoder = features.encoder.trunk()
        self.bottleneck = getattr(network, "bottleneck", None) or nn.Identity()  # U-Mamba Bot has its Mamba there
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": c, "reduction": max(stride), "module": f"encoder.stages.{i}"}
            for i, (c, stride) in enumerate(zip(features.channels, features.strides, strict=True))
        ]
        self.default_maps: int | None = None  # that features_only gives, the last ones; None for all
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
        return self._maps(x, ())[0]

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

        indices: which maps, the last n for an int, all for None. norm: normalises the coarsest (all maps of a stack). stop_early changes nothing
        here: pruning, which features_only does, leaves out the stages that no map needs.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        taken = self._taken(indices)
        final, maps = self._maps(x, taken)
        wanted = [self._normalised(i, maps[i]) if norm else maps[i] for i in taken]
        return wanted if intermediates_only else (final, wanted)

    def prune_intermediate_layers(self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop what the maps at `indices` do not need; None is what features_only gives by default: all maps, the last three of a stack. Returns
        the indices as counted from the finest."""
        taken = self._taken(self.default_maps if indices is None else indices)
        last = max(taken)
        if last < len(self.feature_info) - 1:
            for name, child in self.encoder.named_children():
                if isinstance(child, nn.ModuleList):  # one entry per stage
                    setattr(self.encoder, name, child[: last + 1])
            self.bottleneck = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            prune_norm = prune_head = True
        if prune_norm:
            self._drop_norm()
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

    def _maps(self, x: Tensor, taken: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The final features, and at least those maps, by their indices."""
        maps = self.encoder(x)
        maps[-1] = self.bottleneck(maps[-1])
        return self.norm(maps[-1]), dict(enumerate(maps))

    def _normalised(self, i: int, x: Tensor) -> Tensor:
        return self.norm(x) if i == len(self.feature_info) - 1 else x

    def _drop_norm(self) -> None:
        self.norm = nn.Identity()

    def _pool(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(-1)

    def _taken(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.feature_info)
        if indices is None or isinstance(indices, int):
            indices = range(-(count if indices is None else indices), 0)
        if not all(-count <= i < count for i in indices):
            raise ValueError(f"indices: expected -{count} to {count - 1}, the model's maps, got {list(indices)}")
        return [i % count for i in indices]


class TimmStack(TimmModel):
    """A stack of layers over patches, with a map behind every layer. Vim's forward_features gives tokens (b, length, num_features), the class
    tokens first, from which the classifier reads."""

    encoder: VimEncoder | VRWKVEncoder

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        depth = len(self.encoder.stages)
        self.feature_info = [{**self.feature_info[-1], "module": f"encoder.stages.{i}"} for i in range(depth)]
        self.default_maps = min(3, depth)
        self.num_prefix_tokens = len(getattr(self.encoder, "cls_token", ()))
        self.norm = nn.Identity()  # the encoder has it

    def _maps(self, x: Tensor, taken: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
        final, maps = self.encoder.maps(x, taken)
        return final, dict(zip(sorted(set(taken)), maps, strict=True))

    def _normalised(self, i: int, x: Tensor) -> Tensor:
        return image(self.encoder.norm(tokens(x)))

    def _drop_norm(self) -> None:
        self.encoder.norm = nn.Identity()

    def _pool(self, x: Tensor) -> Tensor:
        return x[:, : self.num_prefix_tokens or None].mean(1) if isinstance(self.encoder, VimEncoder) else super()._pool(x)
