"""nnU-Net's trainer for networks that scan, and two variants. Which network is built stands in the plans."""

import re

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

CUDA = torch.device("cuda")


class nnUNetTrainerMedssm(nnUNetTrainer):
    """nnU-Net's recipe but for the weight decay: none on biases, norms and the scans' A, D and step biases (Gu and Dao, arXiv 2312.00752)."""

    def configure_optimizers(self):
        optimizer, scheduler = super().configure_optimizers()
        (group,) = optimizer.param_groups
        free = [p for name, p in self.network.named_parameters() if p.ndim < 2 or re.search(r"(\.A_\w+|bias)$", name)]
        ids = {id(p) for p in free}
        group["params"] = [p for p in group["params"] if id(p) not in ids]
        optimizer.add_param_group({**group, "params": free, "weight_decay": 0.0})
        return optimizer, scheduler


class nnUNetTrainerMedssmNoDeepSupervision(nnUNetTrainerMedssm):
    """The loss at full resolution alone."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False


class nnUNetTrainerMedssmShort(nnUNetTrainerMedssm):
    """One epoch of a few iterations: to see that everything fits together."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 20, 2
