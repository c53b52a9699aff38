"""Small networks that the tests of compression share, with weights and statistics that make every channel count."""

import torch

from medssm.nn.mixers import CONVOLUTIONS
from medssm.segment import networks

UNET = {"features": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "decoder_depths": [1, 1, 1], "deep_supervision": True}
BARE = {"features": [4, 8, 32, 32], "depths": [0, 1, 1, 1], "decoder_depths": [1, 1, 0]}
DYNUNET = {"filters": [8, 16, 32], "strides": [1, 2, 2], "kernel_size": [3, 3, 3], "upsample_kernel_size": [2, 2]}
# {what it is called: (model, dims, kwargs)}
NETWORKS = {
    "medssm_unet ss_nd": ("medssm_unet", 3, {**UNET, "mixer": "ss_nd", "d_state": 4}),
    **{f"medssm_unet {mixer}": ("medssm_unet", 2, {**UNET, "mixer": mixer}) for mixer in ("linear_attention", "rwkv", *CONVOLUTIONS, "none")},
    **{f"medssm_unet {mixer}": ("medssm_unet", 2, {**UNET, "mixer": mixer, "expand": 2}) for mixer in ("gla", "delta", "mamba2")},
    "medssm_unet bare": ("medssm_unet", 3, {**BARE, "mixer": "linear_attention"}),
    "umamba_bot": ("umamba_bot", 3, {"features": [8, 16, 32], "deep_supervision": True}),
    "umamba_enc": ("umamba_enc", 2, {"features": [8, 16, 32]}),
    "segmamba": ("segmamba", 3, {"features": [8, 16], "depths": [1, 1], "hidden": 16}),
    "encoder:medssm_unet": ("encoder:medssm_unet", 2, {**UNET, "deep_supervision": False}),
    "vmunet": ("vmunet", 2, {"features": [8, 16, 32], "depths": [1, 1, 1], "decoder_depths": [1, 1, 1], "d_state": 4}),
    "swin_umamba": ("swin_umamba", 2, {"features": [8, 16, 16, 32], "depths": [1, 1, 1]}),
    "swin_umamba_d": ("swin_umamba_d", 2, {"features": [8, 16, 16], "depths": [1, 1, 1], "d_state": 4, "deep_supervision": True}),
    "vmamba": ("vmamba", 2, {"features": [8, 16], "depths": [1, 1], "d_state": 4}),
    "efficientvit_seg b0": ("efficientvit_seg", 2, {"size": "b0"}),
    "efficientvit_seg l1": ("efficientvit_seg", 2, {"size": "l1"}),
    "monai_basicunet": ("monai_basicunet", 2, {"features": [8, 8, 16, 16, 32, 8]}),
    "monai_dynunet": ("monai_dynunet", 3, {**DYNUNET, "res_block": True, "deep_supervision": True}),
    "monai_segresnet": ("monai_segresnet", 2, {"init_filters": 16, "blocks_down": [1, 2, 1], "blocks_up": [1, 1]}),
    "monai_segresnet deconv": ("monai_segresnet", 3, {"init_filters": 8, "norm": ["INSTANCE", {"affine": True}], "upsample_mode": "deconv"}),
    "monai BasicUNet nontrainable": (
        "monai.networks.nets.BasicUNet",
        2,
        {"features": [8, 8, 16, 16, 32, 8], "norm": "batch", "act": "prelu", "upsample": "nontrainable"},
    ),
}


def network_of(name: str, seed: int = 0):
    """(network in eval mode, an input)."""
    model, dims, kwargs = NETWORKS[name]
    torch.manual_seed(seed)
    network = networks.build(model, spatial_dims=dims, in_channels=2, out_channels=3, **kwargs)
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if value.is_floating_point() and value.dim() == 1 and "dt" not in key:
                value += 0.1 * torch.rand_like(value)
    return network.eval(), torch.randn(2, 2, *(16,) * dims)
