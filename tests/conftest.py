"""What every test gets: uninitialised memory filled with NaN, so that a kernel that reads or leaves it shows."""

import os

# No thread is bound to a core: whatever a bound one starts stays on its core, as all of pytest's workers would on the first.
os.environ["OMP_PROC_BIND"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # more threads than cores would wait for each other at every parallel region
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import pytest
import torch
from hypothesis import HealthCheck, settings

# How many examples a property is tried on. ci: `make test`. deep: `make test-all`, other examples at each run. brief: for CUDA's emulated kernels and
# for bench/gpu.py. few: for Triton's interpreter, which takes seconds for a scan.
for name, examples in (("ci", 8), ("brief", 8), ("few", 3), ("deep", 200)):
    settings.register_profile(
        name,
        deadline=None,
        max_examples=examples,
        derandomize=name != "deep",
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# Of the networks, those that stand for a kind: scans, attention, WKV, windows, light layers, encoders and decoders of several sources.
KINDS = {"medssm_unet", "umamba_bot", "vmunet", "vmamba", "mlla", "vrwkv", "egeunet", "emcad", "unetr_pp", "mednext", "monai_basicunet"}


def pytest_configure(config):
    config.addinivalue_line("markers", "each_network: over every network in `make test-all`, in `make test` over those that stand for a kind")
    config.addinivalue_line("markers", "thorough: for `make test-all` alone; `make test` leaves it out")
    config.addinivalue_line("markers", "long: takes many seconds, so it starts first")


def pytest_itemcollected(item):
    """`each_network` leaves networks to `make test-all`."""
    if item.get_closest_marker("each_network"):
        given = item.callspec.params
        if given.get("model", given.get("name")) not in KINDS:
            item.add_marker("thorough")


@pytest.hookimpl(trylast=True)  # when tests that `-m` leaves out are gone
def pytest_collection_modifyitems(items):
    """Long tests start first. Under xdist each worker begins with an equal part of the list, so each part gets its share of them."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    total = len(items)
    long = [item for item in items if item.get_closest_marker("long")]
    short = [item for item in items if not item.get_closest_marker("long")]
    items.clear()
    for worker in range(workers):
        share = long[worker::workers]
        size = max(0, total * (worker + 1) // workers - len(items) - len(share))
        items += share + short[:size]
        del short[:size]
    assert len(items) == total


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty comes back full of NaN under deterministic algorithms."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def threads():
    """A test may set the number of threads; the next one starts with what this one found."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
