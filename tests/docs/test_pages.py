"""What README and the site's pages show works: Python blocks run, commands parse, tutorials' commands run, drawings are those of their script."""

import importlib
import importlib.util
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from medssm import cli, options
from medssm.integrations import mamba_ssm as stand_in

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
RUN = ROOT / "docs/guides/files.md"  # its commands run, on the data set that the page itself makes
CLASSIFY = ROOT / "docs/guides/classify.md"  # its runs are those of classifiers
APART = [ROOT / "docs/tutorials/op.md", ROOT / "docs/developing/model.md"]  # they register what no other test should find


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, code) of a page's fenced blocks, in order; the code is preceded by as many empty lines as lines of the page."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", text, re.M | re.S)
    return [(block[2], "\n" * text.count("\n", 0, block.start(3)) + textwrap.dedent(block[3])) for block in found if block[2] in languages]


def commands(code: str) -> list[list[str]]:
    """The arguments of every `medssm …` in a shell's lines, inside $(…) too."""
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"(?:^|\$\()(medssm [^\n)]*)", code.replace("\\\n", " "), re.M)]


def commands_of(page: Path) -> list[list[str]]:
    return [arguments for _, code in blocks(page, "bash") for arguments in commands(code)]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def needing(*languages: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, *languages)]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in; threads, seed and the stand-in for mamba_ssm as before."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield tmp_path
    torch.set_num_threads(threads)
    stand_in.uninstall()


@pytest.mark.parametrize("page", [page for page in needing("python") if page not in (RUN, *APART)], ids=name)
def test_python_blocks_run(page, workplace):
    if "monai" in page.read_text():
        pytest.importorskip("monai")
    space = {"__name__": "page"}
    for _, code in blocks(page, "python"):
        exec(compile(code, page, "exec"), space)


@pytest.mark.parametrize("page", APART, ids=name)
def test_python_blocks_run_apart(page, workplace):
    file = workplace / "page.py"
    file.write_text("".join(code.lstrip("\n") for _, code in blocks(page, "python")))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, file], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_guide_to_files_runs_as_it_stands(workplace):
    pytest.importorskip("monai")
    space = {"__name__": "page"}
    for language, code in blocks(RUN, "python", "bash"):
        if language == "python":
            exec(compile(code, RUN, "exec"), space)
        else:
            for arguments in commands(code):
                if arguments[0] == "view" and importlib.util.find_spec("ipyniivue") is None:
                    continue
                assert cli.main([*arguments, "--quiet"]) == 0, arguments
    assert space["result"]["classes"]["ball"]["dice"]["mean"] > 0.5


@pytest.mark.parametrize("page", [page for page in needing("bash") if page != RUN and commands_of(page)], ids=name)
def test_commands_parse(page):
    """Each is read against the signature of its function; nothing runs."""
    pytest.importorskip("monai")
    for words in commands_of(page):
        entry = cli.COMMANDS
        while not isinstance(entry, cli.Command):
            entry = entry[words.pop(0) if words and words[0] in entry else ""]
        entry = (page == CLASSIFY and entry.classify) or cli.of_task(entry, words)
        options.read(getattr(importlib.import_module(entry.module), entry.function), "medssm", words)


def test_the_goals_are_included_whole():
    """docs/benchmarks.md takes them by their lines from what `medssm bench` wrote."""
    file, first, last = re.search(r'--8<-- "(bench\S+):(\d+):(\d+)"', (ROOT / "docs/benchmarks.md").read_text()).groups()
    lines = (ROOT / file).read_text().splitlines()
    assert lines[int(first) - 1].startswith("| goal ") and lines[int(last) - 1].startswith("|") and not lines[int(last)]


def test_drawings_are_those_of_their_script():
    drawn = runpy.run_path(str(ROOT / "docs/drawings.py"))["pictures"]()
    assert {file.name for file in (ROOT / "docs").rglob("*.svg")} == {file.name for file in drawn}
    for file, drawing in drawn.items():
        assert file.read_text() == drawing, f"{file.name}: run python docs/drawings.py"


def test_every_public_function_is_in_the_reference():
    import medssm

    text = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    listed = set(re.findall(r"^::: \S*?(\w+)$", text, re.M))
    ops = {name for name, value in vars(medssm.ops).items() if inspect.isfunction(value)}
    assert {*ops, *medssm.nn.__all__, *medssm.models.__all__, "backends", "explain", "use_backend"} <= listed


def test_every_page_is_in_the_navigation():
    navigation = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert navigation == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
