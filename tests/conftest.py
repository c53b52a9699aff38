"""What every test gets: uninitialised memory filled with NaN, so that a kernel that reads or leaves it shows."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: bound threads would share the first core, and waiting ones take the others' time
    os.environ |= {"OMP_PROC_BIND": "false", "OMP_WAIT_POLICY": "passive"}
else:
    os.environ.setdefault("OMP_PROC_BIND", "true")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
# For backends that run slowly here: CUDA kernels emulated, and Triton's interpreter, which takes seconds for a scan.
for name, examples in (("brief", 8), ("few", 2)):
    settings.register_profile(
        name, deadline=None, max_examples=examples, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
    )
settings.register_profile("deep", deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


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
