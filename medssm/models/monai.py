"""MONAI's convolutional and transformer networks under create_model, for comparison: monai_segresnet, monai_dynunet, monai_mednext, monai_unetr,
monai_swin_unetr. They need MONAI; their options are its constructors' keywords, with defaults of the usual size where MONAI gives none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from medssm.nn import AnySize
from medssm.nn.blocks import check_dims
from medssm.nn.unet import has_instance_norms

_DYNUNET = {"kernel_size": [3] * 6, "strides": [1] + [2] * 5, "upsample_kernel_size": [2] * 5, "filters": [32, 64, 128, 256, 320, 320]}
# The constructor, what every side of an input must be a multiple of (None: of the size it is built for alone), and defaults.
NETWORKS = {
    "monai_segresnet": ("SegResNet", 8, {"init_filters": 32}),
    "monai_dynunet": ("DynUNet", 32, _DYNUNET),
    "monai_mednext": ("MedNeXt", 16, {}),
    "monai_unetr": ("UNETR", None, {"img_size": 96}),
    "monai_swin_unetr": ("SwinUNETR", 32, {"feature_size": 48}),
}


class Padded(AnySize):
    """A network for inputs of any size."""

    def __init__(self, network: nn.Module, size_divisor: tuple[int, ...]):
        super().__init__(size_divisor)
        self.network = network
        self.instance_norms = has_instance_norms(network)

    def whole(self, x: Tensor) -> Tensor:
        return self.network(x)


def _build(kind: str, *, spatial_dims: int = 3, in_channels: int = 1, out_channels: int = 2, **options) -> nn.Module:
    check_dims(spatial_dims)
    try:
        from monai.networks import nets
    except ModuleNotFoundError as error:
        raise ValueError("name: MONAI's networks need MONAI: pip install 'medssm[segment]'") from error
    constructor, divisor, defaults = NETWORKS[kind]
    try:
        network = getattr(nets, constructor)(spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels, **{**defaults, **options})
    except TypeError as error:
        raise ValueError(f"{kind}: {error}") from error
    except ImportError as error:  # MONAI imports einops when UNETR or SwinUNETR is built
        why = str(error).splitlines()[0]
        raise ValueError(f"name: {kind} needs a package that MONAI leaves optional: pip install 'medssm[segment]' ({why})") from error
    return network if divisor is None else Padded(network, (divisor,) * spatial_dims)


BUILDERS: dict[str, Callable[..., nn.Module]] = {kind: partial(_build, kind) for kind in NETWORKS}
