"""What tests of the native kernels share: every instruction set that this processor runs."""

import pytest

from medssm.kernels import native


@pytest.fixture(params=native.ISAS)
def isa(request, monkeypatch):
    """Runs the test once per instruction set; skips those above this processor's."""
    best = native._LIBRARY.medssm_cpu_isa().decode()
    if native.ISAS.index(request.param) > native.ISAS.index(best):
        pytest.skip(f"this processor runs at most {best}")
    monkeypatch.setenv("MEDSSM_CPU_ISA", request.param)
    _forget()
    yield request.param
    _forget()


def _forget() -> None:
    """The next call of a kernel asks for the instruction set anew."""
    native.isa.cache_clear()
    native._bound.clear()
