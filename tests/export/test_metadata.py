"""What an exported file carries: all that is needed from a scan to its label map."""

import hashlib
import json

import pytest

import medssm
from medssm.errors import UserError
from medssm.export.metadata import metadata, text
from medssm.segment.regions import Regions
from tests.runtime.runs import MODEL, write_run

CT = {"scheme": "ct", "low": -900.0, "high": 300.0, "mean": 10.0, "deviation": 100.0}


def test_it_names_all_that_prediction_reads(tmp_path):
    run = write_run(
        tmp_path / "run",
        {"ball": {"largest_component": True}, "box": {}},
        channels=("CT", "PET"),
        intensity=(CT, {"scheme": "zscore"}),
        spacing=(0.0, 0.8, 3.0),
        patch=(16, 32),
        slice_axis=0,
        mirror=(1, 2),
        sides=((1, 2),),
    )
    weights = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads(text(metadata(run, mirror=True, custom_ops={"domain": "medssm", "version": 1}))) == {
        "schema": 1,
        "task": "segment",
        "medssm": medssm.__version__,
        "model": MODEL,
        "compression": [],
        "spatial_dims": 2,
        "channels": [{"name": "CT", **CT}, {"name": "PET", "scheme": "zscore"}],
        "classes": {"background": 0, "ball": 1, "box": 2},
        "regions": None,
        "spacing": [0.0, 0.8, 3.0],
        "patch": [16, 32],
        "slice_axis": 0,
        "overlap": 0.5,
        "mirror": {"average": True, "axes": [1, 2], "sides": [[1, 2]]},
        "postprocessing": {"ball": {"largest_component": True}},
        "weights": {"file": "model.safetensors", "sha256": weights},
        "custom_ops": {"domain": "medssm", "version": 1},
    }


def test_regions_and_the_steps_of_a_compression(tmp_path):
    run = write_run(tmp_path / "run", regions=Regions({"whole": (1, 2), "core": (2,)}, (1, 2)))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "compression": [{"kind": "prune", "kept": {}}, {"kind": "int8"}]}))
    table = json.loads(text(metadata(run)))
    assert table["regions"] == {"values": {"whole": [1, 2], "core": [2]}, "written": [1, 2]}
    assert table["compression"] == ["prune", "int8"] and table["custom_ops"] is None and table["mirror"]["average"] is False


def test_a_folder_of_folds_and_missing_weights_are_refused(tmp_path):
    write_run(tmp_path / "folds" / "fold_0")
    with pytest.raises(UserError, match=r"expected one network, got the folds fold_0"):
        metadata(tmp_path / "folds")
    with pytest.raises(UserError, match=r"model_best\.safetensors: no such file"):
        metadata(tmp_path / "folds" / "fold_0", weights="best")
