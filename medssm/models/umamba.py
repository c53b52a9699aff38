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
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from medssm.kernels.autocast import without_autocast
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, Mamba, UNet
from medssm.nn.blocks import CONV, INSTANCE_NORM, check_dims


def umamba(
    kind: str,
    *,
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    features: Sequence[int] = (32, 64, 128, 256, 320, 320),
    strides=None,
    kernels=3,
    blocks=2,
    decoder_blocks=2,
    conv_bias: bool = True,
    norm=None,
    norm_kwargs=None,
    act=nn.LeakyReLU,
    act_kwargs=None,
    dropout=None,
    dropout_kwargs=None,
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
    check_dims(spatial_dims)
    n = len(features)
    shape = Shape(
        list(features),
        _per_axis("strides", [1] + [2] * (n - 1) if strides is None else strides, n, spatial_dims),
        _per_axis("kernels", kernels, n, spatial_dims),
        _per_stage("blocks", blocks, n),
        _per_stage("decoder_blocks", decoder_blocks, n - 1),
    )
    if norm is None:
        norm, norm_kwargs = INSTANCE_NORM[spatial_dims], {"affine": True, **(norm_kwargs or {})}
    if act_kwargs is None and act is nn.LeakyReLU:
        act_kwargs = {"inplace": True}
    layers = Layers(CONV[spatial_dims], conv_bias, _maker(norm, norm_kwargs), _maker(act, act_kwargs), _maker(dropout, dropout_kwargs))
    mamba = MambaLayer(shape.features[-1]) if kind == "bot" else _mamba_layers(shape, (math.inf,) * spatial_dims)
    return _network(layers, shape, in_channels, out_channels, mamba, deep_supervision, deep_supervision, input_size, stem_channels)


def upstream(
    kind: str,
    *,
    input_channels,
    n_stages,
    features_per_stage,
    conv_op,
    kernel_sizes,
    strides,
    n_conv_per_stage,
    num_classes,
    n_conv_per_stage_decoder,
    input_size=None,
    conv_bias=False,
    norm_op=None,
    norm_op_kwargs=None,
    dropout_op=None,
    dropout_op_kwargs=None,
    nonlin=None,
    nonlin_kwargs=None,
    deep_supervision=False,
    stem_channels=None,
) -> UNet:
    """U-Mamba from the keywords of upstream's UMambaBot and UMambaEnc; classes may be given by name ("Conv3d")."""
    dims = {"Conv2d": 2, "Conv3d": 3}.get(getattr(_class("conv_op", conv_op), "__name__", None))
    if dims is None:
        raise ValueError(f"conv_op: expected Conv2d or Conv3d, got {conv_op!r}")
    if kind == "enc" and (input_size is None or len(input_size) != dims):
        raise ValueError(f"input_size: expected the {dims} sizes of the patch that the network was made for, got {input_size!r}")
    features = [features_per_stage * 2**s for s in range(n_stages)] if isinstance(features_per_stage, int) else features_per_stage
    shape = Shape(
        _per_stage("features_per_stage", features, n_stages),
        _per_axis("strides", strides, n_stages, dims),
        _per_axis("kernel_sizes", kernel_sizes, n_stages, dims),
        _per_stage("n_conv_per_stage", n_conv_per_stage, n_stages),
        _per_stage("n_conv_per_stage_decoder", n_conv_per_stage_decoder, n_stages - 1),
    )
    for s in range(math.ceil(n_stages / 2), n_stages):
        shape.blocks[s] = 1
    for s in range(math.ceil((n_stages - 1) / 2 + 0.5), n_stages - 1):
        shape.decoder_blocks[s] = 1
    layers = Layers(
        CONV[dims],
        conv_bias,
        _maker(_class("norm_op", norm_op), norm_op_kwargs),
        _maker(_class("nonlin", nonlin), nonlin_kwargs),
        _maker(_class("dropout_op", dropout_op), dropout_op_kwargs),
    )
    mamba = MambaLayer(shape.features[-1]) if kind == "bot" else _mamba_layers(shape, input_size)
    return _network(layers, shape, input_channels, num_classes, mamba, deep_supervision, True, "any", stem_channels)


# Upstream registers the encoder again inside the decoder, and every convolution and norm again in `all_modules`.
MAP = Map(drop=(r"^decoder\.encoder\.", r"\.all_modules\."), rename=((r"^mamba_layer\.", "bottleneck."),))


# -- parts ----------------------------------------------------------------------------------------------------------------------


class Layers(NamedTuple):
    """What makes the convolutions, norms, activations and dropouts of all blocks."""

    conv: type[nn.Module]
    conv_bias: bool
    norm: Callable[[int], nn.Module]
    act: Callable[[], nn.Module]
    dropout: Callable[[], nn.Module]


class Shape(NamedTuple):
    """The network's lists: one entry per stage, `decoder_blocks` one fewer and from coarse to fine."""

    features: list[int]
    strides: list[tuple[int, ...]]
    kernels: list[tuple[int, ...]]
    blocks: list[int]
    decoder_blocks: list[int]


class ResBlock(nn.Module):
    """conv, norm, act, conv, norm, plus a 1 x 1 convolution of the input, act. The first and the last convolution take the stride."""

    def __init__(self, layers: Layers, channels_in: int, channels: int, kernel, stride=1):
        super().__init__()
        pad = [k // 2 for k in kernel]
        self.conv1 = layers.conv(channels_in, channels, kernel, stride, pad)
        self.norm1 = layers.norm(channels)
        self.act1 = layers.act()
        self.conv2 = layers.conv(channels, channels, kernel, 1, pad)
        self.norm2 = layers.norm(channels)
        self.act2 = layers.act()
        self.conv3 = layers.conv(channels_in, channels, 1)
        self.stride = (stride,) * len(kernel) if isinstance(stride, int) else tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        # Every stride-th voxel, then the 1 x 1 convolution: its own stride crashes torch 2.13's backward on channels-last maps on a CPU.
        return self.act2(y + self.conv3(x[(..., *(slice(None, None, n) for n in self.stride))]))


class ConvNorm(nn.Module):
    """conv, dropout if any, norm, act if asked."""

    def __init__(self, layers: Layers, channels: int, kernel, act: bool):
        super().__init__()
        self.conv = layers.conv(channels, channels, kernel, 1, [k // 2 for k in kernel], bias=layers.conv_bias)
        self.dropout = layers.dropout()
        self.norm = layers.norm(channels)
        self.act = layers.act() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.dropout(self.conv(x))))


class BasicBlock(nn.Module):
    """Two convolutions and the input itself."""

    def __init__(self, layers: Layers, channels: int, kernel):
        super().__init__()
        self.conv1 = ConvNorm(layers, channels, kernel, act=True)
        self.conv2 = ConvNorm(layers, channels, kernel, act=False)
        self.act = layers.act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(self.conv1(x)) + x)


class Upsample(nn.Module):
    """Nearest neighbours, then a 1 x 1 convolution."""

    def __init__(self, layers: Layers, channels_in: int, channels: int, stride):
        super().__init__()
        self.conv, self.stride = layers.conv(channels_in, channels, 1), tuple(float(s) for s in stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.interpolate(x, scale_factor=self.stride, mode="nearest"))


class MambaLayer(nn.Module):
    """LayerNorm and Mamba over the voxels as tokens, or over the channels, on (b, c, *spatial). `dim` is the size of a token.

    It runs outside autocast, in its weights' type: half precision here is where upstream's users met NaN.
    """

    def __init__(self, dim: int, channel_tokens: bool = False):
        super().__init__()
        self.dim, self.channel_tokens = dim, channel_tokens
        self.norm = nn.LayerNorm(dim)
        self.mamba = Mamba(dim)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            x = x.to(self.norm.weight.dtype)
            if not self.channel_tokens:
                return self.mamba(self.norm(x.movedim(1, -1))).movedim(-1, 1)
            tokens = x.flatten(2)
            if tokens.shape[-1] != self.dim:
                raise ValueError(
                    f"x: expected a map of {self.dim} voxels, which these channel-token weights are made for, got "
                    f"{tuple(x.shape[2:])}: use the input size of the training"
                )
            return self.mamba(self.norm(tokens)).reshape(x.shape)


class UMambaEncoder(Encoder):
    """An encoder with a MambaLayer, or nothing, after each stage."""

    def __init__(self, *args, mamba_layers: Sequence[nn.Module]):
        super().__init__(*args)
        self.mamba_layers = nn.ModuleList(mamba_layers)

    def stage(self, s: int, x: Tensor) -> Tensor:
        return self.mamba_layers[s](self.stages[s](x))


def _network(
    layers: Layers,
    shape: Shape,
    in_channels: int,
    out_channels: int,
    mamba: MambaLayer | list[nn.Module],
    deep_supervision: bool,
    all_heads: bool,
    size: str,
    stem_channels: int | None,
) -> UNet:
    """The network; mamba is Bot's layer or the list of Enc's, all_heads makes those that only deep supervision uses in any case."""
    features, n, stem_channels = shape.features, len(shape.features), stem_channels or shape.features[0]

    def level(channels_in, channels, kernel, stride, count):
        more = [BasicBlock(layers, channels, kernel) for _ in range(count - 1)]
        return nn.Sequential(ResBlock(layers, channels_in, channels, kernel, stride), *more)

    stem = level(in_channels, stem_channels, shape.kernels[0], 1, shape.blocks[0])
    before = [stem_channels, *features]
    stages = [level(before[s], features[s], shape.kernels[s], shape.strides[s], shape.blocks[s]) for s in range(n)]
    parts, bottleneck = (stem, stages, features, shape.strides), None
    if isinstance(mamba, MambaLayer):
        encoder, bottleneck = Encoder(*parts), mamba
    else:
        encoder = UMambaEncoder(*parts, mamba_layers=mamba)
    ups, up_stages, heads = [], [], []
    joins = [len(shape.strides[0]) == 3 or s > 0 for s in range(n - 2, -1, -1)]
    for s, join, count in zip(range(n - 2, -1, -1), joins, shape.decoder_blocks, strict=True):
        ups.append(Upsample(layers, features[s + 1], features[s], shape.strides[s + 1]))
        up_stages.append(level(features[s] * (2 if join else 1), features[s], shape.kernels[s], 1, count))
        heads.append(layers.conv(features[s], out_channels, 1) if all_heads or s == 0 else None)
    return UNet(encoder, Decoder(ups, up_stages, heads, joins, deep_supervision), bottleneck, size)


def _mamba_layers(shape: Shape, size: Sequence[int | float]) -> list[nn.Module]:
    """Enc's layer after each stage, for an input size; infinite sizes have no channel tokens."""
    layers, dims, n = [], len(size), len(shape.features)
    for s, (channels, stride) in enumerate(zip(shape.features, shape.strides, strict=True)):
        size = [a if a == math.inf else a // b for a, b in zip(size, stride, strict=True)]
        voxels = math.prod(size)
        if dims == 2 and s % 2 == n % 2:
            layers.append(nn.Identity())
        elif voxels <= channels:
            layers.append(MambaLayer(voxels, channel_tokens=True))
        else:
            layers.append(MambaLayer(channels))
    return layers


def _maker(kind: Callable[..., nn.Module] | None, kwargs: dict | None) -> Callable[..., nn.Module]:
    """kind with its keywords; None makes nothing."""
    return partial(kind or nn.Identity, **(kwargs or {}))


def _class(name: str, given):
    """A class, or one of torch.nn by name, in nnU-Net's long form too ("torch.nn.modules.conv.Conv3d")."""
    if given is None or not isinstance(given, str):
        return given
    found = getattr(nn, given.rsplit(".", 1)[-1], None)
    if found is None:
        raise ValueError(f"{name}: expected a class of torch.nn, got {given!r}")
    return found


def _per_axis(name: str, value, stages: int, dims: int) -> list[tuple[int, ...]]:
    """One tuple per stage with one entry per axis, from an int, a list of ints or a list of lists."""
    out = [(v,) * dims if isinstance(v, int) else tuple(v) for v in _per_stage(name, value, stages)]
    for v in out:
        if len(v) != dims:
            raise ValueError(f"{name}: expected {dims} values for each stage, got {v}")
    return out


def _per_stage(name: str, value, stages: int) -> list:
    """A new list with one entry per stage, from one value or a list."""
    value = [value] * stages if isinstance(value, int) else list(value)
    if len(value) != stages:
        raise ValueError(f"{name}: expected one entry for each of {stages} stages, got {len(value)}")
    return value
