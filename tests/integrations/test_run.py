"""python -m medssm.run: a script that knows nothing of medssm finds mamba_ssm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medssm.run import main
from tests.integrations.test_mamba_ssm import fake_package

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, helper, mamba_ssm
print(getattr(mamba_ssm.Mamba, "__module__", "theirs"), sys.argv[1:], __name__)
sys.exit(3)
"""
OURS = "medssm.integrations.mamba_ssm.mixer"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("")
    return tmp_path


def run(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "medssm.run", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.strip(), done.stderr


def test_a_script_runs_from_another_folder_with_its_arguments(folder):
    assert run("--force", str(folder / "train.py"), "--epochs", "3", cwd=ROOT)[:2] == (3, f"{OURS} ['--epochs', '3'] __main__")


def test_a_module_runs(folder):
    assert run("--force", "-m", "train", "--epochs", "3", cwd=folder)[:2] == (3, f"{OURS} ['--epochs', '3'] __main__")


def test_a_package_beside_the_script_stays_unless_forced(folder):
    fake_package(folder)
    code, out, err = run(str(folder / "train.py"), cwd=ROOT)
    assert (code, out) == (3, "theirs [] __main__") and "the installed one stays" in err and "--force" in err
    assert OURS in run("--force", str(folder / "train.py"), cwd=ROOT)[1]


def test_code_for_a_gpu_may_name_the_device_of_a_tensor_on_the_cpu(folder):
    (folder / "device.py").write_text("""
import torch
x = torch.zeros(2)
for device in (x.device, "cpu", torch.device("cpu"), x.device.index, -1):
    with torch.cuda.device(device):
        print((x + 1).device, end=" ")
torch.cuda.device("meta")
""")
    code, out, err = run("--force", "device.py", cwd=folder)
    assert code == 1 and out == "cpu cpu cpu cpu cpu" and "Expected a cuda device, but got: meta" in err, out + err


def test_what_makes_no_sense_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, said in ((["none.py"], "no such file: none.py"), (["--fast"], "expected --force, -m or a script, got --fast")):
        assert main(words) == 2 and capsys.readouterr() == ("", f"medssm.run: {said}\n")
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert not out and "python -m medssm.run [--force] script.py" in err
