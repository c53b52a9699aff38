"""Models: one file per architecture, built from medssm.nn; the registry; upstream weight maps."""

from functools import partial

from medssm.models import mixers, umamba
from medssm.models.medssm_unet import medssm_unet
from medssm.models.registry import create_model, from_upstream, list_models, register_model, register_upstream
from medssm.models.weights import Map

register_model("medssm_unet", medssm_unet)
for _kind in ("bot", "enc"):
    register_model(f"umamba_{_kind}", partial(umamba.umamba, _kind))
    # Upstream registers the encoder again inside the decoder, and every convolution and norm again in `all_modules`.
    register_upstream(f"umamba_{_kind}", builder=partial(umamba.upstream, _kind),
                      map=Map(drop=(r"^decoder\.encoder\.", r"\.all_modules\."), rename=((r"^mamba_layer\.", "bottleneck."),)))
register_upstream("mamba", builder=mixers.mamba)
register_upstream("bimamba_v2", "mamba_v2_mixer", builder=mixers.vim)
register_upstream("bimamba_v3", "mamba_v3_mixer", builder=mixers.segmamba)
register_upstream("ss2d", "ss2d_corev0_mixer", builder=mixers.ss2d)

__all__ = ["create_model", "from_upstream", "list_models", "register_model", "register_upstream"]
