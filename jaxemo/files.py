"""Files that minutes of work end in: known to be writable before the work, and whole or untouched after it.

A store of work that goes on for hours is a JSONL file with a line for each piece that is done: `lock` keeps others from it,
`records` says what a run before this one did, and `append` adds to it for good.
"""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any


def check_writable(path: str | os.PathLike) -> None:
    """Raise the OSError that fits, naming `path` and the remedy, unless `write_atomically` can write there now."""
    _target(path)


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path`; what stood there is replaced whole or, when anything fails, not touched.

    A link is followed. Raises OSError naming `path`.
    """
    target = _target(path)
    part = _part(target)
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise _named(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def lock(file, path: str | os.PathLike) -> None:
    """Keep others from writing, until `file` is closed or this process ends. Raises BlockingIOError where another does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            f"{os.fspath(path)!r} is being written by another run; wait for its end or write elsewhere"
        ) from error


def records(file, path: str | os.PathLike, what: str, starts: Iterable[bytes]) -> list[dict[str, Any]]:
    """The lines of a store `file`, opened "a+b"; a last one that a kill tore is cut off.

    Raises ValueError, that this is no store of `what`, where a line is no JSON object or a torn one begins like none of `starts`.
    """
    file.seek(0)
    written = file.read()
    whole = written.rfind(b"\n") + 1
    found = []
    for number, line in enumerate(written[:whole].splitlines(), 1):
        try:
            found.append(json.loads(line))
            assert isinstance(found[-1], dict)
        except (ValueError, AssertionError) as error:
            raise ValueError(
                f"{os.fspath(path)!r}, line {number}: this is no store of {what}; write elsewhere"
            ) from error
    if torn := written[whole:]:
        if not any(torn.startswith(start[: len(torn)]) for start in starts):
            raise ValueError(f"{os.fspath(path)!r} is no store of {what}; write elsewhere")
        file.truncate(whole)
    return found


def append(file, lines: Iterable[dict[str, Any]]) -> None:
    """Add `lines` to a store, on the disk when this returns."""
    file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    file.flush()
    os.fsync(file.fileno())


def _target(path) -> pathlib.Path:
    """The file that `path` stands for, links followed, once a file could be made beside it."""
    target, to = pathlib.Path(os.path.realpath(path)), f"cannot write to {os.fspath(path)!r}"
    if target.is_dir():
        raise IsADirectoryError(f"{to}: it is a directory; give the name of a file")
    if (
        os.path.exists(path) and not target.is_file()
    ):  # a device or a pipe: renaming over it would put a file in its place
        raise OSError(f"{to}: it is not a regular file; give the name of a file")
    if not target.parent.exists():
        raise FileNotFoundError(f"{to}: there is no directory {str(target.parent)!r}; make it first")
    if not target.parent.is_dir():
        raise NotADirectoryError(f"{to}: {str(target.parent)!r} is not a directory; give a path in one")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{to}: the file is read-only; make it writable or give another path")
    try:  # permissions tell too little: the file system may be read-only or the name too long
        _part(target).touch()
        _part(target).unlink()
    except OSError as error:
        raise _named(path, error) from error
    return target


def _part(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(f"{target.name}.{os.getpid()}.part")


def _named(path, error: OSError) -> OSError:
    """`error` with the name of the file asked for, not of the one beside it."""
    remedy = "; give a path where you may write" if isinstance(error, PermissionError) else ""
    return type(error)(f"cannot write to {os.fspath(path)!r}: {error.strerror or error}{remedy}")
