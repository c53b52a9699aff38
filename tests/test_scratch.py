"""Arrays in memory and in temporary files hold the same, and nothing is left of them."""

import collections
import os
import subprocess
import sys

import pytest
import torch

from medssm import scratch
from medssm.errors import UserError
from medssm.scratch import Scratch


def test_a_store_in_a_file_is_a_store_in_memory(tmp_path):
    with Scratch(4 * 60, tmp_path, "a") as stores:
        pair = [stores.store(5, 3, 4) for _ in range(2)]
        assert [store.in_file for store in pair] == [False, True] and [store.memory for store in pair] == [240, 0]
        for store in pair:
            assert not store[:].any()
            store[1:4, :, 2:] = torch.arange(18.0).view(3, 3, 2)
            store.add((slice(3, 5), slice(1, 3)), torch.ones(2, 2, 4))
        one, other = pair
        assert torch.equal(one[:], other[:]) and one[:].sum() == 153 + 16
        assert torch.equal(one[2:4, 1:, 3:], other[2:4, 1:, 3:]) and other[3:3].shape == (0, 3, 4)
        assert [(rows.start, rows.stop) for rows in other.slabs(4 * 25)] == [(0, 2), (2, 4), (4, 5)]


def test_memory_is_given_back(tmp_path):
    with Scratch(100, tmp_path, "a") as stores:
        first = stores.store(25)
        assert stores.store(25).in_file
        first.close()
        assert not stores.store(25).in_file
        last = stores.store(25)
    assert first.memory == 0
    with pytest.raises(ValueError, match="closed"):
        last[:]


def test_what_fits_nowhere_is_an_error(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda folder: usage(1000, 1, 150))
    stores = Scratch(100, tmp_path / "new", "a")
    stores.check(100)
    assert not (tmp_path / "new").exists()
    stores.check(150)
    with pytest.raises(UserError, match="expected 151 bytes free for temporary files, got 150"):
        stores.check(151)


def test_a_store_of_inference_is_changed_outside_of_it(tmp_path):
    with torch.inference_mode():
        store = Scratch(100, tmp_path, "a").store(2)
    store.add((slice(2),), torch.ones(2))
    assert store[:].tolist() == [1, 1]


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a file has a name until it is closed")
def test_a_killed_process_leaves_no_file(tmp_path):
    code = """
import os, pathlib, sys, torch
from medssm.scratch import Scratch
with Scratch(0, pathlib.Path(sys.argv[1]) / "new", "a") as stores:
    stores.store(1000, 1000)[3:5] = torch.ones(2, 1000)
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == 9
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_file_takes_no_memory_of_the_process(tmp_path):
    import resource

    import psutil

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + 150_000_000, limits[1]))
        with Scratch(0, tmp_path, "a") as stores:
            store = stores.store(600, 1000, 100)  # 240 MB
            for rows in store.slabs(2**21):
                store.add((rows,), torch.ones(rows.stop - rows.start, 1000, 100))
            assert all((store[rows] == 1).all() for rows in store.slabs(2**21))
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda folder: usage(1000, 1, 999))
    with Scratch(0, tmp_path, "a") as stores, pytest.raises(UserError, match=r"expected 1000 bytes free for temporary files, got 999: .*--scratch"):
        stores.store(250)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve a file's place")
def test_a_limit_of_the_file_size_is_one_line(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with Scratch(0, tmp_path, "a") as stores, pytest.raises(UserError, match="the disk is full"):
            stores.store(1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
