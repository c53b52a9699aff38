"""Small networks that the tests of compression share, with weights and statistics that make every channel count."""

import torch

from medssm.nn.mixers import CONVOLUTIONS
from medssm.segment import networks

UNET = {"features": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "decoder_depths": [1, 1, 1], "deep_supervision": True}
BARE = {"features": [4, 8, 32, 32], "depths": [0, 1, 1, 1], "decoder_depths": [1, 1, 0]}
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
