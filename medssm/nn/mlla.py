"""MLLA's linear attention (Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective", arXiv 2405.16605), in 2D and 3D."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssm import ops
from medssm.kernels.dtypes import compute_dtype
from medssm.nn.blocks import CONV, check_dims, depthwise
from medssm.nn.leaf import Leaf
from medssm.nn.vss import MLP, DropPath
from medssm.ops import cut, modes


class LinearAttention(Leaf):
    """Non-causal linear attention with rotary positions in the numerator and a local encoding of v, on (b, *spatial, c):

        q, k = elu(qk(x)) + 1;   v = x;   o_t = R_t q_t (sum_i R_i k_i v_i^T) / (q_t . sum_i k_i + 1e-6 l);   out = o + lepe(v)

    R rotates by the voxel's position (`rotations`, over all channels before the heads divide them), l is the number of voxels.

    Args:
        channels: in and out. heads: each has channels / heads of them, an even number, since rotations take two. bias: of qk.
        rotary=False leaves the rotation out. kernel: the side of lepe's depthwise kernel.

    Weights: qk (2c, c) and lepe, as MLLA's. `keep_heads` adds the buffer `turned` (c,).
    """

    turned: Tensor | None

    def __init__(self, channels: int, heads: int, spatial_dims: int = 2, bias: bool = True, rotary: bool = True, kernel: int = 3) -> None:
        super().__init__()
        check_dims(spatial_dims)
        if channels % heads or (rotary and channels // heads % 2):
            raise ValueError(f"heads: expected a number that divides {channels} channels into even parts, got {heads}")
        self.heads, self.rotary, self.angles = heads, rotary, channels
        self.register_buffer("turned", None)
        self.qk = nn.Linear(channels, 2 * channels, bias=bias)
        self.lepe = CONV[spatial_dims](channels, channels, kernel, padding=kernel // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> the same shape."""
        spatial = x.shape[1:-1]
        q, k = self.qk(x).flatten(1, -2).unflatten(-1, (2, self.heads, -1)).unbind(2)
        v = x.flatten(1, -2).unflatten(-1, (self.heads, -1))
        rotary, length = None, math.prod(cut.whole(spatial))
        feature_map: str | None = "elu"
        eps = 1e-6 * length
        if self.rotary:
            if modes.traced():
                like = x.detach() if self.turned is None else x.detach()[..., :1].expand(*x.shape[:-1], self.angles)  # the operator looks at the size
                turns = torch.ops.medssm.rotations(like)
            else:
                turns = self._turns(x)
            rotary = self.by_heads(turns)
        if modes.traced():  # an operator's number would be that of the traced size: the same quotient by k / l
            q, k, feature_map, eps = nn.functional.elu(q) + 1, (nn.functional.elu(k) + 1) / length, None, 1e-6
        o: Tensor = ops.linear_attention(q, k, v, feature_map=feature_map, rotary=rotary, eps=eps)
        return o.flatten(-2).view_as(x) + depthwise(self.lepe, x)

    def _turns(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`rotations` of x (b, *spatial, c)."""
        spatial, over_ranks = x.shape[1:-1], cut.current()
        if over_ranks is None:
            return rotations(spatial, self.angles, x.device, compute_dtype(x))
        axis, row = over_ranks.first_row(spatial)
        return turned_from(row, spatial, self.angles, x.device, compute_dtype(x), axis)

    def by_heads(self, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(cos, sin) of all `angles` channels, (l, angles) each -> (l, heads, channels of a head), of the heads that are there."""
        cos, sin = (t if self.turned is None else t.index_select(-1, self.turned) for t in turns)
        return cos.unflatten(-1, (self.heads, -1)), sin.unflatten(-1, (self.heads, -1))

    def keep_heads(self, heads: Tensor) -> None:
        """Keep the rotations of these heads alone, which turn as they did; it is for who removes the other heads' weights."""
        channels = torch.arange(self.angles) if self.turned is None else self.turned
        self.turned = channels.view(self.heads, -1)[heads.to(channels.device)].flatten()
        self.heads = len(heads)


class MLLA(nn.Module):
    """Linear attention with Mamba's gate: out_proj(attn(silu(dwc(in_proj(x)))) silu(act_proj(x))), on (b, *spatial, c).

    Arguments as LinearAttention. Weights: in_proj, act_proj, dwc (depthwise), attn, out_proj.
    """

    def __init__(self, channels: int, heads: int, spatial_dims: int = 2, bias: bool = True, rotary: bool = True, kernel: int = 3) -> None:
        super().__init__()
        self.in_proj, self.act_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.dwc = CONV[spatial_dims](channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.attn = LinearAttention(channels, heads, spatial_dims, bias, rotary, kernel)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> the same shape."""
        gate = nn.functional.silu(self.act_proj(x))
        v = depthwise(self.dwc, self.in_proj(x), "silu")
        out: Tensor = self.out_proj(self.attn(v) * gate)
        return out


class MLLABlock(nn.Module):
    """x + cpe1(x), then + mixer(norm1(x)), then + cpe2(x), then + mlp(norm2(x)), on (b, *spatial, c); cpe1 and cpe2 are depthwise convolutions.

    mlp_ratio: hidden channels of the MLP over outer; dropout: in it; drop_path: of mixer and MLP. The others as LinearAttention.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        spatial_dims: int = 2,
        mlp_ratio: float = 4.0,
        bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.cpe1, self.cpe2 = (CONV[spatial_dims](channels, channels, 3, padding=1, groups=channels) for _ in range(2))
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mixer = MLLA(channels, heads, spatial_dims, bias)
        self.mlp, self.drop_path = MLP(channels, int(mlp_ratio * channels), dropout), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> the same shape."""
        x = x + depthwise(self.cpe1, x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        x = x + depthwise(self.cpe2, x)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


def rotations(spatial: Sequence[int], channels: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(cos, sin), (l, channels) each, of the angles by which the voxels of `spatial` rotate neighbouring pairs of channels.

    With m = channels // (2 dims), the first m pairs turn with the position along the first axis, pair j by 10000^(-j / m) radians a voxel,
    the next m with the second axis, and so on; channels that are left over do not turn. Made for the size at hand and kept for the last
    eight sizes, since each is as large as two of the maps.
    """
    return _rotations(tuple(spatial), channels, str(device), dtype)


@torch.library.custom_op("medssm::rotations", mutates_args=())
def _traced_rotations(x: Tensor) -> tuple[Tensor, Tensor]:
    """`rotations` for (b, *spatial, c), as an operator that looks at the size when it runs."""
    cos, sin = rotations(x.shape[1:-1], x.shape[-1], x.device, compute_dtype(x))
    return cos.clone(), sin.clone()


@_traced_rotations.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (math.prod(x.shape[1:-1]), x.shape[-1])
    return x.new_empty(shape, dtype=compute_dtype(x)), x.new_empty(shape, dtype=compute_dtype(x))


@functools.lru_cache(maxsize=8)
def _rotations(spatial: tuple[int, ...], channels: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return turned_from(0, spatial, channels, device, dtype)


def turned_from(
    row: int, spatial: Sequence[int], channels: int, device: torch.device | str, dtype: torch.dtype, cut_axis: int = 0
) -> tuple[Tensor, Tensor]:
    """`rotations` of a slab (*spatial) that begins at `row` of its volume's cut axis; not kept."""
    with torch.inference_mode(False), torch.no_grad():
        pairs = channels // (2 * len(spatial))
        rates = 10000.0 ** (-torch.arange(pairs, device=device, dtype=torch.float64) / max(pairs, 1))
        cos = torch.ones(*spatial, channels, device=device, dtype=dtype)
        sin = torch.zeros_like(cos)
        for axis, size in enumerate(spatial):
            at = torch.arange(size, device=device, dtype=torch.float64) + (row if axis == cut_axis else 0)
            angles = (at[:, None] * rates).repeat_interleave(2, -1)
            shape = [size if i == axis else 1 for i in range(len(spatial))]
            part = slice(2 * pairs * axis, 2 * pairs * (axis + 1))
            cos[..., part], sin[..., part] = angles.cos().to(dtype).view(*shape, -1), angles.sin().to(dtype).view(*shape, -1)
        return cos.flatten(0, -2), sin.flatten(0, -2)
