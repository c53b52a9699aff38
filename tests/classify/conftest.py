"""A small data set, and two folds trained on it."""

import json

import pytest

from medssm import cli
from tests.classify.pictures import SMALL, folder, table


@pytest.fixture(scope="session")
def cells(tmp_path_factory):
    """Three classes, eight patients with two pictures of each, and a CSV that names the patients."""
    root = folder(tmp_path_factory.mktemp("cells"))
    table(root)
    return root


@pytest.fixture(scope="session")
def runs(cells, tmp_path_factory):
    """A folder with fold_0 and fold_1, trained by the command until they classify."""
    out = tmp_path_factory.mktemp("runs")
    for fold in range(2):
        words = ["train", str(cells), str(out / f"fold_{fold}"), "--task", "classify", "--model", "vmamba", "--model-kwargs", json.dumps(SMALL)]
        words += [
            "--fold",
            str(fold),
            "--folds",
            "4",
            "--max-steps",
            "40",
            "--batch",
            "8",
            "--lr",
            "0.01",
            "--validations",
            "2",
            "--device",
            "cpu",
            "--no-augment",
        ]
        assert cli.main([*words, "--quiet"]) == 0
    return out
