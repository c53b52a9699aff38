"""The README's Python runs as it stands, and the commands it names exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from medssm import cli
from medssm.integrations import mamba_ssm as stand_in

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_python_blocks_run():
    pytest.importorskip("monai")
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    try:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), {})
    finally:
        stand_in.uninstall()


def test_commands_exist():
    named = set(re.findall(r"^medssm (\w+)", README, re.M))
    assert named and named <= set(cli.COMMANDS)


def test_layers_and_models_need_no_import_of_their_own():
    code = "import medssm; print(medssm.nn.Mamba.__name__, medssm.create_model.__name__, hasattr(medssm, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Mamba", "create_model", "False"]
