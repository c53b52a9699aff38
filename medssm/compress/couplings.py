"""What each block and network of the house does with channels: the declarations from which `groups` finds what can only be removed together.

A declaration takes the channels of the block's input and gives those of its output, and calls the blocks inside it in the order of their `forward`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from medssm.compress.groups import Channels, Group, Groups, Norm, resize, rows, total
from medssm.errors import UserError
from medssm.models import efficientvit_seg, segmamba, umamba
from medssm.models.monai import Padded
from medssm.models.vmunet import VMUNet
from medssm.nn import (
    MLLA,
    SSND,
    BiMamba,
    Classifier,
    Decoder,
    DeltaNet,
    Encoder,
    GatedLinearAttention,
    Mamba,
    Mamba2,
    Mamba3,
    SpatialMix,
    TriMamba,
    UNet,
    efficientvit,
)
from medssm.nn.blocks import ChannelLinear, ChannelNorm, ChannelsLast, ConvBlock, ConvNorm, DenseBlock, Down, MixerBlock, Up
from medssm.nn.bottleneck import Bottleneck
from medssm.nn.convolution import Conv3d, ConvTranspose2d, ConvTranspose3d
from medssm.nn.efficientvit import EfficientViTBlock, LiteMLA, MBConv, Residual
from medssm.nn.instance_norm import InstanceNorm2d, InstanceNorm3d
from medssm.nn.residual import BasicBlock, ConvDropoutNorm, ResBlock, Upsample
from medssm.nn.unetr import ResidualBlock
from medssm.nn.vss import PatchExpand, PatchMerging, VSSBlock


def groups_of(network: nn.Module, in_channels: int) -> Groups:
    """The groups of a network whose images have so many channels. Raises UserError where a block declares nothing."""
    declarations = DECLARATIONS
    if any(type(module).__module__.startswith("monai.") for module in network.modules()):
        from medssm.compress import couplings_monai  # MONAI is optional

        declarations = declarations | couplings_monai.DECLARATIONS
    groups = Groups(network, declarations)
    groups.pass_through(network, (Group("image", in_channels, "fixed"),))
    return groups


def _same(groups: Groups, layer: nn.Module, x: Channels) -> Channels:
    return x


def _sequence(groups: Groups, layers: Any, x: Channels) -> Channels:
    for layer in layers:
        x = groups.pass_through(layer, x)
    return x


def _linear(groups: Groups, layer: nn.Linear, x: Channels) -> Channels:
    return groups.linear(layer, x)


# Blocks


def _conv_norm(groups: Groups, block: ConvNorm, x: Channels, out: Channels | None = None) -> Channels:
    y = groups.convolution(block.conv, x, out)
    return y if block.norm is None else groups.each(block.norm, y)


def _dense(groups: Groups, block: DenseBlock, x: Channels) -> Channels:
    hidden = groups.each(block.norm1, groups.convolution(block.conv1, x))
    out = x if isinstance(block.skip, nn.Identity) else groups.pass_through(block.skip, x)
    return groups.each(block.norm2, groups.convolution(block.conv2, hidden, out))


def _conv_block(groups: Groups, block: ConvBlock, x: Channels) -> Channels:
    groups.each(block.norm, groups.convolution(block.conv, x))
    return groups.linear(block.down, groups.linear(block.up, x), x)


def _mixer_block(groups: Groups, block: MixerBlock, x: Channels) -> Channels:
    groups.each(block.norm, x)
    groups.pass_through(block.mixer, x)
    return groups.pass_through(block.local, x)


def _up(groups: Groups, layer: Up, x: Channels) -> Channels:
    return groups.linear(layer.linear, x, repeat=math.prod(layer.stride))


def _bottleneck(groups: Groups, mixer: Bottleneck, x: Channels) -> Channels:
    return groups.linear(mixer.up, groups.convolution(mixer.conv, groups.linear(mixer.down, x)), x)


# Mixers: channels in and out are the same


def _ssnd(groups: Groups, mixer: SSND, x: Channels) -> Channels:
    k, rank, inner, state = len(mixer.orders), mixer.dt_rank, mixer.out_proj.in_features, mixer.d_state
    channels, states = groups.new(mixer, inner, what="inner"), groups.new(mixer, state, "states", what="states")
    groups.linear(mixer.in_proj, x, (channels,), repeat=2 if mixer.gate else 1)
    if hasattr(mixer, f"conv{mixer.spatial_dims}d"):
        groups.each(getattr(mixer, f"conv{mixer.spatial_dims}d"), (channels,))
    groups.take(channels, mixer, "x_proj_weight", 2)
    groups.take(states, mixer, "x_proj_weight", 1, rows([rank, rank + state], state))
    for name in ("dt_projs_weight", "dt_projs_bias"):
        groups.take(channels, mixer, name, 1)
    for name in ("A_logs", "Ds"):
        groups.along((channels,), mixer, name, 0, repeat=k)
    groups.take(states, mixer, "A_logs", 1)
    groups.linear(mixer.out_proj, groups.each(mixer.out_norm, (channels,)), x)
    groups.after(lambda: setattr(mixer, "d_state", mixer.A_logs.shape[1]))
    return x


def _mamba(groups: Groups, mixer: Mamba, x: Channels) -> Channels:
    rank, state = mixer.dt_rank, mixer.d_state
    channels, states = groups.new(mixer, mixer.out_proj.in_features, what="inner"), groups.new(mixer, state, "states", what="states")
    groups.linear(mixer.in_proj, x, (channels,), repeat=2)
    for suffix in mixer.suffixes:
        groups.each(getattr(mixer, f"conv1d{suffix}"), (channels,))
        project = getattr(mixer, f"x_proj{suffix}")
        groups.take(channels, project, "weight", 1)
        groups.take(states, project, "weight", 0, rows([rank, rank + state], state))
        groups.each(getattr(mixer, f"dt_proj{suffix}"), (channels,))
        groups.take(channels, mixer, f"A{suffix}_log", 0)
        groups.take(states, mixer, f"A{suffix}_log", 1)
        groups.take(channels, mixer, f"D{suffix}")
        groups.after(lambda project=project: resize(project))  # type: ignore[misc]
    groups.linear(mixer.out_proj, (channels,), x)
    groups.after(lambda: setattr(mixer, "d_state", mixer.A_log.shape[1]))
    groups.after(lambda: setattr(mixer, "d_model", mixer.out_proj.out_features))
    return x


def _mamba2(groups: Groups, mixer: Mamba2, x: Channels) -> Channels:
    (inner, mixed, count), state, width, shared = mixer.split, mixer.d_state, mixer.headdim, mixer.ngroups
    heads = groups.new(mixer, count, "heads", banks=shared, what="heads")
    states = groups.new(mixer, state, "states", what="states")
    starts = [inner + step * shared * state + g * state for step in range(2) for g in range(shared)]  # of B and C, without z
    groups.along(x, mixer.in_proj, "weight", 1)
    of_head = torch.cat([rows([0, inner], count, width), rows([inner + mixed], count)], 1)
    for name in ("weight", "bias"):
        groups.take(heads, mixer.in_proj, name, 0, of_head)
        groups.take(states, mixer.in_proj, name, 0, rows([inner + start for start in starts], state))
        groups.take(heads, mixer.conv1d, name, 0, rows([0], count, width))
        groups.take(states, mixer.conv1d, name, 0, rows(starts, state))
    for name in ("dt_bias", "A_log", "D"):
        groups.take(heads, mixer, name, 0, rows([0], count, len(getattr(mixer, name)) // count))
    if mixer.norm is not None:
        groups.take(heads, mixer.norm, "weight", 0, rows([0], count, width))
    groups.take(heads, mixer.out_proj, "weight", 1, rows([0], count, width))
    for name in ("weight", "bias"):
        groups.along(x, mixer.out_proj, name)

    def update() -> None:
        for layer in (mixer.in_proj, mixer.conv1d, mixer.out_proj):
            resize(layer)
        left, channels = len(mixer.dt_bias), mixer.conv1d.in_channels
        mixer.split = (left * width, channels, left)
        mixer.d_state = (channels - left * width) // (2 * shared)

    groups.after(update)
    return x


def _mamba3(groups: Groups, mixer: Mamba3, x: Channels) -> Channels:
    """Heads alone: states turn in pairs."""
    inner, of_states, count, width = mixer.split[0], mixer.split[2], mixer.split[4], mixer.headdim
    heads = groups.new(mixer, count, "heads", banks=mixer.ngroups, what="heads")
    steps = 2 * inner + 2 * of_states  # dt, A and trap, behind z, x, B and C
    groups.along(x, mixer.in_proj, "weight", 1)
    of_head = [rows([0, inner], count, width), rows([steps, steps + count, steps + 2 * count], count)]
    groups.take(heads, mixer.in_proj, "weight", 0, torch.cat(of_head, 1))
    for name in ("dt_bias", "D", "B_bias", "C_bias", *(("mimo_x", "mimo_z", "mimo_o") if mixer.is_mimo else ())):
        groups.take(heads, mixer, name, 0)
    if mixer.is_outproj_norm:
        groups.take(heads, mixer.norm, "weight", 0, rows([0], count, width))
    groups.take(heads, mixer.out_proj, "weight", 1, rows([0], count, width))
    groups.along(x, mixer.out_proj, "weight")

    def update() -> None:
        for layer in (mixer.in_proj, mixer.out_proj):
            resize(layer)
        left = len(mixer.dt_bias)
        mixer.split = (left * width, left * width, of_states, of_states, left, left, left, mixer.split[7])
        if mixer.is_outproj_norm:
            mixer.norm.groups = left  # type: ignore[assignment]  # it is a GatedRMSNorm, a group for each head

    groups.after(update)
    return x


def _mlla(groups: Groups, mixer: MLLA, x: Channels) -> Channels:
    attention, inner = mixer.attn, mixer.out_proj.in_features
    count, width = attention.heads, inner // attention.heads
    heads = groups.new(mixer, count, "heads", what="heads")
    one = rows([0], count, width)
    layers: list[Any] = [mixer.in_proj, mixer.act_proj, mixer.dwc, attention.lepe]
    for layer in layers[:2]:
        groups.along(x, layer, "weight", 1)
    for layer in layers:
        for name in ("weight", "bias"):
            groups.take(heads, layer, name, 0, one)
    groups.take(heads, attention.qk, "weight", 1, one)
    for name in ("weight", "bias"):
        groups.take(heads, attention.qk, name, 0, rows([0, inner], count, width))
        groups.along(x, mixer.out_proj, name)
    groups.take(heads, mixer.out_proj, "weight", 1, one)
    heads.on_cut.append(attention.keep_heads)

    def update() -> None:
        for layer in (*layers, attention.qk, mixer.out_proj):
            resize(layer)

    groups.after(update)
    return x


def _gla(groups: Groups, mixer: GatedLinearAttention, x: Channels) -> Channels:
    count, keys, values = mixer.heads, mixer.q_proj.out_features, mixer.o_proj.in_features
    heads = groups.new(mixer, count, "heads", what="heads")
    states = groups.new(mixer, keys, "states", banks=count, what="keys")  # the key channels of each head
    of_head, of_value = rows([0], count, keys // count), rows([0], count, values // count)
    projections: list[Any] = [mixer.q_proj, mixer.k_proj, mixer.v_proj, *([] if mixer.g_proj is None else [mixer.g_proj])]
    for layer in projections:
        groups.along(x, layer, "weight", 1)
        groups.take(heads, layer, "weight", 0, of_head if layer in projections[:2] else of_value)
        if layer in projections[:2]:
            groups.take(states, layer, "weight")
    if mixer.decay_by == "key":
        groups.along(x, mixer.decay_in, "weight", 1)
        for name in ("decay_weight", "decay_bias"):
            groups.take(heads, mixer, name, 1, of_head)
            groups.take(states, mixer, name, 1)
    else:
        groups.along(x, mixer, "decay_weight", 2)
        for name in ("decay_weight", "decay_bias"):
            groups.take(heads, mixer, name, 1)
    groups.take(heads, mixer.o_proj, "weight", 1, of_value)
    groups.along(x, mixer.o_proj, "weight", 0)

    @torch.no_grad()
    def keep_scale(kept: torch.Tensor) -> None:
        mixer.q_proj.weight *= (len(kept) / keys) ** 0.5  # queries are scaled by the number of a head's keys, to the power of -0.5

    states.on_cut.append(keep_scale)

    def update() -> None:
        for layer in (*projections, mixer.o_proj, *([mixer.decay_in] if mixer.decay_by == "key" else [])):
            resize(layer)
        mixer.heads = mixer.o_proj.in_features // (values // count)

    groups.after(update)
    return x


def _delta(groups: Groups, mixer: DeltaNet, x: Channels) -> Channels:
    count, (keys, _, values) = mixer.heads, mixer.split
    heads = groups.new(mixer, count, "heads", what="heads")
    key, value = keys // count, values // count
    of_head = torch.cat([rows([0, keys], count, key), rows([2 * keys], count, value)], 1)
    groups.along(x, mixer.qkv_proj, "weight", 1)
    groups.take(heads, mixer.qkv_proj, "weight", 0, of_head)
    layers: list[Any] = [mixer.qkv_proj, mixer.o_proj]
    if mixer.conv is not None:
        groups.take(heads, mixer.convolution, "weight", 0, of_head)
        layers.append(mixer.convolution)
    for layer, per_channel in ((mixer.b_proj, key), (mixer.a_proj, key), (mixer.w_proj, value), (mixer.g_proj, None)):
        if layer is None:
            continue
        narrow, wide = layer if isinstance(layer, nn.Sequential) else (layer, layer)
        width = value if per_channel is None else per_channel if narrow is not wide else 1
        groups.along(x, narrow, "weight", 1)
        groups.take(heads, wide, "weight", 0, rows([0], count, width))
        layers += [narrow] if narrow is wide else [narrow, wide]
    for name, width in (("dt_bias", 1 if mixer.rule == "delta" else key), ("A_log", 1), ("k_a", key)):
        if hasattr(mixer, name):
            groups.take(heads, mixer, name, 0, rows([0], count, width))
    groups.take(heads, mixer.o_proj, "weight", 1, rows([0], count, value))
    groups.along(x, mixer.o_proj, "weight", 0)

    def update() -> None:
        for layer in layers:
            resize(layer)
        mixer.heads = mixer.o_proj.in_features // value
        mixer.split = (mixer.heads * key, mixer.heads * key, mixer.heads * value)

    groups.after(update)
    return x


def _spatial_mix(groups: Groups, mixer: SpatialMix, x: Channels) -> Channels:
    channels = groups.new(mixer, mixer.key.out_features, what="inner")
    for layer in (mixer.key, mixer.value, mixer.receptance):
        groups.linear(layer, x, (channels,))
    for name in ("spatial_decay", "spatial_first"):
        groups.take(channels, mixer, name)
    if mixer.key_norm is not None:
        groups.each(mixer.key_norm, (channels,))
    groups.linear(mixer.output, (channels,), x)
    if mixer.pixels:
        for name in "kvr":
            groups.along(x, mixer, f"spatial_mix_{name}", 2)
        for group in x:
            group.kind = "fixed"  # q_shift moves a channel by its place among all
    return x


def _lite_mla(groups: Groups, mixer: LiteMLA, x: Channels, out: Channels | None = None) -> Channels:
    count, scales = mixer.qkv.conv.out_channels // (3 * mixer.dim), 1 + len(mixer.aggreg)
    heads = groups.new(mixer, count, "heads", what="heads")
    scaled: list[Any] = list(mixer.aggreg)
    inner, grouped = [mixer.qkv.conv, *(scale[0] for scale in scaled)], [scale[1] for scale in scaled]
    groups.along(x, mixer.qkv.conv, "weight", 1)
    for layer in (*inner, *grouped):
        groups.take(heads, layer, "weight", 0, rows([0], count, 3 * mixer.dim))
    wide = count * mixer.dim
    out = (groups.new(mixer.proj, mixer.proj.conv.out_channels),) if out is None else out
    groups.take(heads, mixer.proj.conv, "weight", 1, rows([i * wide for i in range(scales)], count, mixer.dim))
    groups.along(out, mixer.proj.conv, "weight")

    def update() -> None:
        for layer in (*inner, mixer.proj.conv):
            resize(layer)
        for layer in grouped:
            layer.in_channels = layer.out_channels = len(layer.weight)
            layer.groups = len(layer.weight) // mixer.dim

    groups.after(update)
    return out if mixer.proj.norm is None else groups.each(mixer.proj.norm, out)


# Blocks of VMamba's kin


def _vss_block(groups: Groups, block: VSSBlock, x: Channels) -> Channels:
    groups.each(block.norm, x)
    groups.pass_through(block.op, x)
    if block.mlp is not None:
        groups.each(block.norm2, x)
        groups.linear(block.mlp.fc2, groups.linear(block.mlp.fc1, x), x)
    return x


def _merging(groups: Groups, layer: PatchMerging, x: Channels) -> Channels:
    parts = layer.reduction.in_features // total(x)
    for name in ("weight", "bias"):
        groups.along(x, layer.norm, name, repeat=parts)
    out = (groups.new(layer.reduction, layer.reduction.out_features),)
    groups.along(x, layer.reduction, "weight", 1, repeat=parts)
    groups.along(out, layer.reduction, "weight")

    def update() -> None:
        resize(layer.norm)
        resize(layer.reduction)

    groups.after(update)
    return out


def _expand(groups: Groups, layer: PatchExpand, x: Channels, out: Channels | None = None) -> Channels:
    return groups.each(layer.norm, groups.linear(layer.expand, x, out, repeat=math.prod(layer.stride)))


# Blocks of EfficientViT: the last layer of each adds to `out`, where there is one


def _mb_conv(groups: Groups, block: MBConv, x: Channels, out: Channels | None = None) -> Channels:
    return _conv_norm(groups, block.point_conv, _conv_norm(groups, block.depth_conv, _conv_norm(groups, block.inverted_conv, x)), out)


def _fused(groups: Groups, block: efficientvit_seg.FusedMBConv, x: Channels, out: Channels | None = None) -> Channels:
    return _conv_norm(groups, block.point_conv, _conv_norm(groups, block.spatial_conv, x), out)


def _ds_conv(groups: Groups, block: efficientvit_seg.DSConv, x: Channels, out: Channels | None = None) -> Channels:
    return _conv_norm(groups, block.point_conv, _conv_norm(groups, block.depth_conv, x), out)


def _two_convs(groups: Groups, block: efficientvit_seg.ResBlock, x: Channels, out: Channels | None = None) -> Channels:
    return _conv_norm(groups, block.conv2, _conv_norm(groups, block.conv1, x), out)


def _residual(groups: Groups, block: Residual, x: Channels) -> Channels:
    return groups.pass_through(block.main, x, x)


def _main(groups: Groups, block: efficientvit_seg._Main, x: Channels) -> Channels:
    return groups.pass_through(block.main, x)


def _efficientvit_block(groups: Groups, block: EfficientViTBlock, x: Channels) -> Channels:
    return _sequence(groups, (block.context_module, block.local_module), x)


# Networks


def _efficientvit(groups: Groups, network: efficientvit_seg.EfficientViTSeg, x: Channels) -> Channels:
    head, joined = network.seg_head, None
    mixed: list[Any] = [op[0] if isinstance(op, nn.Sequential) else op for op in head.input_ops]
    for op, found in zip(mixed, _encoder(groups, network.encoder, x)[:1:-1], strict=True):
        joined = _conv_norm(groups, op, found, joined)
    assert joined is not None
    logits = _sequence(groups, (head.middle, head.output_ops), joined)
    logits[0].kind = "fixed"
    return logits


def _vmunet(groups: Groups, network: VMUNet, x: Channels) -> Channels:
    maps = _encoder(groups, network.encoder, x)
    x = groups.pass_through(network.stages[0], maps[-1])
    sums: list[Channels | None] = [*maps[-2:0:-1], None]  # what each step's channels are added to
    for up, stage, out in zip(network.ups, network.stages[1:], sums, strict=True):
        x = groups.pass_through(stage, groups.pass_through(up, x, out))
    logits = groups.pass_through(network.final_conv, groups.pass_through(network.final_up, x))
    logits[0].kind = "fixed"
    return logits


def _padded(groups: Groups, network: Padded, x: Channels) -> Channels:
    return groups.pass_through(network.network, x)


def _encoder(groups: Groups, encoder: Encoder, x: Channels) -> list[Channels]:
    x, maps = groups.pass_through(encoder.stem, x), []
    for s, stage in enumerate(encoder.stages):
        x = groups.pass_through(stage, x)
        if isinstance(encoder, umamba.UMambaEncoder):
            x = groups.pass_through(encoder.mamba_layers[s], x)
        maps.append(x if encoder.outs is None else groups.pass_through(encoder.outs[s], x))
    groups.after(lambda: setattr(encoder, "output_channels", [total(m) for m in maps]))
    return maps


def _decoder(groups: Groups, decoder: Decoder, maps: list[Channels]) -> Channels:
    x: Channels = maps[-1]
    logits: Channels = ()
    for s, (up, stage, head, join) in enumerate(zip(decoder.upsample_layers, decoder.stages, decoder.seg_layers, decoder.joins, strict=True)):
        if join == "sum":
            raise UserError("prune: a decoder that adds its skips declares no coupled channels")
        x = groups.pass_through(up, x)
        x = groups.pass_through(stage, x + maps[-(s + 2)] if join else x)
        if isinstance(head, nn.Module):
            logits = groups.pass_through(head, x)
            for group in logits:
                group.kind = "fixed"
    return logits


def _unet(groups: Groups, network: UNet, x: Channels) -> Channels:
    if type(network.encoder) not in (Encoder, umamba.UMambaEncoder):
        groups.pass_through(network.encoder, x)  # which refuses it
    maps = _encoder(groups, network.encoder, x)
    if network.skips is not None:
        maps = [x, *maps] if len(network.skips) > len(maps) else maps
        maps = [groups.pass_through(skip, m) for skip, m in zip(network.skips, maps, strict=True)]
    if network.bottleneck is not None:
        maps[-1] = groups.pass_through(network.bottleneck, maps[-1])
    return _decoder(groups, network.decoder, maps)


def _classifier(groups: Groups, network: Classifier, x: Channels) -> Channels:
    found = groups.linear(network.head, groups.pass_through(network.norm, _encoder(groups, network.encoder, x)[-1]))
    found[0].kind = "fixed"
    return found


def _res_block(groups: Groups, block: ResBlock, x: Channels) -> Channels:
    hidden = groups.pass_through(block.norm1, groups.pass_through(block.conv1, x))
    out = groups.pass_through(block.conv3, x)
    return groups.pass_through(block.norm2, groups.convolution(block.conv2, hidden, out))


def _conv_dropout_norm(groups: Groups, block: ConvDropoutNorm, x: Channels, out: Channels | None = None) -> Channels:
    return groups.pass_through(block.norm, groups.convolution(block.conv, x, out))


def _basic(groups: Groups, block: BasicBlock, x: Channels) -> Channels:
    return _conv_dropout_norm(groups, block.conv2, _conv_dropout_norm(groups, block.conv1, x), x)


def _upsample(groups: Groups, layer: Upsample, x: Channels) -> Channels:
    return groups.pass_through(layer.conv, x)


def _umamba_layer(groups: Groups, layer: umamba.MambaLayer, x: Channels) -> Channels:
    if layer.channel_tokens:
        raise UserError("prune: a MambaLayer over channels as tokens works at one input size, and declares no coupled channels")
    groups.after(lambda: setattr(layer, "dim", layer.mamba.d_model))
    return groups.pass_through(layer.mamba, groups.each(layer.norm, x))


def _unetr(groups: Groups, block: ResidualBlock, x: Channels) -> Channels:
    hidden = groups.each(block.norm1, groups.convolution(block.conv1, x))
    if block.conv3 is None or block.norm3 is None:
        return groups.each(block.norm2, groups.convolution(block.conv2, hidden, x if block.residual else None))
    out = groups.each(block.norm3, groups.convolution(block.conv3, x))
    return groups.each(block.norm2, groups.convolution(block.conv2, hidden, out))


def _segmamba_stage(groups: Groups, stage: segmamba.Stage, x: Channels) -> Channels:
    return _sequence(groups, (stage.down, stage.gsc, stage.layers), x)


def _spatial_gate(groups: Groups, block: segmamba.GatedSpatialConv, x: Channels) -> Channels:
    joined = groups.convolution(block.proj3, x)
    groups.convolution(block.proj2, groups.convolution(block.proj, x), joined)
    return groups.convolution(block.proj4, joined, x)


def _segmamba_layer(groups: Groups, layer: segmamba.MambaLayer, x: Channels) -> Channels:
    return groups.pass_through(layer.mamba, groups.each(layer.norm, x))


def _segmamba_out(groups: Groups, out: segmamba.Out, x: Channels) -> Channels:
    return groups.convolution(out.fc2, groups.convolution(out.fc1, x))


DECLARATIONS: dict[type[nn.Module], Callable[..., Channels]] = {
    **dict.fromkeys([nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, ChannelsLast], _same),
    **dict.fromkeys([nn.Sequential, Down], _sequence),
    **dict.fromkeys([nn.Conv2d, nn.Conv3d, Conv3d], Groups.convolution),
    **dict.fromkeys([nn.ConvTranspose2d, nn.ConvTranspose3d, ConvTranspose2d, ConvTranspose3d], Groups.transposed),
    **dict.fromkeys([*Norm, ChannelNorm, InstanceNorm2d, InstanceNorm3d], Groups.each),
    **dict.fromkeys([nn.Linear, ChannelLinear], _linear),
    ConvNorm: _conv_norm,
    DenseBlock: _dense,
    ConvBlock: _conv_block,
    MixerBlock: _mixer_block,
    Up: _up,
    Bottleneck: _bottleneck,
    SSND: _ssnd,
    **dict.fromkeys([Mamba, BiMamba, TriMamba], _mamba),
    Mamba2: _mamba2,
    Mamba3: _mamba3,
    MLLA: _mlla,
    GatedLinearAttention: _gla,
    DeltaNet: _delta,
    SpatialMix: _spatial_mix,
    VSSBlock: _vss_block,
    PatchMerging: _merging,
    PatchExpand: _expand,
    EfficientViTBlock: _efficientvit_block,
    **dict.fromkeys([LiteMLA, efficientvit._OnImages], _lite_mla),
    MBConv: _mb_conv,
    efficientvit_seg.FusedMBConv: _fused,
    efficientvit_seg.DSConv: _ds_conv,
    efficientvit_seg.ResBlock: _two_convs,
    Residual: _residual,
    efficientvit_seg._Main: _main,
    efficientvit_seg.EfficientViTSeg: _efficientvit,
    VMUNet: _vmunet,
    Padded: _padded,
    UNet: _unet,
    Classifier: _classifier,
    ResBlock: _res_block,
    ConvDropoutNorm: _conv_dropout_norm,
    BasicBlock: _basic,
    Upsample: _upsample,
    umamba.MambaLayer: _umamba_layer,
    ResidualBlock: _unetr,
    segmamba.Stage: _segmamba_stage,
    segmamba.GatedSpatialConv: _spatial_gate,
    segmamba.MambaLayer: _segmamba_layer,
    segmamba.Out: _segmamba_out,
}
