"""Whoever starts tests names one of conftest's profiles: a wrong name ends the run before its first test."""

import re
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "Makefile", *(ROOT / "bench").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
NAMED = {name for file in FILES for name in re.findall(r'HYPOTHESIS_PROFILE"?\s*[=:]\s*"?(\w+)', file.read_text())}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_profile_that_is_named_exists(name):
    assert settings.get_profile(name).max_examples > 0


def test_profiles_are_found():
    assert {"brief", "deep", "few"} <= NAMED
