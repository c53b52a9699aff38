"""Two networks that tests of prediction share: two folds of one small training."""

import json

import pytest

from medssm import cli
from tests.segment.synthetic import UNET, nnunet_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Four cases in nnU-Net's layout."""
    return nnunet_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """A folder with fold_0 and fold_1, trained by the command until they segment."""
    out = tmp_path_factory.mktemp("weights")
    for fold in range(2):
        assert (
            cli.main(
                [
                    "train",
                    str(folder),
                    str(out / f"fold_{fold}"),
                    "--model",
                    "monai.networks.nets.UNet",
                    "--model-kwargs",
                    json.dumps({**UNET, "norm": "batch"}),
                    "--patch",
                    "32",
                    "32",
                    "32",
                    "--max-steps",
                    "60",
                    "--lr",
                    "0.01",
                    "--fold",
                    str(fold),
                    "--folds",
                    "4",
                    "--device",
                    "cpu",
                    "--validations",
                    "1",
                    "--quiet",
                ]
            )
            == 0
        )
    return out
