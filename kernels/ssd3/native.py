"""Mamba-3's recurrence on the CPU: `folded` over the kernel of gated linear attention."""

from functools import partial

from medssm.kernels.gated_linear_attention import native
from medssm.kernels.ssd3 import folded

forward, backward = partial(folded.forward, native), partial(folded.backward, native)
