"""README is short, names what exists, and quotes only what was measured. That its code runs stands in tests/docs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
MEASURED = "\n".join(file.read_text() for file in sorted((ROOT / "bench/results").rglob("*.md")))


def anchors(page: Path) -> set[str]:
    """The links that lead to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_it_is_short():
    assert len(README.split()) <= 900


def test_it_opens_with_the_two_commands():
    assert re.search(r"```\w*\n(.*?)```", README, re.S)[1].splitlines()[0].startswith("make demo")
    targets = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test", "test-all", "docs"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def test_links_and_pictures_exist():
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        assert (ROOT / file).is_file(), link
        assert not anchor or anchor in anchors(ROOT / file), link


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_measured_figures_stand_in_the_results(page):
    """Times, memory and ratios of the tables, digit for digit."""
    rows = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("|")]
    found = {figure for row in rows for figure in re.findall(r"[\d.]+ (?:us|ms|s|MiB)\b|[\d.]+(?= x\b(?! \d))", row)}
    found |= {row.split("|")[-2].strip() for row in rows if re.fullmatch(r"[\d.]+", row.split("|")[-2].strip())}
    assert found
    for figure in found:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", MEASURED), f"{figure} is in no table of bench/results"


def test_layers_and_models_need_no_import_of_their_own():
    code = "import medssm; print(medssm.nn.Mamba.__name__, medssm.create_model.__name__, hasattr(medssm, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Mamba", "create_model", "False"]
