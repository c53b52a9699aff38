"""The medssm command: help, errors and the doctor."""

import importlib
import inspect
import json
import pathlib
import subprocess
import sys

import pytest

import medssm
from medssm import cli, doctor, options


def test_overview_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


def commands():
    found = {
        f"{name} {kind}".strip(): command
        for name, entry in cli.COMMANDS.items()
        for kind, command in ({"": entry} if isinstance(entry, cli.Command) else entry).items()
    }
    return found | {f"{name} (classify)": command.classify for name, command in found.items() if command.classify}


@pytest.mark.parametrize("name", list(commands()))
def test_every_command_has_help_json_and_quiet(name, tmp_path, capsys):
    words = name.removesuffix(" (classify)").split()
    if words != name.split():  # what asks for a classifier
        (tmp_path / "fitted.json").write_text('{"task": "classify"}')
        words += {"train": ["--task", "classify"], "evaluate": ["found.csv"], "predict": [str(tmp_path)]}[words[0]]
    with pytest.raises(SystemExit) as exit:
        cli.main([*words, "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "--json" in shown and "--quiet" in shown and "--config" in shown
    assert shown.startswith(f"usage: medssm {name}")


@pytest.mark.parametrize("name", list(commands()))
def test_every_option_is_described_once_in_the_functions_docstring(name):
    command = commands()[name]
    function = getattr(importlib.import_module(command.module), command.function)
    summary, arguments = options._described(function)
    assert summary and callable(getattr(importlib.import_module(command.module), command.show))
    assert [argument.name for argument in arguments if not argument.text] == []
    assert set(options._documented(function)[1]) <= {*inspect.signature(function).parameters}


def test_a_group_lists_its_commands(capsys):
    assert cli.main(["nnunet", "--help"]) == 0
    assert "plans" in capsys.readouterr().out
    assert cli.main(["nnunet"]) == 2
    assert cli.main(["export", "bundel"]) == 2
    assert capsys.readouterr().err == f"medssm export: expected one of {', '.join(cli.COMMANDS['export'])}, got 'bundel', did you mean bundle?\n"


def test_the_overview_and_the_version_come_without_heavy_imports():
    heavy = {"monai", "lightning", "rich", "jsonargparse", "yaml"}
    code = f"import sys; from medssm import cli; cli.main(['--help']); cli.main(['--version']); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [medssm.__version__, "set()"], done.stdout


def test_what_a_command_prints_does_not_get_into_the_json(monkeypatch, capsys):
    def talk():
        """Talk."""
        print("a word")
        return {"said": 1, "file": pathlib.Path("a"), "failed": {"case": "case.nii: bad"}}

    monkeypatch.setattr(doctor, "doctor", talk)
    assert cli.main(["doctor", "--json"]) == 1
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert (result["said"], result["file"]) == (1, "a") and shown.err == "a word\nmedssm doctor: case.nii: bad\n"


def test_print_config_runs_nothing_and_says_where_values_come_from(capsys):
    assert cli.main(["models", "u*", "--print-config"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["pattern:", "u*", "#", "command", "line"],
        ["markdown:", "false", "#", "default"],
    ]


def test_a_missing_package_is_one_line_that_says_how_to_get_it():
    code = """if True:
        import sys
        from medssm import cli
        for package in ("jsonargparse", "monai"):
            sys.modules[package] = None
            assert cli.main(["train", "a", "b"]) == 2
            del sys.modules[package]
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        "medssm train: needs the package jsonargparse: pip install . (in medssm's source folder)",
        "medssm train: needs the package monai: pip install '.[segment]' (in medssm's source folder)",
    ]


def test_python_runs_the_package_as_the_command():
    done = subprocess.run([sys.executable, "-m", "medssm", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, medssm.__version__, "")


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{medssm.__version__}\n"


def test_quiet_leaves_the_summary_out_and_failed_is_the_exit_status(monkeypatch, capsys):
    def nothing():
        """Nothing."""
        return {"failed": ["one op"]}

    monkeypatch.setattr(doctor, "doctor", nothing)
    monkeypatch.setattr(doctor, "show", lambda result, options: print(f"{result} {dict(options)}"))
    assert cli.main(["doctor", "--quiet"]) == 1
    assert capsys.readouterr() == ("", "")
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr() == ("{'failed': ['one op']} {}\n", "")


def test_commands_on_volumes_keep_freed_memory(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: kept.append("kept"))
    assert cli.main(["models", "vim", "--quiet"]) == 0 and kept == []
    assert cli.main(["evaluate", str(tmp_path / "none"), str(tmp_path), "--quiet"]) == 2 and kept == ["kept"]


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def stop():
        """Stop."""
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "doctor", stop)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "medssm doctor: interrupted\n"


def test_doctor_runs_every_op_on_every_backend(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["failed"]
    for table in report["ops"].values():
        assert table["reference"].startswith("ok") and table["native"].startswith("ok")


def test_doctor_finds_a_wrong_kernel(monkeypatch, capsys):
    from medssm.kernels.depthwise_conv import native

    real = native.forward
    monkeypatch.setattr(native, "forward", lambda **arguments: real(**arguments) + 1)
    monkeypatch.setattr(doctor.dispatch, "backends", lambda: {"depthwise_conv": {"native": "ok"}})
    assert cli.main(["doctor"]) == 1
    assert "wrong: error" in capsys.readouterr().out


def test_doctor_says_how_to_get_the_kernels(tmp_path):
    import os

    env = {**os.environ, "MEDSSM_CPU_LIBRARY": str(tmp_path / "none.so")}
    run = subprocess.run([sys.executable, "-m", "medssm.cli", "doctor"], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--no-cache-dir --force-reinstall --no-deps . (in medssm's source folder)" in run.stdout and "no compiled library" in run.stdout
