"""bench/half_hour.py, for a second."""

import importlib
import json
from pathlib import Path

import pytest

from tests.segment.synthetic import nnunet_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.thorough  # trains the default network
def test_a_second_of_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    data = nnunet_folder(tmp_path / "data", cases=25, shape=(20, 18, 16))
    words = [str(data), str(tmp_path / "work"), "--seconds", "1", "--out", str(tmp_path / "out")]
    bench = importlib.import_module("half_hour")
    bench.main(words)
    bench.main(words)  # the training is there
    (entry,) = json.loads((tmp_path / "out/results.json").read_text()).values()
    assert len(entry["patients"]) == entry["validation_cases"] == 5 and entry["seconds"] < 60
    assert (tmp_path / "out/results.md").read_text().count("| medssm_unet |") == len(entry["classes"]) + 1
