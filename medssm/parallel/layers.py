"""The layers that compute on a slab what they compute on the whole volume."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from medssm.nn import blocks, convolution, deltanet, gla, instance_norm, mamba, mamba2, mamba3, mlla, rwkv, ssnd, unet

# Each was read for what it does along space: voxel by voxel, by functions of medssm.parallel.functions, or by ops of medssm.ops.
KNOWN: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(convolution.Conv3d, convolution.ConvTranspose2d, convolution.ConvTranspose3d),
    *(nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
    *(instance_norm.InstanceNorm2d, instance_norm.InstanceNorm3d),
    *(nn.MaxPool2d, nn.MaxPool3d, nn.Linear, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish),
    *(nn.Dropout, nn.Dropout2d, nn.Dropout3d),
    *(unet.UNet, unet.Encoder, unet.Decoder),
    *(blocks.ChannelNorm, blocks.ConvNorm, blocks.DenseBlock, blocks.ConvBlock, blocks.MixerBlock, blocks.Down, blocks.Up, blocks.ChannelsLast),
    *(ssnd.SSND, gla.GatedLinearAttention, deltanet.DeltaNet, mamba2.Mamba2, mamba2.GatedRMSNorm, mamba3.Mamba3),
    *(mlla.MLLA, mlla.LinearAttention, rwkv.SpatialMix, rwkv.ChannelMix, mamba.Mamba, mamba.BiMamba, mamba.TriMamba),
)


def check(network: nn.Module, also: Sequence[type[nn.Module]] = ()) -> None:
    """Raise ValueError that names the first layer of which it is not known that it can work on slabs."""
    for name, layer in network.named_modules():
        where = f"{name or 'the network'} ({type(layer).__name__})"
        if type(layer) not in KNOWN and type(layer) not in also:
            raise ValueError(f"network: {where} is no layer that is known to work on slabs; pass its class as `also` if it works voxel by voxel")
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            raise ValueError(f"network: {where}: expected padding with zeros, got padding_mode={layer.padding_mode!r}")
