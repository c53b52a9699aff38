"""Mamba-3's recurrence on a GPU: `folded` over the Triton kernels of gated linear attention."""

from functools import partial

from medssm.kernels.gated_linear_attention import triton
from medssm.kernels.ssd3 import folded

forward, backward = partial(folded.forward, triton), partial(folded.backward, triton)
