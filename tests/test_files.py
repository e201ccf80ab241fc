"""Writing files: refused before the work, and never half done."""

import os
import pathlib
import stat

import pytest

from jaxemo import files

WRITES = (files.check_writable, lambda path: files.write_atomically(path, b"new"))


@pytest.fixture(params=WRITES, ids=("check", "write"))
def attempt(request):
    return request.param


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_what_was_checked_can_be_written(tmp_path):
    for path in (tmp_path / "new", str(tmp_path / "with space & ü.html"), tmp_path / ("n" * 200)):
        files.check_writable(path)
        assert not os.path.exists(path)
        files.write_atomically(path, b"first")
        files.check_writable(path)
        assert pathlib.Path(path).read_bytes() == b"first"
        files.write_atomically(path, b"")
        assert pathlib.Path(path).read_bytes() == b""
    assert len(contents(tmp_path)) == 3


def test_a_relative_path_needs_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.check_writable("out")
    files.write_atomically("out", b"x")
    assert contents(tmp_path) == {"out": b"x"}


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("folder", IsADirectoryError, "is a directory; give the name of a file"),
        ("missing/deep/out", FileNotFoundError, "no directory '.*deep'; make it first"),
        ("file/out", NotADirectoryError, "file' is not a directory"),
        ("pipe", OSError, "not a regular file"),
        ("n" * 255, OSError, "too long"),
    ],
)
def test_what_cannot_be_written_is_named_and_left_alone(attempt, tmp_path, name, kind, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(kind, match=says) as caught:
        attempt(tmp_path / name)
    assert repr(str(tmp_path / name)) in str(caught.value) and ".part" not in str(caught.value)
    assert contents(tmp_path) == {"file": b"old"} and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_file_system_that_takes_no_files(attempt):
    """Held also for root, whom permissions do not stop."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc")
    with pytest.raises(OSError, match="'/proc/self/out'") as caught:
        attempt("/proc/self/out")
    assert ".part" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_permissions_are_asked_first(attempt, tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "old").chmod(0o444)
    with pytest.raises(PermissionError, match="read-only"):
        attempt(tmp_path / "old")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match=r"new.*where you may write"):
            attempt(tmp_path / "new")
    finally:
        tmp_path.chmod(0o755)
    assert contents(tmp_path) == {"old": b"old"}


def test_a_read_only_file_is_not_replaced(attempt, tmp_path, monkeypatch):
    (tmp_path / "old").write_bytes(b"old")
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="read-only"):
        attempt(tmp_path / "old")
    assert contents(tmp_path) == {"old": b"old"}


def test_a_link_is_followed(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    files.write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, step):
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def refuse(*_):
        raise OSError(28, "No space left on device", "out.123.part")

    monkeypatch.setattr(files.os, step, refuse)
    with pytest.raises(OSError, match=r"out': No space left on device$"):
        files.write_atomically(path, b"new")
    assert contents(tmp_path) == {"out": b"old"}
