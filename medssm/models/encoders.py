"""Encoders by name, for decoders that take any: those of the networks that create_model builds, and PVTv2's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from medssm.models.registry import create_model
from medssm.nn import Encoder
from medssm.nn.pvt_encoder import SIZES, pvt_encoder


def encoder(name: str, spatial_dims: int, in_channels: int, options: Mapping[str, Any] | None = None) -> Encoder:
    """The encoder of create_model(name, spatial_dims, in_channels, **options), or for "pvt_v2_b0" to "pvt_v2_b5" the pyramid vision transformer of
    that size. Raises ValueError for an unknown name or option, and for a network without an encoder."""
    if name in SIZES:
        return pvt_encoder(in_channels, spatial_dims, SIZES[name], **(options or {}))
    try:
        return cast(Encoder, create_model(name, spatial_dims, in_channels, features_only=True, **(options or {})).encoder)
    except ValueError as error:
        raise ValueError(f"encoder: {error}") from error
