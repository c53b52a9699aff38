"""Layers: mixers (a sequence op between projections), blocks, norms and the U-Net assembler. Tokens are channel-last."""

from medssm.nn.mamba import BiMamba, Mamba, TriMamba
from medssm.nn.ssnd import SSND
from medssm.nn.unet import Decoder, Encoder, UNet

__all__ = ["SSND", "BiMamba", "Decoder", "Encoder", "Mamba", "TriMamba", "UNet"]
