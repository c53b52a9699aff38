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
from collections.abc import Sequence

import torch
from torch import nn

from medssm.nn import Decoder, Encoder, Mamba, UNet

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}


class ResBlock(nn.Module):
    """conv, norm, act, conv, norm, plus a 1 x 1 convolution of the input, act. The first and the last convolution take the stride."""

    def __init__(self, spec: Spec, channels_in: int, channels: int, kernel, stride=1):
        super().__init__()
        pad = [k // 2 for k in kernel]
        self.conv1 = spec.conv(channels_in, channels, kernel, stride, pad)
        self.norm1 = spec.norm(channels)
        self.act1 = spec.act()
        self.conv2 = spec.conv(channels, channels, kernel, 1, pad)
        self.norm2 = spec.norm(channels)
        self.act2 = spec.act()
        self.conv3 = spec.conv(channels_in, channels, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(y + self.conv3(x))


class ConvNorm(nn.Module):
    """conv, dropout if any, norm, act if asked."""

    def __init__(self, spec: Spec, channels: int, kernel, act: bool):
        super().__init__()
        self.conv = spec.conv(channels, channels, kernel, 1, [k // 2 for k in kernel], bias=spec.conv_bias)
        self.dropout = spec.dropout()
        self.norm = spec.norm(channels)
        self.act = spec.act() if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.dropout(self.conv(x))))


class BasicBlock(nn.Module):
    """Two convolutions and the input itself."""

    def __init__(self, spec: Spec, channels: int, kernel):
        super().__init__()
        self.conv1 = ConvNorm(spec, channels, kernel, act=True)
        self.conv2 = ConvNorm(spec, channels, kernel, act=False)
        self.act = spec.act()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv2(self.conv1(x)) + x)


class Upsample(nn.Module):
    """Nearest neighbours, then a 1 x 1 convolution."""

    def __init__(self, spec: Spec, channels_in: int, channels: int, stride):
        super().__init__()
        self.conv, self.stride = spec.conv(channels_in, channels, 1), tuple(float(s) for s in stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(nn.functional.interpolate(x, scale_factor=self.stride, mode="nearest"))


class MambaLayer(nn.Module):
    """LayerNorm and Mamba over the voxels as tokens, or over the channels, on (b, c, *spatial). `dim` is the size of a token."""

    def __init__(self, dim: int, channel_tokens: bool = False):
        super().__init__()
        self.dim, self.channel_tokens = dim, channel_tokens
        self.norm = nn.LayerNorm(dim)
        self.mamba = Mamba(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.channel_tokens:
            tokens = x.flatten(2)
            if tokens.shape[-1] != self.dim:
                raise ValueError(
                    f"x: expected a map of {self.dim} voxels, which these channel-token weights are made for, got {tuple(x.shape[2:])}; "
                    "use the input size of the training"
                )
            return self.mamba(self.norm(tokens)).reshape(x.shape)
        return self.mamba(self.norm(x.movedim(1, -1))).movedim(-1, 1)


class Spec:
    """The kind of convolution, norm, activation and dropout that all blocks share."""

    def __init__(self, spatial_dims: int, conv_bias: bool, norm, norm_kwargs, act, act_kwargs, dropout, dropout_kwargs):
        self.conv, self.conv_bias = _CONV[spatial_dims], conv_bias
        self._norm, self._norm_kwargs = norm, norm_kwargs or {}
        self._act, self._act_kwargs = act, act_kwargs or {}
        self._dropout, self._dropout_kwargs = dropout, dropout_kwargs or {}

    def norm(self, channels: int) -> nn.Module:
        return nn.Identity() if self._norm is None else self._norm(channels, **self._norm_kwargs)

    def act(self) -> nn.Module:
        return nn.Identity() if self._act is None else self._act(**self._act_kwargs)

    def dropout(self) -> nn.Module:
        return nn.Identity() if self._dropout is None else self._dropout(**self._dropout_kwargs)


class UMambaEncoder(Encoder):
    """An encoder with a MambaLayer, or nothing, after each stage."""

    def __init__(self, *args, mamba_layers: Sequence[nn.Module]):
        super().__init__(*args)
        self.mamba_layers = nn.ModuleList(mamba_layers)

    def stage(self, s: int, x: torch.Tensor) -> torch.Tensor:
        return self.mamba_layers[s](self.stages[s](x))


def _assemble(
    spec: Spec,
    spatial_dims,
    in_channels,
    out_channels,
    features,
    kernels,
    strides,
    blocks,
    decoder_blocks,
    deep_supervision,
    size,
    stem_channels,
    mamba,
    joins,
):
    """The network; mamba is "bot", or the list of Enc's layers."""
    stem_channels, finest = stem_channels or features[0], len(features) - 2

    def level(channels_in, channels, kernel, stride, count):
        return nn.Sequential(ResBlock(spec, channels_in, channels, kernel, stride), *(BasicBlock(spec, channels, kernel) for _ in range(count - 1)))

    stem = level(in_channels, stem_channels, kernels[0], 1, blocks[0])
    stages = [level(([stem_channels, *features])[s], features[s], kernels[s], strides[s], blocks[s]) for s in range(len(features))]
    parts = (stem, stages, features, strides)
    encoder = Encoder(*parts) if mamba == "bot" else UMambaEncoder(*parts, mamba_layers=mamba)
    ups, up_stages, heads = [], [], []
    for s in range(finest + 1):
        below, skip = features[-(s + 1)], features[-(s + 2)]
        ups.append(Upsample(spec, below, skip, strides[-(s + 1)]))
        up_stages.append(level(skip * (2 if joins[s] else 1), skip, kernels[-(s + 2)], 1, decoder_blocks[s]))
        heads.append(spec.conv(skip, out_channels, 1))
    decoder = Decoder(ups, up_stages, heads, joins, deep_supervision)
    return UNet(encoder, decoder, MambaLayer(features[-1]) if mamba == "bot" else None, size)


def umamba(
    kind: str,
    *,
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    features: Sequence[int] = (32, 64, 128, 256, 320, 320),
    strides=None,
    kernels=None,
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
    size: str = "any",
    stem_channels: int | None = None,
    channel_token_size: Sequence[int] | None = None,
) -> UNet:
    """U-Mamba for any input size: kind "bot" or "enc".

    features, strides, kernels, blocks (convolutional blocks) are lists with one entry per stage, decoder_blocks one fewer; an int serves all.
    strides default to 1 then 2; an entry is an int or one per axis. channel_token_size: the input size for which stages whose map has at
    most as many voxels as channels take channels as tokens (upstream's Enc; None: never).
    """
    if spatial_dims not in _CONV:
        raise ValueError(f"spatial_dims: expected 2 or 3, got {spatial_dims!r}")
    n = len(features)
    strides = _per_stage("strides", [1] + [2] * (n - 1) if strides is None else strides, n, spatial_dims)
    kernels = _per_stage("kernels", 3 if kernels is None else kernels, n, spatial_dims)
    blocks, decoder_blocks = _counts("blocks", blocks, n), _counts("decoder_blocks", decoder_blocks, n - 1)
    if norm is None:
        norm, norm_kwargs = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[spatial_dims], norm_kwargs or {"eps": 1e-5, "affine": True}
    spec = Spec(
        spatial_dims,
        conv_bias,
        norm,
        norm_kwargs,
        act,
        {"inplace": True} if act is nn.LeakyReLU and act_kwargs is None else act_kwargs,
        dropout,
        dropout_kwargs,
    )
    mamba, joins = "bot", [True] * (n - 1)
    if spatial_dims == 2:
        joins[-1] = False
    if kind == "enc":
        mamba, shape = [], list(channel_token_size or [math.inf] * spatial_dims)
        for s in range(n):
            shape = [a // b if a != math.inf else a for a, b in zip(shape, strides[s], strict=True)]
            voxels = math.prod(shape)
            if spatial_dims == 2 and s % 2 == n % 2:
                mamba.append(nn.Identity())
            elif voxels <= features[s]:
                mamba.append(MambaLayer(voxels, channel_tokens=True))
            else:
                mamba.append(MambaLayer(features[s]))
    return _assemble(
        spec,
        spatial_dims,
        in_channels,
        out_channels,
        list(features),
        kernels,
        strides,
        blocks,
        decoder_blocks,
        deep_supervision,
        size,
        stem_channels,
        mamba,
        joins,
    )


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
    dims = {"Conv2d": 2, "Conv3d": 3}.get(conv_op if isinstance(conv_op, str) else conv_op.__name__)
    if dims is None:
        raise ValueError(f"conv_op: expected Conv2d or Conv3d, got {conv_op!r}")
    if kind == "enc" and input_size is None:
        raise ValueError("input_size: expected the patch size that the network was made for, got None")
    features = [features_per_stage * 2**s for s in range(n_stages)] if isinstance(features_per_stage, int) else list(features_per_stage)
    blocks, decoder_blocks = (
        _counts("n_conv_per_stage", n_conv_per_stage, n_stages),
        _counts("n_conv_per_stage_decoder", n_conv_per_stage_decoder, n_stages - 1),
    )
    for s in range(math.ceil(n_stages / 2), n_stages):
        blocks[s] = 1
    for s in range(math.ceil((n_stages - 1) / 2 + 0.5), n_stages - 1):
        decoder_blocks[s] = 1
    return umamba(
        kind,
        spatial_dims=dims,
        in_channels=input_channels,
        out_channels=num_classes,
        features=features,
        strides=strides,
        kernels=kernel_sizes,
        blocks=blocks,
        decoder_blocks=decoder_blocks,
        conv_bias=conv_bias,
        norm=_class(norm_op),
        norm_kwargs=norm_op_kwargs,
        act=_class(nonlin),
        act_kwargs=nonlin_kwargs or {},
        dropout=_class(dropout_op),
        dropout_kwargs=dropout_op_kwargs,
        deep_supervision=deep_supervision,
        stem_channels=stem_channels,
        channel_token_size=input_size,
    )


def _class(given):
    """A torch.nn class by itself or by name, in nnU-Net's long form too ("torch.nn.modules.conv.Conv3d")."""
    if given is None or not isinstance(given, str):
        return given
    found = getattr(nn, given.rsplit(".", 1)[-1], None)
    if found is None:
        raise ValueError(f"expected a class of torch.nn, got {given!r}")
    return found


def _per_stage(name, value, stages, dims) -> list[tuple[int, ...]]:
    """One tuple per stage, one entry per axis, from an int, a list of ints or a list of lists."""
    value = [value] * stages if isinstance(value, int) else list(value)
    if len(value) != stages:
        raise ValueError(f"{name}: expected one entry for each of {stages} stages, got {len(value)}")
    out = [(v,) * dims if isinstance(v, int) else tuple(v) for v in value]
    for v in out:
        if len(v) != dims:
            raise ValueError(f"{name}: expected {dims} values per stage, got {v}")
    return out


def _counts(name, value, stages) -> list[int]:
    value = [value] * stages if isinstance(value, int) else list(value)
    if len(value) != stages:
        raise ValueError(f"{name}: expected one entry for each of {stages} stages, got {len(value)}")
    return value
