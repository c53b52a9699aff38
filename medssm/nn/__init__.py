"""Layers: mixers (a sequence op between projections), blocks, norms and the U-Net assembler. Tokens are channel-last."""

from medssm.nn.classifier import Classifier
from medssm.nn.mamba import BiMamba, Mamba, TriMamba
from medssm.nn.ssnd import SSND
from medssm.nn.unet import AnySize, Decoder, Encoder, UNet
from medssm.nn.vss import VSSBlock

__all__ = ["SSND", "AnySize", "BiMamba", "Classifier", "Decoder", "Encoder", "Mamba", "TriMamba", "UNet", "VSSBlock"]
