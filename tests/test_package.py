"""What `import medssm` shows to a person, to editors and to type checkers, and how little it loads."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import medssm

ROOT = Path(__file__).parents[1]
LAZY = {"integrations", "models", "nn", "create_model", "from_upstream", "list_models", "register_model"}


def test_dir_shows_the_public_names_alone():
    assert dir(medssm) == sorted({"__version__", "backends", "explain", "ops", "orders", "use_backend"} | LAZY)
    assert set(medssm.__all__) == set(dir(medssm)) - {"__version__"}
    assert all(getattr(medssm, name) is not None for name in dir(medssm))
    with pytest.raises(AttributeError, match="module 'medssm' has no attribute 'importlib'"):
        _ = medssm.importlib


def test_type_checkers_see_what_is_loaded_on_first_use():
    blocks = [
        node for node in ast.parse(Path(medssm.__file__).read_text()).body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    assert {alias.asname or alias.name for block in blocks for line in block.body for alias in line.names} == LAZY


def test_import_loads_the_ops_alone():
    """Beside torch, whose import takes seconds; the models and what the integrations are for wait for their first use."""
    code = """
import json, sys
import torch
before = set(sys.modules)
import medssm
loaded = set(sys.modules) - before
medssm.create_model
print(json.dumps([sorted(loaded), "medssm.models" in sys.modules]))
"""
    loaded, then = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    ours = {name.split(".")[1] for name in loaded if name.startswith("medssm.")}
    assert not ours & {"bench", "cli", "doctor", "export", "integrations", "models", "nn", "segment"} and then
    assert not [name for name in loaded if name.split(".")[0] in ("monai", "timm", "nnunetv2", "lightning", "safetensors", "scipy")]


def test_the_lowest_versions_are_those_that_the_metadata_allows():
    """What `make test-lowest` installs."""
    dependencies = ast.literal_eval(re.search(r"^dependencies = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)[1])
    wanted = {}
    extras = [line for name in ("segment", "export") for line in (ROOT / f"requirements-{name}.txt").read_text().split("\n")]
    for line in (*dependencies, *extras):
        requirement = Requirement(line) if line else None
        for bound in requirement.specifier if requirement else ():
            if bound.operator == ">=":
                wanted[requirement.name] = Version(bound.version)
    lowest = dict(line.split("==") for line in (ROOT / "constraints-lowest.txt").read_text().split())
    assert {name: Version(version) for name, version in lowest.items()} == wanted
