"""Where each network comes from, under which licence its source is, and what its parity with that source rests on."""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """paper: an arXiv number. source: a repository, its licence beside it. parity: how this network was held to it."""

    paper: str
    source: str
    licence: str
    parity: str


_CARDS = "outputs and weight names"
FACTS = {
    "medssm_unet": Fact("", "this project", "Apache-2.0", "its own"),
    "umamba_bot": Fact("2401.04722", "bowang-lab/U-Mamba", "Apache-2.0", _CARDS),
    "umamba_enc": Fact("2401.04722", "bowang-lab/U-Mamba", "Apache-2.0", _CARDS),
    "segmamba": Fact("2401.13560", "ge-xing/SegMamba", "none given", _CARDS),
    "swin_umamba": Fact("2402.03302", "JiarunLiu/Swin-UMamba", "Apache-2.0", "parameter and key counts"),
    "swin_umamba_d": Fact("2402.03302", "JiarunLiu/Swin-UMamba", "Apache-2.0", _CARDS),
    "vmunet": Fact("2402.02491", "JCruan519/VM-UNet", "Apache-2.0", _CARDS),
    "ultralight_vmunet": Fact("2403.20035", "wurenkai/UltraLight-VM-UNet", "MIT", _CARDS),
    "lightm_unet": Fact("2403.05246", "MrBlankness/LightM-UNet", "Apache-2.0", "weight names; outputs to 0.1 of their deviation, see its tests"),
    "vmamba": Fact("2401.10166", "MzeroMiko/VMamba", "MIT", _CARDS),
    "medmamba": Fact("2403.03849", "YubiaoYue/MedMamba", "none given", _CARDS),
    "vim": Fact("2401.09417", "hustvl/Vim", "Apache-2.0", _CARDS),
    "efficientvit_seg": Fact("2205.14756", "mit-han-lab/efficientvit", "Apache-2.0", _CARDS),
    "mlla": Fact("2405.16605", "LeapLabTHU/MLLA", "MIT", _CARDS),
    "vrwkv": Fact("2403.02308", "OpenGVLab/Vision-RWKV", "Apache-2.0", _CARDS),
    **{
        name: Fact(paper, "Project-MONAI/MONAI", "Apache-2.0", "MONAI's own code")
        for name, paper in (
            ("monai_segresnet", "1810.11654"),
            ("monai_dynunet", "1904.08128"),
            ("monai_mednext", "2303.09975"),
            ("monai_unetr", "2103.10504"),
            ("monai_swin_unetr", "2201.01266"),
        )
    },
}
