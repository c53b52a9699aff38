"""What the blocks of MONAI's BasicUNet, DynUNet and SegResNet do with channels: declarations as those in `couplings`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from monai.networks.blocks import ADN, Convolution, UpSample
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetOutBlock, UnetResBlock, UnetUpBlock
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets import basic_unet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from torch import nn

from medssm.compress.groups import Channels, Groups


def _sequence(groups: Groups, layers: Any, x: Channels, out: Channels | None = None) -> Channels:
    """The layers, one after the other; the last one that has channels of its own adds to `out`."""
    layers = list(layers)
    writes = [i for i, layer in enumerate(layers) if isinstance(layer, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d))]
    for i, layer in enumerate(layers):
        if out is not None and writes and i == writes[-1]:
            x = (groups.transposed if isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d)) else groups.convolution)(layer, x, out)
        else:
            x = groups.pass_through(layer, x)
    return x


def _activation(groups: Groups, layer: nn.PReLU, x: Channels) -> Channels:
    return x if layer.num_parameters == 1 else groups.each(layer, x)


def _output(groups: Groups, layer: nn.Module, x: Channels) -> Channels:
    found = groups.pass_through(layer, x)
    for group in found:
        group.kind = "fixed"
    return found


def _up_cat(groups: Groups, block: basic_unet.UpCat, x: Channels, skip: Channels) -> Channels:
    return groups.pass_through(block.convs, skip + groups.pass_through(block.upsample, x))


def _basic_unet(groups: Groups, network: basic_unet.BasicUNet, x: Channels) -> Channels:
    maps = [groups.pass_through(network.conv_0, x)]
    for down in (network.down_1, network.down_2, network.down_3, network.down_4):
        maps.append(groups.pass_through(down, maps[-1]))
    x = maps.pop()
    for up in (network.upcat_4, network.upcat_3, network.upcat_2, network.upcat_1):
        x = _up_cat(groups, up, x, maps.pop())
    return _output(groups, network.final_conv, x)


def _unet_basic(groups: Groups, block: UnetBasicBlock, x: Channels) -> Channels:
    x = groups.pass_through(block.norm1, groups.pass_through(block.conv1, x))
    return groups.pass_through(block.norm2, groups.pass_through(block.conv2, x))


def _unet_residual(groups: Groups, block: UnetResBlock, x: Channels) -> Channels:
    hidden = groups.pass_through(block.norm1, groups.pass_through(block.conv1, x))
    out = groups.pass_through(block.norm3, groups.pass_through(block.conv3, x)) if block.downsample else x
    return groups.pass_through(block.norm2, _sequence(groups, block.conv2, hidden, out))


def _unet_out(groups: Groups, block: UnetOutBlock, x: Channels) -> Channels:
    return _output(groups, block.conv, x)


def _dynunet(groups: Groups, network: DynUNet, x: Channels) -> Channels:
    maps = []
    for block in (network.input_block, *network.downsamples):
        x = groups.pass_through(block, x)
        maps.append(x)
    x = groups.pass_through(network.bottleneck, x)
    levels = []  # of the decoder, from coarse to fine
    for up, skip in zip(network.upsamples, reversed(maps), strict=True):
        assert isinstance(up, UnetUpBlock)
        x = groups.pass_through(up.conv_block, groups.pass_through(up.transp_conv, x) + skip)
        levels.append(x)
    if network.deep_supervision:
        for head, level in zip(network.deep_supervision_heads, levels[-2::-1], strict=False):
            groups.pass_through(head, level)
    return groups.pass_through(network.output_block, x)


def _segresnet_block(groups: Groups, block: ResBlock, x: Channels) -> Channels:
    hidden = groups.pass_through(block.conv1, groups.pass_through(block.norm1, x))
    return _sequence(groups, block.conv2, groups.pass_through(block.norm2, hidden), x)


def _segresnet(groups: Groups, network: SegResNet, x: Channels) -> Channels:
    x, maps = groups.pass_through(network.convInit, x), []
    for down in network.down_layers:
        x = groups.pass_through(down, x)
        maps.append(x)
    maps.pop()
    for up, layers in zip(network.up_samples, network.up_layers, strict=True):
        steps = [layer for part in up for layer in part]  # of its convolution and its UpSample
        x = groups.pass_through(layers, _sequence(groups, steps, x, maps.pop()))
    return _output(groups, network.conv_final, x) if network.use_conv_final else x


DECLARATIONS: dict[type[nn.Module], Callable[..., Channels]] = {
    **dict.fromkeys([Convolution, ADN, UpSample, basic_unet.TwoConv, basic_unet.Down], _sequence),
    **dict.fromkeys([nn.Upsample, nn.MaxPool2d, nn.MaxPool3d], lambda groups, layer, x: x),
    nn.PReLU: _activation,
    nn.GroupNorm: Groups.in_parts,
    basic_unet.BasicUNet: _basic_unet,
    UnetBasicBlock: _unet_basic,
    UnetResBlock: _unet_residual,
    UnetOutBlock: _unet_out,
    DynUNet: _dynunet,
    ResBlock: _segresnet_block,
    SegResNet: _segresnet,
}
