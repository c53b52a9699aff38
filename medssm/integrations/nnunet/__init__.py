"""medssm's segmentation networks in nnU-Net v2 (Isensee et al., Nature Methods 2021).

    nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres
    medssm nnunet plans $nnUNet_preprocessed/Dataset501_Heart/nnUNetPlans.json --model umamba_bot
    nnUNetv2_train 501 3d_fullres 0 -p nnUNetPlans_umamba_bot
    nnUNetv2_predict -d 501 -c 3d_fullres -f 0 -p nnUNetPlans_umamba_bot -i images -o predicted

nnU-Net builds `Network` from the rewritten plans by itself, with any of its trainers. Trainers of our own lie in the folder that
`medssm nnunet path` prints; nnU-Net looks for trainers in the folders that the environment variable nnUNet_extTrainer lists:

    export nnUNet_extTrainer=$(medssm nnunet path)
    nnUNetv2_train 501 3d_fullres 0 -p nnUNetPlans_umamba_bot -tr nnUNetTrainerMedssm
"""

from medssm.integrations.nnunet.networks import Network
from medssm.integrations.nnunet.plans import rewrite

__all__ = ["Network", "rewrite"]
