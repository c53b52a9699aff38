"""MONAI's convolutional and transformer networks under create_model, for comparison: monai_basicunet, monai_segresnet, monai_dynunet, monai_mednext,
monai_unetr, monai_swin_unetr. They need MONAI; their options are its constructors' keywords, with defaults of the usual size where MONAI gives none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from medssm.errors import install_command
from medssm.models.facts import Facts, Plan, groups_of, halvings, widths
from medssm.models.registry import register_model
from medssm.nn import AnySize
from medssm.nn.blocks import check_dims
from medssm.nn.unet import has_instance_norms

_DYNUNET = {"kernel_size": [3] * 6, "strides": [1] + [2] * 5, "upsample_kernel_size": [2] * 5, "filters": [32, 64, 128, 256, 320, 320]}


def _dynunets(plan: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"filters": plan.features, "strides": plan.strides, "kernel_size": plan.kernels, "upsample_kernel_size": plan.strides[1:]}


def _unetrs(plan: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"img_size": plan.patch}


def _basicunet_of(width: float, patch: Sequence[int]) -> dict[str, Any]:
    return {"features": [max(2, each) for each in widths(width, (1, 1, 2, 4, 8, 1))]}  # it halves them on the way up


def _segresnet_of(width: float, patch: Sequence[int]) -> dict[str, Any]:
    filters = widths(width, [1])[0]
    return {"init_filters": filters, "norm": ["GROUP", {"num_groups": groups_of(filters)}]}


def _dynunet_of(width: float, patch: Sequence[int]) -> dict[str, Any]:
    steps = halvings(patch, 5)
    filters = widths(width, (1, 2, 4, 8, 10, 10)[: steps + 1])
    return {"filters": filters, "strides": [1] + [2] * steps, "kernel_size": [3] * (steps + 1), "upsample_kernel_size": [2] * steps}


class Network(NamedTuple):
    """constructor: a class of monai.networks.nets. divisor: what every side of an input must be a multiple of, None for the size that the
    network is built for alone. defaults: of its keywords."""

    constructor: str
    divisor: int | None
    defaults: dict[str, Any]
    facts: Facts


_fact = partial(Facts, source="Project-MONAI/MONAI", licence="Apache-2.0", parity="MONAI's own code")
NETWORKS = {
    "monai_basicunet": Network("BasicUNet", 16, {}, _fact("1505.04597", small={"features": [4] * 6}, of_width=_basicunet_of)),
    "monai_segresnet": Network("SegResNet", 8, {"init_filters": 32}, _fact("1810.11654", small={"init_filters": 8}, of_width=_segresnet_of)),
    "monai_dynunet": Network(
        "DynUNet", 32, _DYNUNET, _fact("1904.08128", small={"filters": [4] * 6}, input=(4, 96, 96, 96), from_plan=_dynunets, of_width=_dynunet_of)
    ),
    "monai_mednext": Network("MedNeXt", 16, {}, _fact("2303.09975", small={"init_filters": 4, "kernel_size": 3})),
    "monai_unetr": Network(
        "UNETR",
        None,
        {"img_size": 96},
        _fact("2103.10504", small={"img_size": 32, "hidden_size": 24, "mlp_dim": 24}, input=(1, 96, 96, 96), from_plan=_unetrs),
    ),
    "monai_swin_unetr": Network("SwinUNETR", 32, {"feature_size": 48}, _fact("2201.01266", small={"feature_size": 12})),
}


class Padded(AnySize):
    """A network for inputs of any size."""

    def __init__(self, network: nn.Module, size_divisor: tuple[int, ...]) -> None:
        super().__init__(size_divisor)
        self.network = network
        self.instance_norms = has_instance_norms(network)

    def whole(self, x: Tensor) -> Tensor:
        """(b, in_channels, *spatial) -> (b, out_channels, *spatial)."""
        y: Tensor = self.network(x)
        return y


def _build(kind: str, *, spatial_dims: int = 3, in_channels: int = 1, out_channels: int = 2, **options: Any) -> nn.Module:
    """MONAI's own class from its own keywords, for any input size where it has a `divisor`; logits (b, out_channels, *spatial)."""
    check_dims(spatial_dims)
    try:
        from monai.networks import nets
    except ModuleNotFoundError as error:
        raise ValueError(f"name: MONAI's networks need MONAI: {install_command('segment')}") from error
    constructor, divisor, defaults, _ = NETWORKS[kind]
    try:
        network: nn.Module = getattr(nets, constructor)(
            spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels, **{**defaults, **options}
        )
    except TypeError as error:
        raise ValueError(f"{kind}: {error}") from error
    except ImportError as error:  # MONAI imports einops when UNETR or SwinUNETR is built
        why = str(error).splitlines()[0]
        raise ValueError(f"name: {kind} needs a package that MONAI leaves optional: {install_command('segment')}: {why}") from error
    if divisor is None:
        return network
    return Padded(network, _steps(options["strides"], spatial_dims) if "strides" in options else (divisor,) * spatial_dims)


def _steps(strides: Sequence[int | Sequence[int]], dims: int) -> tuple[int, ...]:
    """Along each axis the steps of all stages together."""
    return tuple(math.prod(step if isinstance(step, int) else step[axis] for step in strides) for axis in range(dims))


for _kind, _network in NETWORKS.items():
    register_model(_kind, partial(_build, _kind), _network.facts)
