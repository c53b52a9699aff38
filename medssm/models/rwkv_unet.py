"""RWKV-UNet (Jiang et al., arXiv 2501.08458): inverted bottlenecks, those of the coarse stages with a bidirectional WKV, under a light decoder.

What upstream's code does beside the paper, kept for its weights:
- Every block has a spatial mix and norms that it may not use, the encoder a classifier: `from_upstream` has their weights too, `create_model` not.
- The small and the base network repeat one input channel to three; the tiny one takes three. Here each takes both.
- Its kernels compute another formula than the paper's (ops.bi_wkv): `mode="upstream"`. It takes square images of one size, `create_model` any.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from medssm.models.facts import Facts
from medssm.models.options import only, per_stage, preset, several
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, SpatialMix, UNet
from medssm.nn.blocks import CONV, ChannelNorm, ChannelsLast, check_dims
from medssm.nn.rwkv_unet import EPS, GLSP, CrossChannelMix, UpBlock
from medssm.nn.unet import OneChannelToo
from medssm.nn.vss import drop_paths, start_linears

# Blocks, channels and hidden channels over channels of each stage.
SIZES = {
    "tiny": ((2, 2, 4, 2), (32, 48, 96, 160), (2, 2.5, 3, 3.5)),
    "small": ((3, 3, 6, 3), (32, 64, 128, 192), (2, 2.5, 3, 4)),
    "base": ((3, 3, 6, 3), (48, 72, 144, 240), (2, 2.5, 4, 4)),
}


@register_model(
    "rwkv_unet",
    facts=Facts(
        "2501.08458",
        "juntaoJianggavin/RWKV-UNet",
        "none given",
        small={"features": (4, 8), "depths": (1, 2), "expand": (1, 1), "stem": 4, "decoder_kernel": 3},
        sizes=tuple(SIZES),
        input=(3, 256, 256),
    ),
)
class RWKVUNet(UNet):
    """RWKV-UNet for any input size; logits (b, out_channels, *spatial).

    Args:
        size: "tiny" (3 M parameters in 2D), "small", "base": presets of features (channels), depths (blocks) and expand (hidden channels over
            channels, twice as many in a stage's first block) per stage; stage s works at 1/2^(s+1) of the resolution. The later half of the
            stages has spatial mixes, but not in a stage's first block.
        stem: channels at full resolution. kernel, decoder_kernel: of the depthwise convolutions; decoder_kernel None is upstream's 9 in 2D, 5 in 3D.
        mode: of ops.bi_wkv; "upstream" for weights that the published kernels trained. drop_path: stochastic depth at the encoder's last block.
        input_size: "any" pads and crops inside, "strict" raises where 2 to the number of stages does not divide the input.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        size: str = "tiny",
        features: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        expand: Sequence[float] | None = None,
        stem: int = 24,
        kernel: int = 5,
        decoder_kernel: int | None = None,
        mode: str = "exact",
        drop_path: float = 0.05,
        input_size: str = "any",
    ) -> None:
        check_dims(spatial_dims)
        preset_depths, preset_features, preset_expand = preset(SIZES, size)
        features = list(features or preset_features)
        n = len(features)
        several("features", features)
        depths, expand = per_stage("depths", depths or preset_depths, n), per_stage("expand", expand or preset_expand, n)
        block, before, stages = partial(GLSP, spatial_dims=spatial_dims, kernel=kernel), stem, []
        for s, (channels, ratio, rates) in enumerate(zip(features, expand, drop_paths(depths, drop_path), strict=True)):
            coarse = s >= n // 2
            common = partial(block, norm="channel" if coarse else "batch")
            blocks = [common(before, channels, int(2 * ratio * before), stride=2, drop_path=rates[0])]
            blocks += [common(channels, channels, int(ratio * channels), mode=mode if coarse else None, drop_path=rate) for rate in rates[1:]]
            stages.append(nn.Sequential(*blocks))
            before = channels
        first = block(in_channels, stem, in_channels, norm=None, gate=True, skip=False)
        encoder = Encoder(nn.Sequential(ChannelsLast(spatial_dims), first), stages, features, [(2,) * spatial_dims] * n)
        widths = [features[-1], *(2 * c for c in features[-2::-1])]
        ups = [UpBlock(a, b, spatial_dims, decoder_kernel) for a, b in zip(widths, [*features[-2::-1], stem], strict=True)]
        heads = [*[None] * (n - 1), CONV[spatial_dims](stem, out_channels, 1)]
        decoder = Decoder(ups, [nn.Identity()] * n, heads, [*[True] * (n - 1), False])
        super().__init__(encoder, decoder, size=input_size)
        self.ccm, self.in_channels = CrossChannelMix(features[-2::-1], features[0], spatial_dims, drop_path), in_channels
        start_linears(self)
        for name, parameter in self.named_parameters():
            if "spatial_" in name:
                nn.init.constant_(parameter, 0.5 if "spatial_mix" in name else 0.0)

    def whole(self, x: Tensor) -> Tensor | list[Tensor]:
        *fine, coarse = self.encoder(x)
        mixed = self.ccm(fine[::-1])
        logits: Tensor = self.decoder([*(mixed[i] for i in reversed(range(len(fine)))), coarse])
        return logits


class Upstream(OneChannelToo, RWKVUNet):
    """With the weights that upstream has and does not use."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        for block in [m for m in self.modules() if isinstance(m, (GLSP, UpBlock))]:
            hidden = block.conv.conv.out_channels
            if isinstance(block, GLSP):
                block.ln2, block.att = nn.LayerNorm(hidden), block.att or SpatialMix(hidden, key_norm=True)
            block.ln1 = nn.LayerNorm(hidden)
        channels = self.encoder.output_channels[-1]
        self.encoder.norm, self.encoder.head = ChannelNorm(channels, EPS), nn.Linear(channels, 1000)


MAP = Map(
    rename=(
        (r"\.norm\.norm\.(weight|bias)$", r".norm.\1"),
        (r"^encoder\.stage0\.0\.", "encoder.stem.1."),
        (r"^encoder\.stage([1-9])\.", lambda m: f"encoder.stages.{int(m[1]) - 1}."),
        (r"^decoder(\d)\.", lambda m: f"decoder.upsample_layers.{int(m[1]) - 1}."),
        (r"^final_conv\.", "decoder.seg_layers.3."),
    )
)


def upstream(
    size: str = "base",
    *,
    in_channels: int = 1,
    num_classes: int = 9,
    img_size: int = 224,
    pretrained_path: str | None = None,
    wkv_mode: str = "upstream",
) -> Upstream:
    """RWKV-UNet from upstream's keywords, of which in_channels and img_size change no output; wkv_mode, which upstream has not, is bi_wkv's mode.
    The network takes three channels, or one, which it repeats. Weights come as `from_upstream`'s state_dict, not from pretrained_path."""
    only("pretrained_path", pretrained_path, None)
    return Upstream(out_channels=num_classes, size=size, mode=wkv_mode)


register_upstream("rwkv_unet", builder=upstream, map=MAP)
for _size in SIZES:
    register_upstream(f"rwkv_unet_{_size[0]}", builder=partial(upstream, _size), map=MAP)
