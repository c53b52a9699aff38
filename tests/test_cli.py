"""The medssm command: help, errors and the doctor."""

import json
import subprocess
import sys

import pytest

from medssm import cli, doctor


def test_overview_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help_json_and_quiet(name, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "--json" in shown and "--quiet" in shown


def test_an_unknown_command_is_one_line(capsys):
    assert cli.main(["segment"]) == 2
    assert "expected one of doctor, models" in capsys.readouterr().err


def test_doctor_runs_every_op_on_every_backend(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["failed"]
    for table in report["ops"].values():
        assert table["reference"].startswith("ok") and table["native"].startswith("ok")


def test_doctor_finds_a_wrong_kernel(monkeypatch, capsys):
    from medssm.kernels.depthwise_conv import native

    real = native.forward
    monkeypatch.setattr(native, "forward", lambda *args: real(*args) + 1)
    monkeypatch.setattr(doctor.dispatch, "backends", lambda: {"depthwise_conv": {"native": "ok"}})
    wanted = doctor._outputs
    monkeypatch.setattr(doctor, "_outputs", lambda f, a, k, backend: [t + (backend == "native") for t in wanted(f, a, k, backend)])
    assert cli.main(["doctor"]) == 1
    assert "wrong: error" in capsys.readouterr().out


def test_doctor_says_how_to_get_the_kernels(tmp_path):
    import os

    env = {**os.environ, "MEDSSM_CPU_LIBRARY": str(tmp_path / "none.so")}
    run = subprocess.run([sys.executable, "-m", "medssm.cli", "doctor"], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--no-cache-dir --force-reinstall" in run.stdout and "no compiled library" in run.stdout
