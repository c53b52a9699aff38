"""A small training of our own network, which the tests of the command share."""

import pytest

from medssm.segment.train import train
from tests.segment.synthetic import nnunet_folder

KWARGS = {"features": [8, 16, 32], "depths": [1, 1, 1], "decoder_depths": [1, 1], "d_state": 4, "strides": [1, 2, 2]}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Four cases in nnU-Net's layout."""
    return nnunet_folder(tmp_path_factory.mktemp("data"), shape=(24, 20, 16))


@pytest.fixture(scope="session")
def run(folder, tmp_path_factory):
    """A finished training with one case held out."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = {"patch": (16, 16, 16), "fold": 0, "folds": 4, "max_steps": 4, "device": "cpu", "validations": 1, "quiet": True}
    train(folder, out, model_kwargs=KWARGS, **options)
    return out
