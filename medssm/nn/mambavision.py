"""MambaVision's mixer, the stage of windows that it works in, the layers of finer stages (Hatamizadeh and Kautz, arXiv 2407.08083), in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssm import ops
from medssm.kernels.dtypes import widened
from medssm.nn.blocks import BATCH_NORM, CONV, depthwise, image, tokens
from medssm.nn.inner import plain
from medssm.nn.leaf import Leaf
from medssm.nn.mamba import rates, start_steps, step_rank
from medssm.nn.vss import MLP, DropPath
from medssm.nn.windows import cut, joined


class MambaVisionMixer(Leaf):
    """A scan of half of the channels, beside which the other half goes:

        u, z = silu(conv1d(split(in_proj(x)))), both convolutions see past and future;   dt, B, C = split(x_proj(u))
        y = selective_scan(u, dt_proj(dt), -exp(A_log), B, C, D);   out = out_proj(concat(y, z))

    The step is softplus(W dt + 2 bias): upstream adds dt_proj's bias as the layer's and as the scan's.

    Args: as Mamba's; expand: inner channels, of both halves, over d_model. Input and output (b, l, d_model).
    Weights: A_log, D, in_proj, conv1d_x, conv1d_z, x_proj, dt_proj, out_proj.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 3, expand: float = 2, dt_rank: int | str = "auto") -> None:
        super().__init__()
        half, rank = int(expand * d_model) // 2, step_rank(d_model, dt_rank)
        self.d_state, self.dt_rank = d_state, rank
        self.in_proj, self.out_proj = nn.Linear(d_model, 2 * half, bias=False), nn.Linear(2 * half, d_model, bias=False)
        self.conv1d_x, self.conv1d_z = (nn.Conv1d(half, half, d_conv, padding=d_conv // 2, groups=half, bias=False) for _ in range(2))
        self.x_proj, self.dt_proj = nn.Linear(half, rank + 2 * d_state, bias=False), nn.Linear(rank, half)
        start_steps(self.dt_proj.weight, self.dt_proj.bias, 0.001, 0.1, "random", 1.0, 1e-4)
        self.A_log, self.D = nn.Parameter(rates(half, d_state)), nn.Parameter(torch.ones(half))

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d_model) -> the same shape."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, z = depthwise(self.conv1d_x, u, "silu"), depthwise(self.conv1d_z, z, "silu")
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if plain(self.dt_proj):
            steps = {"delta": dt, "delta_proj": self.dt_proj.weight, "delta_bias": 2 * self.dt_proj.bias}
        else:
            steps = {"delta": self.dt_proj(dt) + self.dt_proj(torch.zeros_like(dt[:1, :1]))}
        y = ops.selective_scan(u, A=-torch.exp(widened(self.A_log)), B=B, C=C, D=self.D, delta_softplus=True, **steps)
        out: Tensor = self.out_proj(torch.cat((y, z), -1))
        return out


class WindowAttention(nn.Module):
    """Softmax attention over all tokens of (b, l, channels)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads: expected a divisor of {channels}, the channels, got {heads}")
        self.heads = heads
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, channels) -> the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        out: Tensor = self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return out


class MixerLayer(nn.Module):
    """x + gamma_1 mixer(norm1(x)), then x + gamma_2 mlp(norm2(x)), on (b, l, channels); layer_scale None leaves the gammas out."""

    def __init__(self, channels: int, mixer: nn.Module, mlp_ratio: float, drop_path: float, layer_scale: float | None) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2 = nn.LayerNorm(channels), mixer, nn.LayerNorm(channels)
        self.mlp, self.drop_path = MLP(channels, int(mlp_ratio * channels)), DropPath(drop_path)
        for name in ("gamma_1", "gamma_2"):
            self.register_parameter(name, None if layer_scale is None else nn.Parameter(torch.full((channels,), layer_scale)))

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, channels) -> the same shape."""
        for norm, part, gamma in ((self.norm1, self.mixer, self.gamma_1), (self.norm2, self.mlp, self.gamma_2)):
            y = part(norm(x))
            x = x + self.drop_path(y if gamma is None else gamma * y)
        return x


class Windows(Leaf):
    """Layers on windows of a map, `side` voxels along each axis, each a sequence; zeros are added up to whole windows and cut off behind."""

    def __init__(self, layers: Sequence[nn.Module], side: int) -> None:
        super().__init__()
        self.layers, self.side = nn.ModuleList(layers), side

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        size, side = x.shape[2:], self.side
        padded = nn.functional.pad(x, [p for n in reversed(size) for p in (0, -n % side)])
        windows = cut(tokens(padded), side)
        dims = len(size)
        t = windows.flatten(1 + dims, -2).flatten(0, dims)
        for layer in self.layers:
            t = layer(t)
        y = image(joined(t.view(windows.shape)))
        for axis, n in enumerate(size, 2):
            y = y.narrow(axis, 0, n)
        return y


def window_stage(
    channels: int, heads: int, window: int, drop_paths: Sequence[float], mlp_ratio: float = 4.0, layer_scale: float | None = None
) -> Windows:
    """A layer in windows for each stochastic depth: the first half, rounded up, scan, and the rest attend."""
    layers, scans = [], -(-len(drop_paths) // 2)
    for i, rate in enumerate(drop_paths):
        mixer = MambaVisionMixer(channels, 8, 3, 1) if i < scans else WindowAttention(channels, heads)
        layers.append(MixerLayer(channels, mixer, mlp_ratio, rate, layer_scale))
    return Windows(layers, window)


class ConvLayer(nn.Module):
    """x + norm2(conv2(gelu(norm1(conv1(x))))) on (b, c, *spatial)."""

    def __init__(self, channels: int, spatial_dims: int, drop_path: float) -> None:
        super().__init__()
        conv, norm = CONV[spatial_dims], BATCH_NORM[spatial_dims]
        self.conv1, self.conv2 = conv(channels, channels, 3, padding=1), conv(channels, channels, 3, padding=1)
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        y = self.norm2(self.conv2(nn.functional.gelu(self.norm1(self.conv1(x)), approximate="tanh")))
        out: Tensor = x + self.drop_path(y)
        return out
