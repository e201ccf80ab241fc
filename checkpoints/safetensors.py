"""Read .safetensors files: their headers checked before anything is allocated, their tensors as views of the mapped files.

The reader is written here, and the `safetensors` package is its oracle in the tests. The package's parser is sound, but
it copies every tensor it returns, lets a name stand twice in a header, and often does not say which tensor is at fault.
The format is small: 8 bytes of header length, a JSON header `{name: {dtype, shape, data_offsets}}`, the tensors' bytes.
"""

import json
import math
import mmap
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxemo.checkpoints.keys import CheckpointError
from jaxemo.checkpoints.mapped import releaser

DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32, "I32": np.int32,
    "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
HEADER_LIMIT = 1 << 25  # bytes; the largest published headers have about a tenth of that
ENTRY_LIMIT = 512  # characters of a tensor's name, and of what describes it
RANK_LIMIT = 8

# One entry of a header. What it cannot match (lists of lists of lists, ...) is refused before JSON would build it.
_STRING = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"'
_ENTRY = re.compile(
    rf'[ \t\r\n]*+({_STRING})[ \t\r\n]*+:[ \t\r\n]*+(\{{(?:[^{{}}"]|{_STRING})*+\}})[ \t\r\n]*+([,}}])', re.S
)
_PAIR = rf"[ \t\r\n]*+{_STRING}[ \t\r\n]*+:[ \t\r\n]*+{_STRING}[ \t\r\n]*+"
_METADATA = re.compile(rf"\{{(?:{_PAIR}(?:,{_PAIR})*+|[ \t\r\n]*+)\}}", re.S)


class Tensor(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For `json.loads(object_pairs_hook=)`: a key that stands twice has no one meaning."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return table


def read_header(path: str | os.PathLike) -> dict[str, Tensor]:
    """Every tensor of a file by name, in the order of their bytes. Raises CheckpointError, naming file and tensor."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    with path.open("rb") as file:
        size, first = os.fstat(file.fileno()).st_size, file.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise CheckpointError(
                f"{path}: this is a Git LFS pointer, not the file itself; run `git lfs pull` beside it"
            )
        if size < 8 or (length <= HEADER_LIMIT and 8 + length > size):
            raise CheckpointError(
                f"{path}: the file is truncated: its {size} bytes end within the header; fetch it again"
            )
        if length > HEADER_LIMIT:
            raise CheckpointError(f"{path}: not a safetensors file: its header would have {length} bytes")
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header is not text") from error
    found: dict[str, Tensor] = {}
    for name, description in _entries(path, text):
        if name in found:
            raise CheckpointError(f"{path}: tensor {name!r} stands there twice")
        try:
            found[name] = _tensor(description, 8 + length)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: tensor {name!r}: {error}") from error
    ordered = sorted(found, key=lambda name: found[name][2:])
    end, last = 8 + length, ""
    for name in ordered:
        if found[name].start != end:
            what = "overlaps" if found[name].start < end else "leaves unused bytes after"
            raise CheckpointError(f"{path}: tensor {name!r} {what} {last or 'the header'}")
        end, last = found[name].stop, repr(name)
    if end > size:
        raise CheckpointError(f"{path}: the file is truncated: it has {size} bytes, and tensor {last} ends at {end}; "
                              "fetch it again")  # fmt: skip
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes after {last or 'the header'} belong to no tensor")
    return {name: found[name] for name in ordered}


def header(tensors: Mapping[str, tuple[np.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """The beginning of a file in which `tensors`, name → (dtype, shape), follow one another in that order."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (kind, shape) in tensors.items():
        size = math.prod(shape) * kind.itemsize
        code = next(code for code, dtype in DTYPES.items() if np.dtype(dtype) == kind)
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 64 + 56)  # the tensors begin at a multiple of 64 bytes
    return len(head).to_bytes(8, "little") + head


def _entries(path: Path, text: str):
    """(name, JSON text) of each tensor in a header."""
    if not text.startswith("{"):
        raise CheckpointError(f"{path}: not a safetensors file: its header does not begin with {{")
    if not text[1:].strip(" \t\r\n}") and text.count("}") == 1:
        return  # no tensors
    at, last, more, described = 1, "", ",", False
    while more == ",":
        entry = _ENTRY.match(text, at)
        try:
            name = json.loads(entry[1]) if entry else ""
            name.encode("utf-8")  # half of a surrogate pair is no text
        except ValueError:
            entry = None
        if not entry or len(entry[1]) > ENTRY_LIMIT or (name != "__metadata__" and len(entry[2]) > ENTRY_LIMIT):
            after = f", after tensor {last!r}" if last else ""
            raise CheckpointError(f"{path}: the header is damaged at its byte {len(text[:at].encode())}{after}")
        at, more = entry.end(), entry[3]
        if name == "__metadata__":
            if described or not _METADATA.fullmatch(entry[2]):
                raise CheckpointError(f"{path}: the header's __metadata__ is not one table of texts")
            described = True
            continue
        yield name, entry[2]
        last = name
    if text[at:].strip(" \t\r\n"):
        raise CheckpointError(f"{path}: the header goes on after its end, at byte {len(text[:at].encode())}")


def _size(text: str) -> int:
    if text.startswith("-"):  # "-0" too, which is no size for other readers
        raise ValueError(f"it has {text[:20]}, which is no size")
    return int(text)


def _tensor(description: str, base: int) -> Tensor:
    """Raises ValueError."""
    entry = json.loads(description, object_pairs_hook=unique, parse_int=_size)
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"it is described by {', '.join(entry) or 'nothing'}; expected dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"dtype {kind!r} is not supported; known: {', '.join(DTYPES)}")
    dtype = np.dtype(DTYPES[kind])

    def whole(values):
        return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 56 for n in values)

    if not whole(shape) or len(shape) > RANK_LIMIT or math.prod(max(n, 1) for n in shape) >= 1 << 56:
        raise ValueError(f"shape {shape} is not one of at most {RANK_LIMIT} sizes")
    if not whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets {offsets} are not a beginning and an end")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{offsets[1] - offsets[0]} bytes are not {kind}{shape}, which has "
                         f"{math.prod(shape) * dtype.itemsize}")  # fmt: skip
    return Tensor(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def open_tensors(paths: Sequence[Path]) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """The shape of every tensor in one or several files by name, and `read(name)`.

    `read` returns the stored values in their stored dtype (bfloat16 as ml_dtypes has it) as a read-only view of the
    mapped file: copy what is to outlive it. `read` may be called from several threads. Raises CheckpointError for a
    file that is damaged or not understood, and for a name that stands in two files.
    """
    tensors: dict[str, tuple[Path, Tensor]] = {}
    for path in map(Path, paths):
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} stands in {tensors[name][0]} as well")
            tensors[name] = path, tensor
    maps: dict[Path, mmap.mmap] = {}
    for path in map(Path, paths):
        with path.open("rb") as file:
            maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    touch = releaser(maps.values())

    def read(name: str) -> np.ndarray:
        path, tensor = tensors[name]
        touch(tensor.stop - tensor.start)
        whole = np.frombuffer(maps[path], np.uint8)
        if len(whole) < tensor.stop:
            raise CheckpointError(f"{path}: tensor {name!r}: the file was cut short since it was opened")
        return whole[tensor.start : tensor.stop].view(tensor.dtype).reshape(tensor.shape)

    return {name: tensor.shape for name, (_, tensor) in tensors.items()}, read
