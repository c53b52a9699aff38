"""A function's signature and docstring as command line and configuration file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
import yaml

from medssm import options
from medssm.errors import UserError
from medssm.options import Option


def sample(
    data: Path | str,
    out: Path | str,
    *,
    steps: int | None = None,
    rate: float = 1e-3,
    axes: Sequence[int] | None = None,
    spacing: tuple[float, float, float] | None = None,
    dims: Literal[2, 3] = 3,
    kind: Annotated[str, Option(choices=("tall", "wide"))] = "tall",
    names: Sequence[str] = ("unet",),
    parts: Annotated[Sequence[str], Option(flag="--part", repeat=True)] = (),
    pattern: Annotated[str | None, Option(alone="*")] = None,
    mirror: str | Sequence[int] = "auto",
    devices: int | str = 1,
    keywords: Mapping[str, Any] | None = None,
    classes: Mapping[str, int] | Path | str | None = None,
    model: torch.nn.Module | None = None,
    augment: bool = True,
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Do what a test
    wants, 100 % of it.

    More that is no part of the description.

    Args: Data
        data: folder of images,
            or one of them
        out: folder for the results
    Args: Training
        steps: how many (default: until `resume` is given)
        rate: of learning
        augment: turn and zoom
        resume: go on in `out`

    Returns:
        names: this is no argument.
    """
    return locals()


def words(first: str = "*", /, *more: str, needed: str, loud: bool = False) -> dict[str, Any]:
    """Words."""
    return locals()


def read(*line, function=sample):
    return options.read(function, "medssm sample", list(map(str, line)))


def value(name, *line):
    return read("a", "b", *line).values[name]


def test_a_function_gets_what_the_line_says():
    result = read("a", "--steps", 5, "b", "--no-augment", "--axes", 0, 2, "--quiet").call(sample)
    assert result["data"] == Path("a") and result["out"] == Path("b") and result["steps"] == 5 and result["axes"] == [0, 2]
    assert result["augment"] is False and result["resume"] is False and result["quiet"] is True and result["rate"] == 1e-3
    assert read("a", "b").call(sample)["quiet"] is False


@pytest.mark.parametrize(
    ("line", "name", "wanted"),
    [
        (["--steps", "7"], "steps", 7),
        (["--steps=7"], "steps", 7),
        (["--steps", "null"], "steps", None),
        (["--steps", "7", "--steps", "8"], "steps", 8),
        (["--rate", "1e-4"], "rate", 1e-4),
        (["--rate", "-2"], "rate", -2.0),
        (["--spacing", "1", "2", "3"], "spacing", [1.0, 2.0, 3.0]),
        (["--dims", "2"], "dims", 2),
        (["--kind", "wide"], "kind", "wide"),
        (["--names", "a", "b"], "names", ["a", "b"]),
        (["--names", "1"], "names", ["1"]),
        (["--axes", "0", "1", "--axes", "2"], "axes", [2]),
        (["--part", "x", "--part", "y"], "parts", ["x", "y"]),
        (["--pattern"], "pattern", "*"),
        (["--pattern", "u*"], "pattern", "u*"),
        (["--mirror", "0,1"], "mirror", "0,1"),
        (["--mirror", "0"], "mirror", "0"),
        (["--mirror", "[0, 1]"], "mirror", [0, 1]),
        (["--devices", "2"], "devices", 2),
        (["--devices", "0,1"], "devices", "0,1"),
        (["--keywords", '{"size": "tiny", "deep": {"a": [1e-3]}}'], "keywords", {"size": "tiny", "deep": {"a": [1e-3]}}),
        (["--classes", "dataset.json"], "classes", Path("dataset.json")),
        (["--classes", "{liver: 1}"], "classes", {"liver": 1}),
        (["--resume"], "resume", True),
        (["--resume", "--no-resume"], "resume", False),
        (["--no-augment"], "augment", False),
    ],
)
def test_words_become_what_the_annotation_says(line, name, wanted):
    found = value(name, *line)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "data, out: expected a value on the command line or in a file (--config), got none"),
        (["a"], "out: expected a value on the command line or in a file (--config), got none"),
        (["a", "b", "c", "d"], "expected DATA OUT, got one more word: 'c'"),
        (["a", "b", "--step", "3"], "--step: no such option, did you mean --steps?"),
        (["a", "b", "--xyz", "3"], "--xyz: no such option"),
        (["a", "b", "-n"], "-n: no such option"),
        (["a", "b", "--model", "x"], "--model: no such option"),
        (["a", "b", "--steps", "many"], "--steps: expected a whole number, got 'many'"),
        (["a", "b", "--steps", "1.5"], "--steps: expected a whole number, got '1.5'"),
        (["a", "b", "--steps"], "--steps: expected a whole number, got none"),
        (["a", "b", "--steps", "--resume"], "--steps: expected a whole number, got none"),
        (["a", "b", "--rate", "fast"], "--rate: expected a number, got 'fast'"),
        (["a", "b", "--dims", "4"], "--dims: expected one of 2, 3, got '4'"),
        (["a", "b", "--kind", "flat"], "--kind: expected one of tall, wide, got 'flat'"),
        (["a", "b", "--axes", "0", "x"], "--axes: expected one or more values, each a whole number, got 'x'"),
        (["a", "b", "--spacing", "1", "2"], "--spacing: expected 3 values, each a number, got 2"),
        (["a", "b", "--keywords", "3"], "--keywords: expected a mapping in JSON or YAML, got '3'"),
        (["a", "b", "--resume=no"], "--resume: expected no value, got 'no'"),
        (["a", "b", "--config", "none.yaml"], "--config: none.yaml: No such file or directory"),
    ],
)
def test_a_wrong_line_is_one_clear_line(line, message):
    with pytest.raises(UserError) as error:
        read(*line)
    assert str(error.value) == message


