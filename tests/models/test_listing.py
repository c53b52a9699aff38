"""medssm models: every network has its facts, and the docs are what the command prints."""

import json
from pathlib import Path

import pytest

import medssm
from medssm import cli
from medssm.models import listing
from medssm.models.listing import MEASURED

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def each_network_is_built_once():
    """Every test of the table needs the sizes of every network."""
    rows, row_of = {}, listing._row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "_row", lambda name, measured: rows.get(name) or rows.setdefault(name, row_of(name, measured)))
        yield


def test_every_network_has_facts(capsys):
    assert cli.main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    assert set(rows) == set(medssm.list_models())
    for name, row in rows.items():
        assert row["source"] and row["licence"] and row["parity"], name
        if row["measured"]:
            assert row["measured"]["parameters"] > 0 and row["measured"]["inference"]["native"]["median"] > 0, name
    assert rows["umamba_enc"]["parameters"]["3d"] > 1e7


def test_the_docs_are_the_commands_table(capsys):
    assert cli.main(["models", "--markdown"]) == 0
    assert (ROOT / "docs" / "models.md").read_text() == capsys.readouterr().out
    results = ROOT / "bench" / "results" / "networks.json"
    assert MEASURED.is_file() == results.is_file()
    if results.is_file():
        assert json.loads(MEASURED.read_text()) == json.loads(results.read_text())


def test_a_pattern_that_fits_nothing_is_one_line(capsys):
    assert cli.main(["models", "resnet*"]) == 2
    assert "no model matches 'resnet*'" in capsys.readouterr().err


def test_a_column_without_a_figure_is_left_out():
    facts = {"name": "a", "task": "", "dimensions": [2], "parameters": {"2d": 1000}, "paper": "1", "source": "s", "licence": "l", "parity": ""}
    assert listing._table([facts | {"measured": None}]) == [
        ["network", "dimensions", "parameters", "source", "licence"],
        ["a", "2", "1 k", "s (arXiv 1)", "l"],
    ]
    times = {"native": {"median": 0.25}}
    measured = {"parameters": 1000, "input": [1, 3, 8, 8], "multiply_adds": 2e9, "memory": 2**20, "inference": times}
    head, cells = listing._table([facts | {"measured": measured}])
    assert "CPU" in head and not {"bf16", "compiled", "in PyTorch"} & {*head} and "250 ms" in cells
