"""Models: one file per architecture, built from medssm.nn; the registry; upstream weight maps.

A network's file registers it, with its facts: a new network is its file and its line below.
"""

from medssm.models import (  # noqa: F401  (imported for what they register)
    cmunext,
    efficientvit_seg,
    egeunet,
    emcad,
    hvmunet,
    lightm_unet,
    lkm_unet,
    malunet,
    mamba_unet,
    mambavision,
    medmamba,
    mednext,
    medssm_unet,
    mixers,
    mlla,
    mlla_unet,
    monai,
    nnmamba,
    nnmamba_cls,
    restore_rwkv,
    rwkv_unet,
    segformer3d,
    segmamba,
    slim_unetr,
    swin_umamba,
    ultralight_vmunet,
    umamba,
    unetr_pp,
    unext,
    vim,
    vmamba,
    vmunet,
    vmunet_v2,
    vrwkv,
    zigrir,
)
from medssm.models.facts import Facts
from medssm.models.registry import (
    create_model,
    from_upstream,
    list_models,
    list_upstream,
    model_facts,
    model_options,
    register_model,
    register_upstream,
)

__all__ = [
    "Facts",
    "create_model",
    "from_upstream",
    "list_models",
    "list_upstream",
    "model_facts",
    "model_options",
    "register_model",
    "register_upstream",
]
