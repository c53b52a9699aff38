"""U-Mamba (Ma, Li and Wang, arXiv 2401.04722): nnU-Net's residual U-Net with Mamba, in the bottleneck (Bot) or in the encoder (Enc).

What upstream's code does beside the paper, kept for its weights:
- Mamba's output replaces the features, there is no residual around it.
- In 2D the finest decoder stage does not see the encoder's skip; in 3D every stage does.
- Enc has Mamba after every stage in 3D, in 2D after those stages s for which s and the number of stages are not both odd or both even.
- Where a stage's map has at most as many voxels as channels, Enc's Mamba runs over channels as tokens ("channel tokens"): its weights
  then have the size of the map, and other input sizes are refused. `create_model` leaves this out, so that any size works.
- The number of convolutions is 1 in the coarser half of the stages, whatever the caller asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from medssm.kernels.autocast import without_autocast
from medssm.models.facts import Facts
from medssm.models.nnunet import Keywords, from_plan, layers_of, of_width, stages_of
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, Mamba, UNet
from medssm.nn.blocks import image, tokens
from medssm.nn.inner import weight_dtype
from medssm.nn.leaf import Leaf
from medssm.nn.residual import Layers, Stages, residual_decoder, residual_encoder


def umamba(
    kind: str,
    *,
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    features: Sequence[int] = (32, 64, 128, 256, 320, 320),
    strides: Sequence[int | Sequence[int]] | None = None,
    kernels: int | Sequence[int | Sequence[int]] = 3,
    blocks: int | Sequence[int] = 2,
    decoder_blocks: int | Sequence[int] = 2,
    conv_bias: bool = True,
    norm: Callable[..., nn.Module] | None = None,
    norm_kwargs: Mapping[str, Any] | None = None,
    act: Callable[..., nn.Module] = nn.LeakyReLU,
    act_kwargs: Mapping[str, Any] | None = None,
    dropout: Callable[..., nn.Module] | None = None,
    dropout_kwargs: Mapping[str, Any] | None = None,
    deep_supervision: bool = False,
    input_size: str = "any",
    stem_channels: int | None = None,
) -> UNet:
    """U-Mamba for any input size: kind "bot" or "enc".

    Args:
        features: channels per stage. strides, kernels: per stage an int or one per axis; strides default to 1, then 2.
        blocks, decoder_blocks: convolutional blocks per stage, in the decoder one entry fewer, from coarse to fine; an int serves all.
        norm, act, dropout: classes, with their keywords; None is instance norm with weights for `norm`, and no dropout.
        deep_supervision: a list of logits, the highest resolution first; without it the coarser heads are not made.
        input_size: "any" pads and crops inside, "strict" raises where strides do not divide the input.
        stem_channels: default features[0].
    """
    shape = stages_of(spatial_dims, features, strides, kernels, blocks, decoder_blocks)
    layers = layers_of(spatial_dims, conv_bias, norm, norm_kwargs, act, act_kwargs, dropout, dropout_kwargs)
    mamba = MambaLayer(shape.features[-1]) if kind == "bot" else _mamba_layers(shape, None)
    return _network(layers, shape, in_channels, out_channels, mamba, deep_supervision, deep_supervision, input_size, stem_channels)


def upstream(kind: str, *, input_size: Sequence[int] | None = None, **keywords: Any) -> UNet:
    """U-Mamba from the keywords of upstream's UMambaBot and UMambaEnc: nnU-Net's `Keywords`, and for Enc the size of the patch."""
    given = Keywords(**keywords)
    dims, layers, shape, n_stages = given.dims(), given.layers(), given.stages(), given.n_stages
    if kind == "enc" and (input_size is None or len(input_size) != dims):
        raise ValueError(f"input_size: expected the {dims} sizes of the patch that the network was made for, got {input_size!r}")
    for s in range(math.ceil(n_stages / 2), n_stages):
        shape.blocks[s] = 1
    for s in range(math.ceil((n_stages - 1) / 2 + 0.5), n_stages - 1):
        shape.decoder_blocks[s] = 1
    mamba = MambaLayer(shape.features[-1]) if kind == "bot" else _mamba_layers(shape, input_size)
    return _network(layers, shape, given.input_channels, given.num_classes, mamba, given.deep_supervision, True, "any", given.stem_channels)


class MambaLayer(Leaf):
    """LayerNorm and Mamba over the voxels as tokens, or over the channels, on (b, c, *spatial). `dim` is the size of a token.

    It runs outside autocast, in its weights' type: half precision here is where upstream's users met NaN.
    """

    def __init__(self, dim: int, channel_tokens: bool = False) -> None:
        super().__init__()
        self.dim, self.channel_tokens = dim, channel_tokens
        self.norm = nn.LayerNorm(dim)
        self.mamba = Mamba(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *spatial) -> the same shape."""
        with without_autocast(x.device):
            x = x.to(weight_dtype(self.norm, x))
            if not self.channel_tokens:
                return image(self.mamba(self.norm(tokens(x))))
            channels = x.flatten(2)
            if channels.shape[-1] != self.dim:
                raise ValueError(
                    f"x: expected a map of {self.dim} voxels, which these channel-token weights are made for, got "
                    f"{tuple(x.shape[2:])}: use the input size of the training"
                )
            out: Tensor = self.mamba(self.norm(channels)).reshape(x.shape)
            return out


