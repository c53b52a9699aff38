"""nnU-Net's trainer for networks that scan, and two variants. Which network is built stands in the plans."""

import re
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

CUDA = torch.device("cuda")


class nnUNetTrainerMedssm(nnUNetTrainer):
    """nnU-Net's recipe but for the weight decay: none on biases, norms and the scans' A, D and step biases (Gu and Dao, arXiv 2312.00752)."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """nnU-Net's optimizer and scheduler, the parameters without decay a group of their own."""
        optimizer, scheduler = super().configure_optimizers()
        (group,) = optimizer.param_groups
        free = [p for name, p in self.network.named_parameters() if p.ndim < 2 or re.search(r"(\.A_\w+|bias)$", name)]
        ids = {id(p) for p in free}
        group["params"] = [p for p in group["params"] if id(p) not in ids]
        optimizer.add_param_group({**group, "params": free, "weight_decay": 0.0})
        return optimizer, scheduler


class nnUNetTrainerMedssmNoDeepSupervision(nnUNetTrainerMedssm):
    """The loss at full resolution alone."""

    def __init__(self, plans: dict[str, Any], configuration: str, fold: int, dataset_json: dict[str, Any], device: torch.device = CUDA) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False


class nnUNetTrainerMedssmShort(nnUNetTrainerMedssm):
    """One epoch of a few iterations: to see that everything fits together."""

    def __init__(self, plans: dict[str, Any], configuration: str, fold: int, dataset_json: dict[str, Any], device: torch.device = CUDA) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 20, 2
