"""The mixers by name, as networks and benchmarks choose them: each works on (b, *spatial, channels), in 2D and 3D, at any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from medssm.nn.bottleneck import as_costly_as
from medssm.nn.deltanet import RULES, DeltaNet
from medssm.nn.gla import GatedLinearAttention
from medssm.nn.mamba2 import Mamba2
from medssm.nn.mamba3 import Mamba3
from medssm.nn.mlla import MLLA
from medssm.nn.rwkv import SpatialMix
from medssm.nn.ssnd import SSND


class Kind(NamedTuple):
    """make(channels, spatial_dims, **options). options: those of a network that it takes, `expand` (its inner channels over its outer ones),
    `d_state`, and `orders` of its scans, with what it takes for itself where none is given."""

    make: Callable[..., nn.Module]
    options: dict[str, Any]


def heads(channels: int, width: int) -> int:
    """As many heads as leave each at least `width` channels, an even number where the channels allow it."""
    counts = [n for n in range(1, channels // width + 1) if channels % n == 0 and channels // n % 2 == 0]
    return max(counts, default=1)


MIXERS: dict[str, Kind] = {
    "ss_nd": Kind(
        lambda c, dims, expand, d_state, orders: SSND(c, int(d_state), expand=expand, spatial_dims=dims, orders=orders),
        {"expand": 2, "d_state": 8, "orders": None},
    ),
    "linear_attention": Kind(lambda c, dims: MLLA(c, heads(c, 16), dims), {}),
    "gla": Kind(
        lambda c, dims, expand, orders: GatedLinearAttention(c, heads(c, 32), expand_k=expand / 2, expand_v=expand, spatial_dims=dims, orders=orders),
        {"expand": 1, "orders": None},
    ),
    "delta": Kind(
        lambda c, dims, expand, orders: DeltaNet(c, heads(c, 32), expand_k=expand, expand_v=expand, spatial_dims=dims, orders=orders),
        {"expand": 1, "orders": None},
    ),
    **{
        rule: Kind(
            lambda c, dims, expand, orders, rule=rule: DeltaNet(
                c, heads(c, 32), rule=rule, expand_k=expand, expand_v=expand, spatial_dims=dims, orders=orders
            ),
            {"expand": 1, "orders": None},
        )
        for rule in RULES[1:]
    },
    "mamba2": Kind(
        lambda c, dims, expand, d_state, orders: Mamba2(c, int(d_state), expand=expand, spatial_dims=dims, orders=orders),
        {"expand": 2, "d_state": 64, "orders": None},
    ),
    "mamba3": Kind(
        lambda c, dims, expand, d_state, orders: Mamba3(c, int(d_state), expand=expand, spatial_dims=dims, orders=orders),
        {"expand": 2, "d_state": 64, "orders": None},
    ),
    "rwkv": Kind(lambda c, dims: SpatialMix(c), {}),
}
# What a mixer is compared with: convolutions of as many multiply-adds as ss_nd with the same options.
CONVOLUTIONS: dict[str, Kind] = {
    "conv": Kind(
        lambda c, dims, expand, d_state: as_costly_as(MIXERS["ss_nd"].make, c, dims, expand=expand, d_state=d_state, orders=None),
        {"expand": 2, "d_state": 8},
    )
}


def make_mixer(name: str, channels: int, spatial_dims: int, **options: Any) -> nn.Module:
    """The mixer of MIXERS or CONVOLUTIONS with this name. Of the options expand, d_state and orders, None is the mixer's own; ValueError for one that
    it has not."""
    kinds = MIXERS | CONVOLUTIONS
    if name not in kinds:
        raise ValueError(f"mixer: expected one of {', '.join(kinds)}, got {name!r}")
    kind = kinds[name]
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        if option not in kind.options:
            raise ValueError(f"{option}: expected None, which mixer={name!r} has not, got {value!r}")
    return kind.make(channels, spatial_dims, **{**kind.options, **given})
