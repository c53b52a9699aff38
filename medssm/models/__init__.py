"""Models: one file per architecture, built from medssm.nn; the registry; upstream weight maps."""

from functools import partial

from medssm.models import (
    efficientvit_seg,
    lightm_unet,
    medmamba,
    mixers,
    mlla,
    monai,
    segmamba,
    swin_umamba,
    ultralight_vmunet,
    umamba,
    vim,
    vmamba,
    vmunet,
    vrwkv,
)
from medssm.models.medssm_unet import medssm_unet
from medssm.models.registry import create_model, from_upstream, list_models, register_model, register_upstream

register_model("medssm_unet", medssm_unet)
for _kind in ("bot", "enc"):
    register_model(f"umamba_{_kind}", partial(umamba.umamba, _kind))
    register_upstream(f"umamba_{_kind}", builder=partial(umamba.upstream, _kind), map=umamba.MAP)
register_model("segmamba", segmamba.segmamba)
register_upstream("segmamba", builder=segmamba.upstream, map=segmamba.MAP)
register_model("vmamba", vmamba.vmamba)
register_upstream("vmamba", builder=vmamba.upstream, map=vmamba.MAP)
register_model("vmunet", vmunet.VMUNet)
register_upstream("vmunet", builder=vmunet.upstream, map=vmunet.MAP)
register_model("swin_umamba", swin_umamba.swin_umamba)
register_upstream("swin_umamba", builder=swin_umamba.upstream, map=swin_umamba.MAP)
register_model("swin_umamba_d", swin_umamba.swin_umamba_d)
register_upstream("swin_umamba_d", builder=swin_umamba.upstream_d, map=swin_umamba.MAP_D)
register_model("medmamba", medmamba.medmamba)
register_upstream("medmamba", builder=medmamba.upstream, map=medmamba.MAP)
register_upstream("medmamba_block", builder=medmamba.upstream_block, map=medmamba.BLOCK_MAP)
register_model("ultralight_vmunet", ultralight_vmunet.UltraLightVMUNet)
register_upstream("ultralight_vmunet", builder=ultralight_vmunet.upstream, map=ultralight_vmunet.MAP)
register_model("lightm_unet", lightm_unet.lightm_unet)
register_upstream("lightm_unet", builder=lightm_unet.upstream, map=lightm_unet.weight_map)
register_model("vim", vim.Vim)
register_upstream("vim", builder=vim.upstream, map=vim.MAP)
register_model("efficientvit_seg", efficientvit_seg.efficientvit_seg)
for _size in efficientvit_seg.SIZES:
    register_upstream(f"efficientvit_seg_{_size}", builder=partial(efficientvit_seg.upstream, _size), map=efficientvit_seg.weight_map(_size))
register_model("mlla", mlla.mlla)
register_upstream("mlla", builder=mlla.upstream, map=mlla.MAP)
register_upstream("mlla_block", builder=mlla.upstream_block, map=mlla.BLOCK_MAP)
register_model("vrwkv", vrwkv.vrwkv)
register_upstream("vrwkv", builder=vrwkv.upstream, map=vrwkv.MAP)
register_upstream("vrwkv_spatialmix", builder=vrwkv.upstream_spatial_mix)
register_upstream("vrwkv_channelmix", builder=vrwkv.upstream_channel_mix)
for _name, _builder in monai.BUILDERS.items():
    register_model(_name, _builder)
register_upstream("mamba", builder=mixers.mamba)
register_upstream("bimamba_v2", "mamba_v2_mixer", builder=mixers.vim)
register_upstream("bimamba_v3", "mamba_v3_mixer", builder=mixers.segmamba)
register_upstream("ss2d", "ss2d_corev0_mixer", builder=mixers.ss2d)

__all__ = ["create_model", "from_upstream", "list_models", "register_model", "register_upstream"]
