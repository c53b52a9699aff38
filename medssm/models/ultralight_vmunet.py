"""UltraLight-VM-UNet (Wu et al., arXiv 2403.20035): fifty thousand parameters, one small Mamba shared by four groups of channels; 2D, here 3D too.

What upstream's code does beside the paper: its sigmoid is inside the network, whatever the number of classes, and inputs must be multiples
of 32. `create_model` gives logits for any size.
"""

from __future__ import annotations

from collections.abc import Sequence

from medssm.models.facts import Facts
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn.blocks import check_dims
from medssm.nn.light import GROUPS, LightUNet, SkipAttention
from medssm.nn.scaled import ScaledMamba


@register_model(
    "ultralight_vmunet", facts=Facts("2403.20035", "wurenkai/UltraLight-VM-UNet", "MIT", small={"features": (4, 4, 8, 8, 8, 8)}, input=(3, 256, 256))
)
class UltraLightVMUNet(LightUNet):
    """UltraLight-VM-UNet for any input size; logits (b, out_channels, *spatial).

    Args:
        features: six channel counts, multiples of 4: three convolutional levels and three of Mamba, each at half the resolution of the one
            before but the last.
        bridge: channel and spatial attention on the skips. attention: "linear" or "convolution", the same arithmetic with weights of other shapes.
        activation: None, or "sigmoid" on the output. input_size: "any" pads and crops inside, "strict" raises.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        features: Sequence[int] = (8, 16, 24, 32, 48, 64),
        bridge: bool = True,
        attention: str = "linear",
        activation: str | None = None,
        input_size: str = "any",
    ) -> None:
        check_dims(spatial_dims)
        joint = SkipAttention(features[:5], spatial_dims, attention) if bridge else None
        super().__init__(spatial_dims, in_channels, out_channels, features, _mix, _mix, joint, activation, input_size)


def _mix(_level: int, channels_in: int, channels: int) -> ScaledMamba:
    return ScaledMamba(channels_in, channels, GROUPS, skip_norm=True)


# Upstream's names of the levels, which MALUNet and its kin have too.
LEVELS = (
    (r"^encoder6\.0\.", "bottom."),
    (r"^encoder(\d)\.0\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.0."),
    (r"^ebn(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.1."),
    (r"^decoder(\d)\.0\.", lambda m: f"ups.{int(m[1]) - 1}.0."),
    (r"^dbn(\d)\.", lambda m: f"ups.{int(m[1]) - 1}.1."),
    (r"^scab\.satt\.shared_conv2d\.0\.", "bridge.spatial.conv."),
    (r"^scab\.catt\.get_all_att\.", "bridge.means."),
    (r"^scab\.catt\.att(\d)\.", lambda m: f"bridge.channels.{int(m[1]) - 1}."),
)


@register_upstream("ultralight_vmunet", map=Map(rename=LEVELS))
def upstream(
    *, num_classes: int = 1, input_channels: int = 3, c_list: Sequence[int] = (8, 16, 24, 32, 48, 64), split_att: str = "fc", bridge: bool = True
) -> UltraLightVMUNet:
    """UltraLight-VM-UNet from upstream's keywords, with its sigmoid."""
    return UltraLightVMUNet(
        in_channels=input_channels,
        out_channels=num_classes,
        features=c_list,
        bridge=bridge,
        attention="linear" if split_att == "fc" else "convolution",
        activation="sigmoid",
    )
