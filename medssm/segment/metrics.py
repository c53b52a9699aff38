"""Overlap and surface distances of two masks, in millimetres.

S_a, S_b are the surface voxels of the masks a, b: those of the mask with a face on the outside or on the image's border. With d(x, S) the
distance in millimetres from x to the nearest voxel of S:
  Dice = 2 |a & b| / (|a| + |b|)
  HD95 = max(P95 of d(x, S_b) over x in S_a, P95 of d(x, S_a) over x in S_b)
  NSD  = (|{x in S_a: d(x, S_b) <= t}| + |{x in S_b: d(x, S_a) <= t}|) / (|S_a| + |S_b|), the surface Dice at tolerance t
These are MONAI's definitions (compute_hausdorff_distance with percentile 95, compute_surface_dice); here both come from one pair of
distance transforms, taken in the box about the masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage


def compare(a: np.ndarray, b: np.ndarray, spacing: Sequence[float], nsd_mm: float, shape: Sequence[int] | None = None) -> dict[str, float] | None:
    """{"dice", "hd95", "nsd"} of two masks (x, y, z) with voxels of `spacing` mm; None where both are empty.

    Where one is empty: Dice 0, NSD 0, and HD95 the diagonal of the image, the largest distance there could be. `shape` is the image's,
    where the masks are cut out of it; nothing of either may lie outside of the cut.
    """
    shape = a.shape if shape is None else shape
    size = int(a.sum()) + int(b.sum())
    if not size:
        return None
    if not a.any() or not b.any():
        return {"dice": 0.0, "hd95": float(np.linalg.norm(np.array(shape) * spacing)), "nsd": 0.0}
    flat = tuple(axis for axis, edge in enumerate(shape) if edge == 1 < max(shape))
    box = ndimage.find_objects((a | b).astype(np.uint8))[0]
    surface_a, surface_b = _surface(a[box], flat), _surface(b[box], flat)
    from_a, from_b = _distance_to(surface_b, spacing)[surface_a], _distance_to(surface_a, spacing)[surface_b]
    close = int((from_a <= nsd_mm).sum()) + int((from_b <= nsd_mm).sum())
    return {
        "dice": 2 * int((a & b).sum()) / size,
        "hd95": float(max(np.percentile(from_a, 95), np.percentile(from_b, 95))),
        "nsd": close / (len(from_a) + len(from_b)),
    }


def _surface(mask: np.ndarray, flat: tuple[int, ...]) -> np.ndarray:
    """The mask's voxels with a neighbour, across a face, outside of it; across the `flat` axes of a plane there are no faces."""
    inner = np.squeeze(mask, flat)
    return np.expand_dims(inner & ~ndimage.binary_erosion(inner), flat)


def _distance_to(surface: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    return ndimage.distance_transform_edt(~surface, sampling=spacing)
