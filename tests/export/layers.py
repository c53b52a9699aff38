"""Every op, layer and network, small, with inputs of several sizes: what one traced, exported or compiled program must serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import medssm
from medssm import models, nn
from medssm.models.monai import NETWORKS as MONAIS
from medssm.ops.op import OPS


class Layer(NamedTuple):
    """make: builds it, for 8 channels. axes: spatial axes of its tokens. first: whether channels stand before them."""

    make: Callable[[], torch.nn.Module]
    axes: int = 2
    first: bool = False

    def inputs(self) -> list[Tensor]:
        """Three inputs of different batch and size; the first is the one that a program is made with."""
        sizes = ((2, 6, 5, 3), (3, 17, 9, 5), (1, 4, 2, 7))
        long = ((2, 16), (3, 70), (1, 300))  # on both sides of the scans' chunks of 64 tokens
        shapes = [size[: 1 + self.axes] for size in (long if self.axes == 1 else sizes)]
        return [normal(b, 8, *spatial) if self.first else normal(b, *spatial, 8) for b, *spatial in shapes]

    def dynamic(self) -> dict[int, Any]:
        """The axes that are free, for torch.export."""
        return {axis: torch.export.Dim.DYNAMIC for axis in (0, *range(1 + self.first, 1 + self.first + self.axes))}


LAYERS = {
    "Mamba": Layer(lambda: nn.Mamba(8), 1),
    "BiMamba": Layer(lambda: nn.BiMamba(8, divide_out=True), 1),
    "TriMamba": Layer(lambda: nn.TriMamba(8), 3),
    "Mamba2": Layer(lambda: nn.Mamba2(8, d_state=8), 1),
    "Mamba2 in 2D": Layer(lambda: nn.Mamba2(8, d_state=8, spatial_dims=2)),
    "SSND": Layer(lambda: nn.SSND(8)),
    "SSND in 3D": Layer(lambda: nn.SSND(8, spatial_dims=3), 3),
    "LinearAttention": Layer(lambda: nn.LinearAttention(8, 2)),
    "MLLA": Layer(lambda: nn.MLLA(8, 2)),
    "MLLABlock": Layer(lambda: nn.MLLABlock(8, 2)),
    "GatedLinearAttention": Layer(lambda: nn.GatedLinearAttention(8, 2)),
    "DeltaNet": Layer(lambda: nn.DeltaNet(8, 2)),
    "DeltaNet by order": Layer(lambda: nn.DeltaNet(8, 2, conv="order")),
    "SpatialMix": Layer(lambda: nn.SpatialMix(8)),
    "ChannelMix": Layer(lambda: nn.ChannelMix(8)),
    "LiteMLA": Layer(lambda: nn.LiteMLA(8)),
    "PairedAttention": Layer(lambda: nn.PairedAttention(8, (4, 5), 2, 3)),
    "EfficientViTBlock": Layer(lambda: nn.EfficientViTBlock(8, dim=4), first=True),
    "VSSBlock": Layer(lambda: nn.VSSBlock(8, drop_path=0.5), first=True),
}


def layer(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return LAYERS[name].make().eval()


class OpModule(torch.nn.Module):
    """An op of its tensors, by position; its options fixed."""

    def __init__(self, name: str, rest: dict[str, Any], names: list[str]):
        super().__init__()
        self.name, self.rest, self.names = name, rest, names

    def forward(self, *tensors: Tensor) -> Any:
        given = dict(zip(self.names, tensors, strict=True))
        pair = [given.pop(name) for name in ("kv", "z of the state") if name in given]
        state = {"initial_state": tuple(pair)} if pair else {}
        return getattr(medssm.ops, self.name)(**given, **state, **self.rest)


def op(name: str) -> tuple[OpModule, list[tuple[Tensor, ...]], tuple[dict[int, Any], ...]]:
    """The op as a module, its tensors for three batches and lengths, and the axes that are free, for torch.export."""
    calls = []  # no batch or length is a size of another axis: torch.compile would hold the two to be one
    for batch, tokens in ((9, 40), (11, 150), (1, 13)):
        call = OPS[name].example(normal, tokens, 6)
        if isinstance(call.get("initial_state"), tuple):
            call["kv"], call["z of the state"] = call.pop("initial_state")
        batched = {given.public for given in OPS[name].inputs if given.axes[0] == "b"} | {"kv", "z of the state"}
        for key, t in call.items():
            if key in batched:
                call[key] = t[:1].expand(batch, *t.shape[1:]).clone()
        calls.append(call)
    names = [key for key, value in calls[0].items() if isinstance(value, Tensor)]
    rest = {key: value for key, value in calls[0].items() if key not in names}
    tensors = [tuple(call[key] for key in names) for call in calls]
    free = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis in range(a.dim()) if a.shape[axis] != b.shape[axis]} for a, b in zip(*tensors[:2], strict=True)
    )
    return OpModule(name, rest, names), tensors, free


NETS = {name: dict(models.model_facts(name).small) for name in medssm.list_models() if name not in MONAIS}
NETS["medssm_unet"] = {"features": (4, 6, 16), "depths": (0, 1, 1), "decoder_depths": (1, 0)}


def network(name: str, dims: int = 2, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return medssm.create_model(name, dims, 2, 3, **NETS[name], **options).eval()


def images(dims: int = 2) -> list[Tensor]:
    """Three inputs for a network: two that are padded, and one that all strides divide. Each leaves two voxels at the coarsest level: PyTorch makes
    a program of its own for an axis of one voxel."""
    return [normal(b, 2, *size[:dims]) for b, size in ((2, (48, 40, 35)), (3, (64, 96, 64)), (1, (34, 37, 50)))]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def gradients(outputs: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Of a fixed sum of the outputs."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return list(torch.autograd.grad(outputs, inputs, [normal(*o.shape) for o in outputs]))