class UMambaEncoder(Encoder):
    """An encoder with a MambaLayer, or nothing, after each stage."""

    def __init__(self, *args: Any, mamba_layers: Sequence[nn.Module]) -> None:
        super().__init__(*args)
        self.mamba_layers = nn.ModuleList(mamba_layers)

    def stage(self, s: int, x: Tensor) -> Tensor:
        """A stage and the Mamba behind it."""
        y: Tensor = self.mamba_layers[s](self.stages[s](x))
        return y


def _network(
    layers: Layers,
    shape: Stages,
    in_channels: int,
    out_channels: int,
    mamba: MambaLayer | list[nn.Module],
    deep_supervision: bool,
    all_heads: bool,
    size: str,
    stem_channels: int | None,
) -> UNet:
    """The network; mamba is Bot's layer or the list of Enc's, all_heads makes those that only deep supervision uses in any case."""
    parts, bottleneck = (*residual_encoder(layers, shape, in_channels, stem_channels), shape.features, shape.strides), None
    if isinstance(mamba, MambaLayer):
        encoder, bottleneck = Encoder(*parts), mamba
    else:
        encoder = UMambaEncoder(*parts, mamba_layers=mamba)
    joins = [len(shape.strides[0]) == 3 or s > 0 for s in range(len(shape.features) - 2, -1, -1)]
    decoder = residual_decoder(layers, shape, out_channels, joins, all_heads)
    return UNet(encoder, Decoder(**decoder, deep_supervision=deep_supervision), bottleneck, size)


def _mamba_layers(shape: Stages, size: Sequence[int] | None) -> list[nn.Module]:
    """Enc's layer after each stage, for an input size; None is for any size, without channel tokens."""
    layers: list[nn.Module] = []
    dims, n = len(shape.strides[0]), len(shape.features)
    for s, (channels, stride) in enumerate(zip(shape.features, shape.strides, strict=True)):
        size = size and [a // b for a, b in zip(size, stride, strict=True)]
        voxels = math.prod(size) if size else math.inf
        if dims == 2 and s % 2 == n % 2:
            layers.append(nn.Identity())
        elif size and voxels <= channels:
            layers.append(MambaLayer(math.prod(size), channel_tokens=True))
        else:
            layers.append(MambaLayer(channels))
    return layers


# Upstream registers the encoder again inside the decoder, and every convolution and norm again in `all_modules`.
MAP = Map(drop=(r"^decoder\.encoder\.", r"\.all_modules\."), rename=((r"^mamba_layer\.", "bottleneck."),))


_FACTS = Facts("2401.04722", "bowang-lab/U-Mamba", "Apache-2.0", small={"features": (4, 8, 16)}, from_plan=from_plan, of_width=of_width)
for _kind in ("bot", "enc"):
    register_model(f"umamba_{_kind}", partial(umamba, _kind), _FACTS)
    register_upstream(f"umamba_{_kind}", builder=partial(upstream, _kind), map=MAP)