def write(path, text):
    path.write_text(text)
    return path


def test_a_file_gives_options_and_the_line_wins(tmp_path):
    one = write(
        tmp_path / "one.yaml", "data: x\nout: y\nsteps: 5\nrate: 1e-5\naugment: false\nspacing: [1, 2, 3]\nkeywords: {size: tiny, rate: 1e-4}\n"
    )
    two = write(tmp_path / "two.yaml", "steps: 6\nnames: unet\nresume: true\nclasses: {liver: 1}\nmirror: [0]\n")
    given = read("--config", one, "--config", two, "--no-resume", "z")
    wanted = {"steps": 6, "rate": 1e-5, "augment": False, "spacing": [1, 2, 3], "keywords": {"size": "tiny", "rate": 1e-4}, "names": ["unet"]}
    wanted |= {"data": Path("z"), "out": Path("y"), "resume": False, "classes": {"liver": 1}, "mirror": [0]}
    assert {name: given.values[name] for name in wanted} == wanted
    sources = {"data": "command line", "out": str(one), "steps": str(two), "resume": "command line", "dims": "default"}
    assert {name: given.sources[name] for name in sources} == sources


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step: 3", "{file}: step: no such option of medssm sample, did you mean steps?"),
        ("max-steps: 3", "{file}: max-steps: no such option of medssm sample, did you mean steps?"),
        ("quiet: true", "{file}: quiet: no such option of medssm sample"),
        ("steps: many", "{file}: --steps: expected a whole number, got 'many'"),
        ("resume: 3", "{file}: --resume: expected true or false, got '3'"),
        ("spacing: 3", "{file}: --spacing: expected 3 values, each a number, got 1"),
        ("axes: [0, x]", "{file}: --axes: expected one or more values, each a whole number, got 'x'"),
        ("dims: null", "{file}: --dims: expected one of 2, 3, got null"),
        ("keywords: 3", "{file}: --keywords: expected a mapping in JSON or YAML, got '3'"),
        ("- 3", "--config: {file}: expected a mapping of options, got list"),
        ("a: b: c", "--config: {file}: not YAML (mapping values are not allowed"),
        ("\0", "--config: {file}: not YAML ("),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it_and_the_key(tmp_path, text, message):
    file = write(tmp_path / "c.yaml", text)
    with pytest.raises(UserError) as error:
        read("a", "b", "--config", file)
    assert str(error.value).startswith(message.format(file=file)) and len(str(error.value).splitlines()) == 1


def test_arguments_written_as_yaml_are_read_again(tmp_path):
    given = read("a", "b", "--axes", 0, 1, "--rate", "1e-7", "--keywords", '{"deep": {"a": [1, null]}, "on": true}', "--names", "yes", "--resume")
    text = options.as_yaml(given.values, given.sources)
    assert read("--config", write(tmp_path / "c.yaml", text)).values == {**given.values, "names": ["yes"], "parts": []}
    sources = {line.split(":")[0]: line.rpartition("# ")[2] for line in text.splitlines() if "#" in line}
    assert sources["rate"] == sources["keywords"] == "command line" and sources["dims"] == "default"
    assert yaml.safe_load(text)["axes"] == [0, 1]
    long = read("a" * 200, "b", "--names", *["a name"] * 40)
    assert len(options.as_yaml(long.values, long.sources).splitlines()) == len(long.values)


def test_print_config_needs_no_argument():
    given = read("--print-config")
    assert given.flags == {"print_config"} and "data" not in given.values and given.values["steps"] is None


def test_every_argument_may_be_given_by_name():
    assert [read(*line).values["out"] for line in (("a", "--out", "b"), ("--out", "b", "a"), ("--data", "a", "--out", "b"))] == [Path("b")] * 3


def test_words_that_are_left_and_words_after_two_dashes():
    given = read("u*", "a=1", "--needed", "x", "b=2", "--loud", "--", "--c", function=words)
    assert given.call(words) == {"first": "u*", "more": ("a=1", "b=2", "--c"), "needed": "x", "loud": True}
    assert read("--needed", "x", function=words).call(words)["first"] == "*"
    with pytest.raises(UserError, match=r"^--needed: expected a value"):
        read(function=words)


def test_the_help_is_the_docstring_in_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as end:
            read(flag)
        assert end.value.code == 0
    shown = capsys.readouterr().out
    for line in (
        "usage: medssm sample DATA OUT [options]",
        "Do what a test wants, 100 % of it.",
        "Data:\n  DATA                     folder of images, or one of them\n",
        "  --steps N                how many (default: until --resume is given)\n",
        "  --augment, --no-augment  turn and zoom (default: on)\n",
        "  --resume                 go on in OUT\n",
        "  --rate X                 of learning (default: 0.001)\n",
        "  --dims {2,3}             (default: 3)\n",
        "  --part TEXT\n",
    ):
        assert line in shown, line
    assert "More that is" not in shown and "--model" not in shown and shown.count("--quiet") == 2
    with pytest.raises(SystemExit):
        read("--help", function=words)
    assert "usage: medssm sample [FIRST] [MORE...] --needed TEXT [options]" in capsys.readouterr().out
