"""The model card beside an exported file."""

import hashlib
import json

import pytest

from medssm.errors import UserError
from medssm.export import card
from medssm.export.metadata import metadata
from medssm.segment.regions import Regions
from tests.runtime.runs import write_run

SAID = "Research on ball, box in images of MR"


def log(run, **finished):
    (run / "metrics.jsonl").write_text(json.dumps({"step": 10}) + "\n" + json.dumps({"finished": finished}) + "\n")


@pytest.fixture
def run(tmp_path):
    """A training of cases whose names and places are those of persons."""
    run = write_run(tmp_path / "run", {"ball": {"largest_component": True}})
    files = {"images": ["/home/rossi/scan.nii.gz"], "label": "/home/rossi/label.nii.gz"}
    cases = [{"name": f"Rossi_Maria_{i}", **files, "patient": f"Rossi {i % 2}"} for i in range(5)]
    (run / "cases.json").write_text(json.dumps({"training": cases[:4], "validation": cases[4:]}))
    log(run, validation={"ball": 0.91, "box": 0.7, "mean": 0.805}, validation_cases=1, best={"step": 1200, "mean": 0.85}, out="/home/rossi/run")
    return run


def test_it_says_what_the_file_is_and_names_no_person(run, tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"network")
    written = card.write(file, run, metadata(run, custom_ops={"domain": "medssm", "version": 1}))
    text = written.read_text()
    assert written == tmp_path / "model.onnx.md" and text.startswith("# model.onnx\n")
    assert f"| model.onnx | 0.0 MiB | {hashlib.sha256(b'network').hexdigest()} |" in text
    assert hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest() in text
    assert SAID in text and "**Not a medical device.**" in text and "the operators medssm, version 1, of medssm" in text
    assert "4 case(s) of 2 patient(s) to train on, 1 case(s) of 1 patient(s) held out." in text
    assert "| ball | 0.910 |" in text and "| mean | 0.805 |" in text and "Post-processing: ball largest component." in text
    assert "No licence was stated" in text
    assert "rossi" not in text.lower() and str(tmp_path) not in text


def test_two_files_of_one_stem_have_cards_of_their_own(run, tmp_path):
    for ending in ("onnx", "xml"):
        (tmp_path / f"model.{ending}").touch()
        card.write(tmp_path / f"model.{ending}", run, metadata(run))
    assert [(tmp_path / f"model.{ending}.md").read_text().splitlines()[0] for ending in ("onnx", "xml")] == ["# model.onnx", "# model.xml"]


def test_a_card_says_how_its_own_kind_of_file_is_used(run, tmp_path):
    (tmp_path / "model.pt2").touch()
    text = card.card(tmp_path / "model.pt2", run, metadata(run), use="Torch opens it.", needs="torch 9")
    assert "medssm_runtime" not in text and "Torch opens it." in text and "| needs | torch 9 |" in text


def test_the_best_weights_have_their_own_figure(run, tmp_path):
    (run / "model_best.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    (tmp_path / "model.onnx").touch()
    text = card.card(tmp_path / "model.onnx", run, metadata(run, weights="best"))
    assert "Mean Dice 0.850 on the 1 held-out case(s), by the network in PyTorch after step 1,200." in text and "0.805" not in text


def test_figures_of_the_network_before_8_bits_are_not_those_of_the_file(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "compression": [{"kind": "prune"}, {"kind": "int8"}]}))
    (tmp_path / "model.onnx").touch()
    text = card.card(tmp_path / "model.onnx", run, metadata(run))
    assert "by the network in PyTorch, before its weights became 8-bit integers, at the end of its training" in text
    assert "| compressed | channels or states removed, 8-bit integers |" in text


def test_what_the_folder_does_not_say_is_not_invented(tmp_path):
    run = write_run(tmp_path / "run", regions=Regions({"whole": (1, 2), "core": (2,)}, (1, 2)), patch=(16, 16), slice_axis=2, spacing=(1.0, 1.0, 0.0))
    (tmp_path / "model.xml").touch()
    (tmp_path / "model.bin").write_bytes(b"weights")
    (tmp_path / "LICENSE").write_text("Only for you.\n")
    text = card.card(tmp_path / "model.xml", run, metadata(run), license=tmp_path / "LICENSE")
    assert "Segments whole, core in slices of 3D images of MR." in text and "resampled to 1 x 1 x the image's own mm" in text
    assert f"| model.bin | 0.0 MiB | {hashlib.sha256(b'weights').hexdigest()} |" in text
    assert "## Training data\nThe folder of the training does not say." in text and "Not measured" in text
    assert text.endswith("Only for you.\n") and "an inference engine, no operators of medssm" in text
    with pytest.raises(UserError, match=r"license: .*none: not a readable text file"):
        card.card(tmp_path / "model.xml", run, metadata(run), license=tmp_path / "none")
