"""Files are written whole or not at all, whoever else writes them, and what cannot be read or written is one clear line."""

import contextlib
import errno
import os
import resource
import threading

import pytest

from medssm.errors import UserError
from medssm.files import atomic, first_line, make_folder, protect, read_json, read_json_lines, write_at, write_bytes, write_json, write_text


def names(folder):
    return [file.name for file in folder.iterdir()]


def test_what_is_written_is_read_again(tmp_path):
    value = {"a": [1, 2.5, None], "b": "\u00b5m"}
    write_json(tmp_path / "new" / "folder" / "a.json", value)
    assert read_json(tmp_path / "new" / "folder" / "a.json") == value and names(tmp_path / "new" / "folder") == ["a.json"]
    (tmp_path / "b.json").write_bytes('{"b": "\u00b5m"}'.encode())
    assert read_json(tmp_path / "b.json") == read_json_lines(tmp_path / "b.json")[0] == {"b": "\u00b5m"}
    write_text(tmp_path / "a.txt", "\u00b5m\n")
    assert (tmp_path / "a.txt").read_bytes() == "\u00b5m\n".encode()


def test_a_file_that_was_not_finished_leaves_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "a.json") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".json" and temporary.name.startswith(".")
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.json").read_text() == "old" and names(tmp_path) == ["a.json"]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    with atomic(tmp_path / "a") as one, atomic(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one" and names(tmp_path) == ["a"]  # the outer block ends last
    texts = [str(i) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=write_text, args=(tmp_path / "a", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_text() in texts and names(tmp_path) == ["a"]


def test_a_file_is_on_the_disk_before_it_takes_the_others_place(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    write_text(tmp_path / "a", "1")
    assert done == ["fsync", "replace"]


def test_a_place_that_takes_no_file_is_known_before_the_work(tmp_path, monkeypatch):
    protect(tmp_path / "new" / "folder" / "a")
    (tmp_path / "file").write_text("1")
    with pytest.raises(UserError, match=r"file/folder/a: cannot be written \(Not a directory\)"):
        protect(tmp_path / "file" / "folder" / "a")
    (tmp_path / "closed").mkdir()
    access = os.access  # the tests may run as root, who may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path / "closed") and access(path, mode))
    for path in ("closed/a", "closed/new/a"):
        with pytest.raises(UserError, match=rf"{path}: cannot be written \(Permission denied\)"):
            protect(tmp_path / path)


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (lambda path: write_json(path, {}), lambda path: write_bytes(path, b""), lambda path: make_folder(path)):
        with pytest.raises(UserError, match=r"file/a: cannot be written \((Not a directory|File exists)\)"):
            write(tmp_path / "file" / "a")


def test_json_has_no_numbers_that_are_not_finite(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not names(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_so(tmp_path, code):
    with pytest.raises(UserError, match="a: the disk is full"), atomic(tmp_path / "a"):
        raise OSError(code, "no room")


def test_json_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"a.json: No such file"):
        read_json(tmp_path / "a.json")
    for text in (b"{", b"\xff\xfe"):
        (tmp_path / "a.json").write_bytes(text)
        for read in (read_json, read_json_lines):
            with pytest.raises(UserError, match=r"a.json: not JSON") as error:
                read(tmp_path / "a.json")
            assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"Is a directory"):
        read_json_lines(tmp_path)


def test_the_first_line_of_an_error():
    assert (first_line(ValueError("one\ntwo")), first_line(EOFError())) == ("one", "EOFError")


def test_json_lines(tmp_path):
    (tmp_path / "a").write_text('{"step": 1}\n{"step": 2}\n')
    assert read_json_lines(tmp_path / "a") == [{"step": 1}, {"step": 2}]


@contextlib.contextmanager
def files_of_at_most(size):
    """The system itself refuses what is longer, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_log_is_continued_from_where_it_is_known_to_be_whole(tmp_path):
    log = tmp_path / "log"
    end = write_at(log, 0, b"one\n")
    assert (end, write_at(log, end, b"two\n"), log.read_bytes()) == (4, 8, b"one\ntwo\n")
    assert write_at(log, end, b"2\n") == 6 and log.read_bytes() == b"one\n2\n"  # the rest was of a training that was stopped
    with files_of_at_most(10), pytest.raises(UserError, match="log: the disk is full"):
        write_at(log, 6, b"too long\n")
    assert log.read_bytes() == b"one\n2\n"
