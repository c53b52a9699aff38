"""Energy from counters like Linux's."""

import time

from medssm import energy
from medssm.energy import Energy


def set_to(counter, value):
    """As the kernel does it: no reader finds a half written number. (A file that is opened for writing is empty for a moment.)"""
    new = counter.with_name("new")
    new.write_text(f"{value}\n")
    new.replace(counter)


def counters(folder, *values, largest=1_000_000_000):
    """Counters of so many processors, and of a part of the first one, which is not to be counted twice."""
    for i, value in enumerate(values):
        for name in (f"intel-rapl:{i}", f"intel-rapl:{i}:0"):
            (folder / name).mkdir(exist_ok=True)
            set_to(folder / name / "energy_uj", value)
            (folder / name / "max_energy_range_uj").write_text(f"{largest}\n")
    return folder


def test_the_processors_are_added_and_a_counter_may_begin_anew(tmp_path):
    with Energy(counters(tmp_path, 1_000_000, 900_000_000)) as measured:
        counters(tmp_path, 3_500_000, 50_000_000)
    assert measured.joules == 2.5 + 150.0


def test_a_counter_that_begins_anew_several_times_is_read_in_between(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "_SECONDS", 0.01)
    with Energy(counters(tmp_path, 0)) as measured:
        for value in (600_000_000, 200_000_000, 800_000_000, 100_000_000):
            set_to(tmp_path / "intel-rapl:0" / "energy_uj", value)
            begun = time.perf_counter()
            while measured._last[0][0] != value and time.perf_counter() - begun < 5:
                time.sleep(0.002)
    assert measured.joules == 600.0 + 600.0 + 600.0 + 300.0


def test_without_counters_nothing_is_measured(tmp_path):
    with Energy(tmp_path) as measured:
        pass
    assert measured.joules is None
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("not a number")
    with Energy(tmp_path) as measured:
        pass
    assert measured.joules is None
