"""The way of docs/guides/files.md on real scans: cases of the Decathlon's hippocampus are checked, trained on, predicted and scored."""

import csv
import json
from pathlib import Path

import pytest

from medssm import cli
from medssm.segment.volumetry import VOLUMES

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "hippocampus"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


@pytest.fixture
def data(tmp_path):
    """Six cases as links; the last one is only predicted."""
    for label in sorted((DATA / "labelsTr").iterdir())[:6]:
        name = label.name.removesuffix(".nii.gz")
        part = "Ts" if len(list(tmp_path.glob("labelsTr/*"))) == 5 else "Tr"
        for link, target in ((f"labels{part}/{label.name}", label), (f"images{part}/{name}_0000.nii.gz", DATA / "imagesTr" / f"{name}_0000.nii.gz")):
            (tmp_path / link).parent.mkdir(exist_ok=True)
            (tmp_path / link).symlink_to(target)
    (tmp_path / "dataset.json").write_text(json.dumps(json.loads((DATA / "dataset.json").read_text()) | {"numTraining": 5}))
    return tmp_path


def test_real_scans_by_the_commands(data, tmp_path_factory, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    assert cli.main(["check", str(data), "--quiet"]) == 0
    options = ["--fold", "0", "--group", r"hippocampus_(\d+)", "--max-steps", "60", "--size", "tiny", "--patch", "32", "48", "32", "--batch", "1"]
    assert cli.main(["train", str(data), "run", *options, "--lr", "0.01", "--validations", "2", "--device", "cpu", "--quiet"]) == 0
    kept = {file.name for file in Path("run").iterdir()}
    assert kept >= {"model.safetensors", "model_best.safetensors", "postprocessing.json", "cases.json", "fitted.json"}
    assert cli.main(["predict", "run", str(data / "imagesTr"), str(data / "imagesTs"), "predictions", "--device", "cpu", "--quiet"]) == 0
    for words in (["predict", "run", "run/cases.json", "held_out"], ["evaluate", "held_out", "run/cases.json", "--classes", "run"]):
        assert cli.main([*words, "--section", "validation", "--quiet"]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", "predictions", str(DATA / "labelsTr"), "--classes", "run", "--json", "--quiet"]) == 1  # the others are not predicted
    result = json.loads(capsys.readouterr().out)
    assert len(result["cases"]) == 6 and len(result["failed"]) == len(list((DATA / "labelsTr").iterdir())) - 6
    assert result["mean"]["dice"]["mean"] > 0.4
    with open(Path("predictions") / VOLUMES, newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["class"] for row in rows] == ["anterior", "posterior"] * 6 and all(0.2 < float(row["ml"]) < 10 for row in rows)
