"""How the tests are run: the profiles of hypothesis that are named exist, and putting long tests first loses none."""

import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.conftest import pytest_collection_modifyitems as order

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "Makefile", *(ROOT / "bench").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
NAMED = {name for file in FILES for name in re.findall(r'HYPOTHESIS_PROFILE"?\s*[=:]\s*"?(\w+)', file.read_text())}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_profile_that_is_named_exists(name):
    assert settings.get_profile(name).max_examples > 0


def test_profiles_are_found():
    assert {"brief", "deep", "few"} <= NAMED


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not tell which cores a process may use")
def test_no_test_is_bound_to_a_core():
    """A first thread that is bound binds all that it starts, also processes."""
    torch.ones(2**20).sum()  # starts the threads
    assert os.environ["OMP_PROC_BIND"] == "false"
    assert len({frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}) == 1


class Item:
    def __init__(self, name: int, long: bool):
        self.name, self.long = name, long

    def get_closest_marker(self, marker):
        return self.long if marker == "long" else None


def test_the_order_is_made_when_tests_that_marks_leave_out_are_gone():
    """Otherwise they count in each worker's part, and its long tests come late."""
    assert order.pytest_impl["trylast"]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize(("long", "short"), [(0, 0), (0, 7), (1, 39), (5, 100), (9, 2), (4, 0)])
def test_each_worker_begins_with_long_tests_and_no_test_is_lost(monkeypatch, workers, long, short):
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", str(workers))
    items = [Item(i, i >= short) for i in range(long + short)]  # the long ones come last
    order(items)
    assert sorted(item.name for item in items) == list(range(long + short))
    for worker in range(min(workers, long)):
        if long <= short:
            assert items[len(items) * worker // workers].long
