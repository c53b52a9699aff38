"""EfficientViT's multi-scale ReLU linear attention and its block (Cai et al., arXiv 2205.14756), in 2D and 3D."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from medssm import ops
from medssm.nn.blocks import CONV, ConvNorm, check_dims, depthwise, image, tokens


class LiteMLA(nn.Module):
    """Multi-scale linear attention with ReLU for a feature map and no softmax, on (b, *spatial, c):

        q, k, v = qkv(x), and for each scale again after a depthwise convolution of that size and a 1 x 1 one inside each head's q, k and v
        o_t = relu(q_t) (sum_i relu(k_i) v_i^T) / (relu(q_t) . sum_i relu(k_i) + eps);   out = norm(proj(all heads of all scales))

    Args:
        channels: in. channels_out: default channels. dim: channels of a head; heads: default channels // dim, times heads_ratio.
        scales: sides of the depthwise kernels, odd. eps: beside the normaliser. norm_eps: of the batch norm behind proj.

    Weights: qkv.conv, aggreg.i.0 (depthwise) and aggreg.i.1 (grouped), proj.conv, proj.norm, as upstream's.
    """

    def __init__(
        self,
        channels: int,
        channels_out: int | None = None,
        *,
        dim: int = 8,
        heads: int | None = None,
        heads_ratio: float = 1.0,
        scales: Sequence[int] = (5,),
        spatial_dims: int = 2,
        eps: float = 1e-15,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_dims(spatial_dims)
        heads = int(channels // dim * heads_ratio) if heads is None else heads
        if heads < 1:
            raise ValueError(f"dim: expected at most {channels}, the channels, got {dim}")
        self.dim, self.eps, wide = dim, eps, 3 * heads * dim
        self.qkv = ConvNorm(channels, wide, 1, spatial_dims=spatial_dims, norm=False)
        self.aggreg = nn.ModuleList(_Scale(wide, scale, 3 * heads, spatial_dims) for scale in scales)
        self.proj = ConvNorm(heads * dim * (1 + len(scales)), channels_out or channels, 1, spatial_dims=spatial_dims, norm_eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> (b, *spatial, channels_out)."""
        qkv = self.qkv(image(x))
        scales = torch.cat([tokens(t) for t in (qkv, *(scale(qkv) for scale in self.aggreg))], -1)
        q, k, v = scales.flatten(1, -2).unflatten(-1, (-1, 3, self.dim)).unbind(3)
        o = ops.linear_attention(q, k, v, feature_map="relu", eps=self.eps)  # (b, l, heads of all scales, dim)
        return tokens(self.proj(image(o.flatten(-2).unflatten(1, x.shape[1:-1]))))


class _Scale(nn.Sequential):
    """A depthwise convolution, then a 1 x 1 one inside each group of channels, on (b, c, *spatial)."""

    def __init__(self, channels: int, kernel: int, groups: int, spatial_dims: int) -> None:
        convolution = CONV[spatial_dims]
        super().__init__(
            convolution(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False),
            convolution(channels, channels, 1, groups=groups, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self[1](image(depthwise(self[0], tokens(x))))
        return y


class MBConv(nn.Module):
    """A pointwise convolution to expand * channels_in, a depthwise one, a pointwise one to `channels` without activation.

    fewer_norm: batch norm behind the last alone; the first two have biases then.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        stride: int = 1,
        *,
        spatial_dims: int,
        expand: float = 4,
        act: Callable[[], nn.Module],
        fewer_norm: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        wide = round(channels_in * expand)
        early = partial(ConvNorm, spatial_dims=spatial_dims, bias=fewer_norm, norm=not fewer_norm, act=act, norm_eps=norm_eps)
        self.inverted_conv = early(channels_in, wide, 1)
        self.depth_conv = early(wide, wide, 3, stride, groups=wide)
        self.point_conv = ConvNorm(wide, channels, 1, spatial_dims=spatial_dims, norm_eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial / stride))."""
        y: Tensor = self.point_conv(self.depth_conv(self.inverted_conv(x)))
        return y


class Residual(nn.Module):
    """x + main(x)."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        """x -> x + main(x), of the same shape."""
        y: Tensor = x + self.main(x)
        return y


class EfficientViTBlock(nn.Module):
    """x + LiteMLA(x), then x + MBConv(x), on (b, c, *spatial).

    dim, scales: of the attention. expand, act: of the convolutions. norm_eps: of all batch norms.
    """

    def __init__(
        self,
        channels: int,
        *,
        dim: int = 32,
        scales: Sequence[int] = (5,),
        expand: float = 4,
        act: Callable[[], nn.Module] = nn.Hardswish,
        spatial_dims: int = 2,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.context_module = Residual(_OnImages(channels, dim=dim, scales=scales, spatial_dims=spatial_dims, norm_eps=norm_eps))
        self.local_module = Residual(
            MBConv(channels, channels, spatial_dims=spatial_dims, expand=expand, act=act, fewer_norm=True, norm_eps=norm_eps)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        y: Tensor = self.local_module(self.context_module(x))
        return y


class _OnImages(LiteMLA):
    """LiteMLA on (b, c, *spatial)."""

    def forward(self, x: Tensor) -> Tensor:
        return image(super().forward(tokens(x)))
