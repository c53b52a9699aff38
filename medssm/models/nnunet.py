"""What networks on nnU-Net's residual U-Net share: its lists and layers, from create_model's options and from nnU-Net's own keywords."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from medssm.models.facts import Plan, halvings, widths
from medssm.models.options import doubled, per_axis, per_stage
from medssm.nn.blocks import CONV, INSTANCE_NORM, check_dims
from medssm.nn.residual import Layers, Stages, maker

Layer = Callable[..., nn.Module] | str  # a class of layers, or the name of one of torch.nn


def stages_of(
    spatial_dims: int,
    features: Sequence[int],
    strides: Sequence[int | Sequence[int]] | None,
    kernels: int | Sequence[int | Sequence[int]],
    blocks: int | Sequence[int],
    decoder_blocks: int | Sequence[int],
) -> Stages:
    """nnU-Net's lists, one entry per stage, from what create_model is given: strides default to 1, then 2."""
    check_dims(spatial_dims)
    n = len(features)
    return Stages(
        list(features),
        per_axis("strides", [1] + [2] * (n - 1) if strides is None else strides, n, spatial_dims),
        per_axis("kernels", kernels, n, spatial_dims),
        per_stage("blocks", blocks, n),
        per_stage("decoder_blocks", decoder_blocks, n - 1),
    )


def layers_of(
    spatial_dims: int,
    conv_bias: bool = True,
    norm: Callable[..., nn.Module] | None = None,
    norm_kwargs: Mapping[str, Any] | None = None,
    act: Callable[..., nn.Module] = nn.LeakyReLU,
    act_kwargs: Mapping[str, Any] | None = None,
    dropout: Callable[..., nn.Module] | None = None,
    dropout_kwargs: Mapping[str, Any] | None = None,
) -> Layers:
    """nnU-Net's layers from what create_model is given: by default instance norm with weights and leaky ReLU, no dropout."""
    if norm is None:
        norm, norm_kwargs = INSTANCE_NORM[spatial_dims], {"affine": True, **(norm_kwargs or {})}
    if act_kwargs is None and act is nn.LeakyReLU:
        act_kwargs = {"inplace": True}
    return Layers(CONV[spatial_dims], conv_bias, maker(norm, norm_kwargs), maker(act, act_kwargs), maker(dropout, dropout_kwargs))


class Keywords(NamedTuple):
    """nnU-Net's keywords of a network, which its kin take too. Classes may be given by name ("Conv3d")."""

    input_channels: int
    n_stages: int
    features_per_stage: int | Sequence[int]
    conv_op: Layer
    kernel_sizes: int | Sequence[int | Sequence[int]]
    strides: int | Sequence[int | Sequence[int]]
    n_conv_per_stage: int | Sequence[int]
    num_classes: int
    n_conv_per_stage_decoder: int | Sequence[int]
    conv_bias: bool = False
    norm_op: Layer | None = None
    norm_op_kwargs: Mapping[str, Any] | None = None
    dropout_op: Layer | None = None
    dropout_op_kwargs: Mapping[str, Any] | None = None
    nonlin: Layer | None = None
    nonlin_kwargs: Mapping[str, Any] | None = None
    deep_supervision: bool = False
    stem_channels: int | None = None

    def dims(self) -> int:
        """The number of spatial dimensions; ValueError where conv_op is none of PyTorch's for 2 or 3."""
        dims = {"Conv2d": 2, "Conv3d": 3}.get(getattr(_class("conv_op", self.conv_op), "__name__", ""))
        if dims is None:
            raise ValueError(f"conv_op: expected Conv2d or Conv3d, got {self.conv_op!r}")
        return dims

    def layers(self) -> Layers:
        """The layers of all blocks."""
        norm, act = maker(_class("norm_op", self.norm_op), self.norm_op_kwargs), maker(_class("nonlin", self.nonlin), self.nonlin_kwargs)
        return Layers(CONV[self.dims()], self.conv_bias, norm, act, maker(_class("dropout_op", self.dropout_op), self.dropout_op_kwargs))

    def stages(self) -> Stages:
        """The lists, one entry per stage."""
        dims, n = self.dims(), self.n_stages
        return Stages(
            per_stage("features_per_stage", doubled(self.features_per_stage, n), n),
            per_axis("strides", self.strides, n, dims),
            per_axis("kernel_sizes", self.kernel_sizes, n, dims),
            per_stage("n_conv_per_stage", self.n_conv_per_stage, n),
            per_stage("n_conv_per_stage_decoder", self.n_conv_per_stage_decoder, n - 1),
        )


def _class(name: str, given: Layer | None) -> Callable[..., nn.Module] | None:
    """A class, or one of torch.nn by name, in nnU-Net's long form too ("torch.nn.modules.conv.Conv3d")."""
    if not isinstance(given, str):
        return given
    found: Callable[..., nn.Module] | None = getattr(nn, given.rsplit(".", 1)[-1], None)
    if found is None:
        raise ValueError(f"{name}: expected a class of torch.nn, got {given!r}")
    return found


def from_plan(plan: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    """Facts.from_plan: the plan's lists; its strides and kernels alone where features are given."""
    lists = {"strides": plan.strides, "kernels": plan.kernels}
    return lists if "features" in given else {**lists, "features": plan.features, "blocks": plan.blocks, "decoder_blocks": plan.decoder_blocks}


def of_width(width: float, patch: Sequence[int]) -> dict[str, Any]:
    """Facts.of_width: nnU-Net's channels, from `width` on, at as many stages as halve the patch."""
    return {"features": widths(width, (1, 2, 4, 8, 10, 10)[: halvings(patch, 5) + 1])}
