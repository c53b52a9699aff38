"""MALUNet (Ruan et al., arXiv 2211.01784): a sixth of a million parameters, dilated gated attention and external attention; 2D, here 3D too.

What upstream's code does beside the paper: its sigmoid is inside the network, whatever the number of classes, and inputs must be multiples of 32;
keys and values of external attention have one memory until the network moves to a GPU, so that on a CPU the values loaded last are those of both.
`create_model` gives logits for any size, and its keys and values only start as the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssm.kernels.dtypes import compute_dtype
from medssm.models.facts import Facts
from medssm.models.options import only
from medssm.models.registry import register_model, register_upstream
from medssm.models.ultralight_vmunet import LEVELS
from medssm.models.weights import Map
from medssm.nn.blocks import CONV, check_dims
from medssm.nn.leaf import Leaf
from medssm.nn.light import GROUPS, LightUNet, SkipAttention

_DILATIONS = (7, 5, 2, 1)


@register_model("malunet", facts=Facts("2211.01784", "JCruan519/MALUNet", "none given", small={"features": (4, 4, 8, 8, 8, 8)}, input=(3, 256, 256)))
def malunet(
    *,
    spatial_dims: int = 2,
    in_channels: int = 3,
    out_channels: int = 1,
    features: Sequence[int] = (8, 16, 24, 32, 48, 64),
    bridge: bool = True,
    attention: str = "linear",
    activation: str | None = None,
    input_size: str = "any",
) -> LightUNet:
    """MALUNet for any input size; logits (b, out_channels, *spatial).

    Args:
        features: six channel counts, multiples of 4: three convolutional levels and three of attention, each at half the resolution of the one
            before but the last.
        bridge: channel and spatial attention on the skips. attention: "linear" or "convolution", the same arithmetic with weights of other shapes.
        activation: None, or "sigmoid" on the output. input_size: "any" pads and crops inside, "strict" raises.
    """
    check_dims(spatial_dims)

    def down(_: int, a: int, b: int) -> nn.Module:
        return nn.Sequential(ExternalAttention(a, spatial_dims), DilatedGatedAttention(a, b, spatial_dims))

    def up(_: int, a: int, b: int) -> nn.Module:
        return nn.Sequential(DilatedGatedAttention(a, b, spatial_dims), ExternalAttention(b, spatial_dims))

    joint = SkipAttention(features[:5], spatial_dims, attention) if bridge else None
    return LightUNet(spatial_dims, in_channels, out_channels, features, down, up, joint, activation, input_size)


class ExternalAttention(nn.Module):
    """gelu(norm(out(values(a))) + x), a = softmax of keys(inner(x)) over space, then divided by its sum over the memory (arXiv 2105.02358).

    keys and values are matrices of 4 channels memory cells each, as convolutions over tokens.
    """

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        conv = CONV[spatial_dims]
        self.inner = conv(channels, channels, 1)
        self.keys, self.values = nn.Conv1d(channels, 4 * channels, 1, bias=False), nn.Conv1d(4 * channels, channels, 1, bias=False)
        with torch.no_grad():
            self.values.weight.copy_(self.keys.weight.transpose(0, 1))
        self.out, self.norm = conv(channels, channels, 1, bias=False), nn.GroupNorm(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        keys = self.keys(self.inner(x).flatten(2))
        attention = keys.softmax(-1, dtype=compute_dtype(keys))
        # Over many voxels each weight is small: the sum over the memory stays in float32 under autocast.
        y = self.values((attention / (1e-9 + attention.sum(1, keepdim=True))).to(x.dtype)).unflatten(2, x.shape[2:])
        return nn.functional.gelu(self.norm(self.out(y)) + x)


class DilatedGatedAttention(Leaf):
    """Four groups of channels, each with its own dilated depthwise kernel, a norm and a 1 x 1 convolution; then gate(y) value(y), mixed, plus a
    1 x 1 convolution of y."""

    def __init__(self, channels_in: int, channels: int, spatial_dims: int) -> None:
        super().__init__()
        conv, quarter = CONV[spatial_dims], channels_in // GROUPS
        self.groups = nn.ModuleList(conv(quarter, quarter, 3, padding=d, dilation=d, groups=quarter) for d in _DILATIONS)
        self.norm, self.conv = nn.GroupNorm(GROUPS, channels_in), conv(channels_in, channels_in, 1)
        self.gate = _separable(channels_in, channels_in, 3, spatial_dims)
        self.value = _separable(channels_in, channels_in, 5, spatial_dims)
        self.out = _separable(channels_in, channels, 3, spatial_dims)
        self.skip = conv(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *spatial)."""
        gelu = nn.functional.gelu
        y = torch.cat([group(part) for group, part in zip(self.groups, x.chunk(GROUPS, 1), strict=True)], 1)
        y = gelu(self.conv(self.norm(y)))
        out: Tensor = gelu(self.out(torch.sigmoid(self.gate(y)) * gelu(self.value(y)))) + self.skip(y)
        return out


def _separable(channels_in: int, channels: int, kernel: int, spatial_dims: int) -> nn.Sequential:
    conv = CONV[spatial_dims]
    depthwise = conv(channels_in, channels_in, kernel, padding=kernel // 2, groups=channels_in)
    return nn.Sequential(depthwise, nn.GroupNorm(GROUPS, channels_in), conv(channels_in, channels, 1))


_PARTS = {"conv1": "0", "norm_layer": "1", "conv2": "2"}
MAP = Map(
    rename=(
        (r"\.gau\.(w1|w2|wo)\.0\.(\w+)\.", lambda m: f".{ {'w1': 'gate', 'w2': 'value', 'wo': 'out'}[m[1]] }.{_PARTS[m[2]]}."),
        (r"\.gau\.cw\.", ".skip."),
        (r"\.mda(\d)\.", r".groups.\1."),
        (r"\.linear_0\.", ".keys."),
        (r"\.linear_1\.", ".values."),
        (r"^((?:en|de)coder\d\.\d)\.conv1\.", r"\1.inner."),
        (r"^((?:en|de)coder\d\.\d)\.conv2\.", r"\1.out."),
        (r"^((?:en|de)coder\d\.\d)\.norm_layer\.", r"\1.norm."),
        # A stage of the network has more than one layer where upstream's has two.
        (r"^encoder6\.", "bottom."),
        (r"^encoder([45])\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.0."),
        (r"^decoder([123])\.", lambda m: f"ups.{int(m[1]) - 1}.0."),
        *LEVELS,
    )
)


@register_upstream("malunet", map=MAP)
def upstream(
    *,
    num_classes: int = 1,
    input_channels: int = 3,
    c_list: Sequence[int] = (8, 16, 24, 32, 48, 64),
    split_att: str = "fc",
    bridge: bool = True,
    tied: bool = True,
) -> LightUNet:
    """MALUNet from upstream's keywords, with its sigmoid. tied: keys and values share their memory, as upstream's on a CPU; False as on a GPU."""
    only("split_att", split_att, "fc", "conv")
    attention = "linear" if split_att == "fc" else "convolution"
    model = malunet(in_channels=input_channels, out_channels=num_classes, features=c_list, bridge=bridge, attention=attention, activation="sigmoid")
    for part in model.modules():
        if tied and isinstance(part, ExternalAttention):
            part.values.weight.data = part.keys.weight.data.transpose(0, 1)
    return model
