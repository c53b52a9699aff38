# Copyright (c) MONAI Consortium
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from monai.utils import look_up_option, optional_import

create_model, _ = optional_import("medssm", name="create_model")

__all__ = ["UMamba"]


class UMamba(nn.Module):
    """
    U-Mamba, a residual U-Net with Mamba (selective state space) layers, based on:
    `U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation <https://arxiv.org/abs/2401.04722>`_.

    The selective scan is that of the optional package ``medssm``, which runs on CPU and GPU: ``pip install .`` in its source folder.
    Inputs of any size are accepted, they are padded inside to a multiple of the product of the strides.

    Args:
        spatial_dims: number of spatial dimensions, 2 or 3.
        in_channels: number of input channels.
        out_channels: number of output channels.
        variant: where the Mamba layers are: ``"enc"``, after the stages of the encoder (in 2D after every second one),
            or ``"bot"``, at the bottleneck alone. Defaults to ``"enc"``.
        features: number of channels of each stage, from the full resolution down.
        strides: stride of each stage, an integer or one integer for each dimension (anisotropic spacing).
            Defaults to 1 for the first stage and 2 for the others.
        kernel_size: convolution kernel size, for all stages or for each. Defaults to 3.
        num_blocks: number of residual blocks in each stage of the encoder, for all stages or for each. Defaults to 2.
        num_decoder_blocks: the same in the decoder, which has one stage fewer, from the coarsest. Defaults to 2.
        norm: feature normalization type and arguments. Defaults to instance norm with affine weights.
        act: activation type and arguments. Defaults to leaky ReLU.
        deep_supervision: whether to return, in training mode, a list of logits at all resolutions, the highest first.
            Defaults to ``False``.

    Examples::

        # 3D, for voxels that are thicker along the first axis
        net = UMamba(
            spatial_dims=3,
            in_channels=1,
            out_channels=14,
            features=(32, 64, 128, 256, 320),
            strides=(1, (1, 2, 2), 2, 2, 2),
        )

    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        variant: str = "enc",
        features: Sequence[int] = (32, 64, 128, 256, 320, 320),
        strides: Sequence[int | Sequence[int]] | None = None,
        kernel_size: int | Sequence[int | Sequence[int]] = 3,
        num_blocks: int | Sequence[int] = 2,
        num_decoder_blocks: int | Sequence[int] = 2,
        norm: str | tuple = ("instance", {"affine": True}),
        act: str | tuple = ("leakyrelu", {"inplace": True}),
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError("spatial_dims can only be 2 or 3.")
        self.deep_supervision = deep_supervision
        self.model = create_model(
            f"umamba_{look_up_option(variant, ('enc', 'bot'))}",
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            features=features,
            strides=strides,
            kernels=kernel_size,
            blocks=num_blocks,
            decoder_blocks=num_decoder_blocks,
            norm=lambda channels: get_norm_layer(norm, spatial_dims, channels),
            act=lambda: get_act_layer(act),
            deep_supervision=deep_supervision,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """
        Args:
            x: input of the shape ``(Batch, in_channels, dim_0[, dim_1, ..., dim_N])``, N is `spatial_dims`.

        Returns:
            Logits ``(Batch, out_channels, dim_0[, dim_1, ..., dim_N])``; a list of them in training mode with deep
            supervision.
        """
        out: torch.Tensor | list[torch.Tensor] = self.model(x)
        return out[0] if self.deep_supervision and not self.training else out
