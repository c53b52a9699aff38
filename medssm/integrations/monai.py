"""medssm's encoders as backbones of MONAI's FlexibleUNet, in 2D and 3D.

    import medssm.integrations.monai
    medssm.integrations.monai.register()
    net = FlexibleUNet(in_channels=1, out_channels=3, backbone="medssm_umamba_enc", spatial_dims=3)

FlexibleUNet wants one map at 1/2 of the resolution and each further one at half of the one before, five at most. So an encoder's map at full
resolution is left out, of several maps of one resolution the last is taken, and where its finest map is coarser than 1/2 (VMamba begins at 1/4),
convolutions of stride 2 on the image fill in.
Logits have the input's size where it is even along each axis, else one voxel less, as with MONAI's own EfficientNet backbones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from monai.networks.blocks.encoder import BaseEncoder
from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE
from torch import Tensor, nn

import medssm
from medssm.models.monai import NETWORKS as MONAIS_OWN
from medssm.models.registry import Features
from medssm.nn import sizes
from medssm.nn.blocks import BATCH_NORM, CONV

_MOST = 5  # maps that FlexibleUNet takes


def register() -> list[str]:
    """Enter every model that has an encoder as the backbone medssm_NAME (medssm_unet as itself); returns the names. Calling it again is harmless."""
    names = []
    for model in medssm.list_models():
        if model in MONAIS_OWN:
            continue
        try:
            names.append(register_encoder("medssm_" + model.removeprefix("medssm_"), model))
        except ValueError:  # no encoder, or not one for FlexibleUNet: register_encoder says why
            continue
    return names


def register_encoder(name: str, model: str, **options: Any) -> str:
    """Enter a model's encoder as the backbone `name`, with the model's own options (features, size, ...); returns the name.

    FlexibleUNet's `pretrained` may then be a file of the whole model's weights, for which `options` takes out_channels too.
    Raises ValueError for a model without an encoder, or maps that FlexibleUNet cannot take.
    """
    with torch.device("meta"):
        backbone = Backbone(model, **options)
    Backbone.entries[name] = _Entry({"model": model, **options}, tuple(backbone.channels))
    FLEXUNET_BACKBONE.register_class(Backbone)
    return name


class _Entry(NamedTuple):
    options: dict[str, Any]
    channels: tuple[int, ...]


class Backbone(nn.Module, BaseEncoder):
    """An encoder, with what follows it on the coarsest map, for FlexibleUNet: (b, c, *spatial) -> maps at 1/2, 1/4, ... of the size, rounded
    down, with `channels` each.

    pretrained: False, or a file of the whole model's weights. options: the model's own.
    """

    entries: ClassVar[dict[str, _Entry]] = {}

    def __init__(self, model: str, spatial_dims: int = 2, in_channels: int = 1, pretrained: bool | str = False, **options: Any) -> None:
        super().__init__()
        if pretrained is True:
            raise ValueError("pretrained: expected False or a file of weights (nothing is downloaded), got True")
        network = medssm.create_model(model, spatial_dims, in_channels, pretrained=pretrained or None, **options)
        features = Features(network)
        self.taken, missing = _fit(model, features.strides)
        self.encoder, self.divisor = features.encoder, features.strides[-1]
        self.bottleneck = getattr(network, "bottleneck", None) or nn.Identity()  # U-Mamba Bot has its Mamba there
        given = [features.channels[i] for i in self.taken]
        filled = [max(1, given[0] // 2 ** (missing - i)) for i in range(missing)]
        self.channels = [*filled, *given]
        self.fine = nn.ModuleList(
            [
                nn.Sequential(CONV[spatial_dims](a, b, 3, 2, 1, bias=False), BATCH_NORM[spatial_dims](b), nn.SiLU())
                for a, b in zip([in_channels, *filled], filled, strict=False)
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, in_channels, *spatial) -> maps (b, channels[i], *(spatial / 2^(i + 1))), rounded down."""
        size = x.shape[2:]
        if any(n < d for n, d in zip(size, self.divisor, strict=True)):
            raise ValueError(f"x: expected at least {self.divisor} voxels, the coarsest map's stride, got {tuple(size)}")
        x = sizes.pad_to(x, self.divisor)
        given, maps = self.encoder(x), []
        coarse = [given[i] for i in self.taken]
        coarse[-1] = self.bottleneck(coarse[-1])
        for step in self.fine:
            x = step(x)
            maps.append(x)
        return [_crop(m, [n >> level for n in size]) for level, m in enumerate([*maps, *coarse], 1)]

    @classmethod
    def get_encoder_names(cls) -> list[str]:
        """The backbones' names."""
        return list(cls.entries)

    @classmethod
    def get_encoder_parameters(cls) -> list[dict[str, Any]]:
        """What FlexibleUNet builds each backbone with."""
        return [{"spatial_dims": 2, "in_channels": 1, "pretrained": False, **entry.options} for entry in cls.entries.values()]

    @classmethod
    def num_channels_per_output(cls) -> list[tuple[int, ...]]:
        """Channels of each backbone's maps."""
        return [entry.channels for entry in cls.entries.values()]

    @classmethod
    def num_outputs(cls) -> list[int]:
        """The number of each backbone's maps."""
        return [len(entry.channels) for entry in cls.entries.values()]


def _fit(model: str, strides: Sequence[tuple[int, ...]]) -> tuple[list[int], int]:
    """Which of an encoder's maps FlexibleUNet takes, the last of each resolution, and how many finer ones must be made; ValueError where they do not
    fit."""
    last = {stride: i for i, stride in enumerate(strides) if max(stride) > 1}
    taken = [max(stride) for stride in last]
    missing = taken[0].bit_length() - 2 if taken else 0
    wanted = [2 ** (missing + 1 + i) for i in range(len(taken))]
    if not taken or taken != wanted or any(min(stride) != max(stride) for stride in strides) or missing + len(taken) > _MOST:
        raise ValueError(
            f"model: expected maps that FlexibleUNet takes, at 1/2, 1/4, ... of the resolution, {_MOST} at most; {model} has the "
            f"strides {list(strides)}"
        )
    return list(last.values()), missing


def _crop(x: Tensor, size: Sequence[int]) -> Tensor:
    for axis, n in enumerate(size, 2):
        x = x.narrow(axis, 0, n)
    return x
