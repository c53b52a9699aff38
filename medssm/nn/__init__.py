"""Layers: mixers (a sequence op between projections), blocks, norms and the U-Net assembler. Tokens are channel-last."""

from medssm.nn.classifier import Classifier
from medssm.nn.deltanet import DeltaNet
from medssm.nn.efficientvit import EfficientViTBlock, LiteMLA
from medssm.nn.epa import PairedAttention, PairedBlock
from medssm.nn.gla import GatedLinearAttention
from medssm.nn.mamba import BiMamba, FlipMamba, Mamba, TriMamba
from medssm.nn.mamba2 import Mamba2
from medssm.nn.mamba3 import Mamba3
from medssm.nn.mlla import MLLA, LinearAttention, MLLABlock
from medssm.nn.rwkv import ChannelMix, SpatialMix, q_shift
from medssm.nn.ssnd import SSND
from medssm.nn.unet import AnySize, Decoder, Encoder, UNet
from medssm.nn.vss import VSSBlock

__all__ = [
    "MLLA",
    "SSND",
    "AnySize",
    "BiMamba",
    "ChannelMix",
    "Classifier",
    "Decoder",
    "DeltaNet",
    "EfficientViTBlock",
    "Encoder",
    "FlipMamba",
    "GatedLinearAttention",
    "LinearAttention",
    "LiteMLA",
    "MLLABlock",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "PairedAttention",
    "PairedBlock",
    "SpatialMix",
    "TriMamba",
    "UNet",
    "VSSBlock",
    "q_shift",
]
