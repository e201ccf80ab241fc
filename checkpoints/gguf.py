"""Read a GGUF file: metadata, and tensors by name. De-quantisation is the `gguf` package's, in small chunks.

The file is not trusted. Every count, length, type, shape and offset is checked against the file's size before anything
is allocated for it, so work and memory are bounded by that size; any fault is a CheckpointError that names the file and
the item. Versions 2 and 3, little-endian. Not read: arrays of arrays, files split in several parts.
"""

import functools
import math
import mmap
import os
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np
from jaxemo.checkpoints.convert import Source
from jaxemo.checkpoints.families_gguf import config_from_gguf
from jaxemo.checkpoints.gguf_tokenizer import build_tokenizer
from jaxemo.checkpoints.keys import CheckpointError
from jaxemo.checkpoints.mapped import releaser

from jaxemo.tokens import Tokenizer

# Type numbers of metadata values, with NumPy's names for the plain ones.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
            12: "<f8"}  # fmt: skip
_DTYPES = {number: np.dtype(name) for number, name in _SCALARS.items()}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_KINDS = {int(kind): kind for kind in gguf.GGMLQuantizationType}

# More than any model has; they keep a file of nothing but tiny items from taking many times its size in Python objects.
MAX_ITEMS = 1 << 16  # metadata keys, tensors, and numbers in all metadata arrays outside `tokenizer.`
MAX_STRINGS = 1 << 21  # in all arrays: the largest vocabularies hold 262,144 tokens and twice as many merges
MAX_LENGTH = 1 << 18  # bytes of one string: names, tokens, chat templates
CHUNK = 1 << 16  # elements de-quantised at once: their temporaries fit a core's cache


class GGUF(NamedTuple):
    """What a file holds. Arrays in `meta` are lists; those of numbers under `tokenizer.` are NumPy arrays."""

    meta: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]  # row-major, as NumPy's
    kinds: dict[str, str]  # how each tensor is stored: "F32", "Q4_K", ...
    read: Callable[..., np.ndarray]  # read(name, out=None), see `_read`


def open_gguf(path: str | os.PathLike) -> GGUF:
    """Map a file and check all of it but the weights' values. Raises CheckpointError, or OSError if it can't be read."""
    with open(path, "rb") as file:
        empty = os.fstat(file.fileno()).st_size == 0  # which cannot be mapped
        return parse(os.fspath(path), b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def parse(where: str, data: bytes | mmap.mmap) -> GGUF:
    """`open_gguf` on the bytes of a file; `where` is what errors call it."""
    size, at, n_strings = len(data), 0, 0

    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{where}: {what}")

    def take(count: int, what: str) -> int:
        nonlocal at
        if count > size - at:
            raise fault(f"the file is truncated or damaged: {what} takes {count} bytes at {at} of {size}")
        at += count
        return at - count

    def number(form: struct.Struct, what: str) -> int:
        return form.unpack_from(data, take(form.size, what))[0]

    def string(what: str) -> str:
        length = number(_U64, what)
        if length > MAX_LENGTH:
            raise fault(f"{what} has {length} bytes, more than {MAX_LENGTH}")
        start = take(length, what)
        try:
            return data[start:at].decode()
        except UnicodeDecodeError as error:
            raise fault(f"{what} is not UTF-8 ({error.reason} at byte {start + error.start})") from None

    def strings(count: int, what: str) -> list[str]:
        nonlocal at
        found: list[str] = []
        position, unpack, append = at, _U64.unpack_from, found.append
        for i in range(count):
            start = position + 8
            if start <= size:
                position = start + unpack(data, position)[0]
            if not start <= position <= min(size, start + MAX_LENGTH):
                raise fault(f"the file is truncated or damaged: string {i} of {what} has over {MAX_LENGTH} bytes or ends "
                            f"beyond the file's {size}")  # fmt: skip
            try:
                append(data[start:position].decode())
            except UnicodeDecodeError as error:
                raise fault(f"string {i} of {what} is not UTF-8 ({error.reason})") from None
        at = position
        return found

    def numbers(kind: int, count: int, what: str) -> np.ndarray:
        dtype = _DTYPES[kind]
        array = np.frombuffer(data, "u1" if kind == _BOOL else dtype, count, take(count * dtype.itemsize, what)).copy()
        if kind == _BOOL and array.max(initial=0) > 1:
            raise fault(f"{what} has a truth value that is neither 0 nor 1")
        return array.view(dtype)

    def value(key: str) -> Any:
        nonlocal n_strings
        what = f"the value of {_show(key)}"
        kind = number(_U32, what)
        if kind in _DTYPES:
            return numbers(kind, 1, what).item()
        if kind == _STRING:
            return string(what)
        if kind != _ARRAY:
            raise fault(f"{what} has the unknown type {kind}")
        kind, count = number(_U32, what), number(_U64, what)
        if kind in _DTYPES:
            return numbers(kind, count, what)
        if kind != _STRING:
            raise fault(f"{what} is an array of {'arrays' if kind == _ARRAY else f'the unknown type {kind}'}")
        n_strings += count
        if 8 * count > size - at or n_strings > MAX_STRINGS:
            raise fault(f"{what} cannot hold {count} strings: {size - at} bytes are left, and {MAX_STRINGS} allowed")
        return strings(count, what)

    if data[:4] != b"GGUF":
        raise fault("not a GGUF file: it does not begin with the letters GGUF")
    at = 4
    version = number(_U32, "the version")
    if version not in (2, 3):
        big = version and version % 65536 == 0
        raise fault("a big-endian GGUF file, which is not supported" if big else
                    f"GGUF version {version} is not supported; versions 2 and 3 are")  # fmt: skip
    n_tensors, n_keys = number(_U64, "the number of tensors"), number(_U64, "the number of metadata keys")
    if max(n_tensors, n_keys) > MAX_ITEMS:
        raise fault(f"the file is damaged: {n_tensors} tensors and {n_keys} metadata keys, more than {MAX_ITEMS}")

    meta: dict[str, Any] = {}
    for i in range(n_keys):
        key = string(f"metadata key {i}")
        if key in meta:
            raise fault(f"the metadata key {_show(key)} stands there twice")
        meta[key] = value(key)
    lists = [key for key, held in meta.items() if isinstance(held, np.ndarray) and not key.startswith("tokenizer.")]
    if (total := sum(meta[key].size for key in lists)) > MAX_ITEMS:
        raise fault(f"the metadata arrays {', '.join(map(_show, lists[:4]))} hold {total} numbers, over {MAX_ITEMS}")
    for key in lists:
        meta[key] = meta[key].tolist()
    alignment = meta.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise fault(f"general.alignment is {_show(alignment)}, not a power of two from 8 on")

    tensors: dict[str, _Tensor] = {}
    for i in range(n_tensors):
        label = string(f"the name of tensor {i}")
        what = f"tensor {_show(label)}"
        if label in tensors:
            raise fault(f"{what} stands there twice")
        rank = number(_U32, what)
        if not 1 <= rank <= 4:
            raise fault(f"{what} has {rank} dimensions; 1 to 4 are possible")
        shape = struct.unpack_from(f"<{rank}Q", data, take(8 * rank, what))[::-1]
        kind, offset = number(_U32, what), number(_U64, what)
        if kind not in _KINDS:
            raise fault(f"{what} is stored as type {kind}, which gguf {_gguf_version()} does not know")
        if not _readable(_KINDS[kind]):
            raise fault(f"{what} is stored as {_KINDS[kind].name}, which cannot be read")
        block, width = gguf.GGML_QUANT_SIZES[_KINDS[kind]]
        if 0 in shape or shape[-1] % block:
            raise fault(f"{what} of shape {list(shape)} cannot be stored as {_KINDS[kind].name}, in blocks of {block}")
        if offset % alignment:
            raise fault(f"{what} lies at offset {offset}, which is not a multiple of {alignment}")
        tensors[label] = _Tensor(shape, _KINDS[kind], offset, math.prod(shape) // block * width)
    start = -(-at // alignment) * alignment
    end, before = 0, ""
    for label, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise fault(f"tensors {_show(before)} and {_show(label)} overlap")
        end, before = tensor.offset + tensor.size, label
        if start + end > size:
            raise fault(f"the file is truncated: tensor {_show(label)} ends at byte {start + end} of {size}")
    touch = releaser([data] if isinstance(data, mmap.mmap) else [])
    return GGUF(
        meta,
        {label: tensor.shape for label, tensor in tensors.items()},
        {label: tensor.kind.name for label, tensor in tensors.items()},
        functools.partial(_read, data, start, tensors, touch),
    )


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int  # bytes from the start of the data
    size: int  # bytes


_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def _show(untrusted: Any) -> str:
    """A name or value out of a file for a message: no control characters, and not too much of it."""
    shown = untrusted if isinstance(untrusted, str) and untrusted.isprintable() and untrusted else ascii(untrusted)
    return shown if len(shown) <= 100 else shown[:97] + "..."


def _gguf_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("gguf")


@functools.cache
def _readable(kind: gguf.GGMLQuantizationType) -> bool:
    if kind.name in _STORED:
        return True
    block, width = gguf.GGML_QUANT_SIZES[kind]
    try:
        return gguf.quants.dequantize(np.zeros((1, width), np.uint8), kind).shape == (1, block)
    except NotImplementedError:
        return False


def _read(
    data,
    start: int,
    tensors: dict[str, _Tensor],
    touch: Callable[[int], None],
    name: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The values of a tensor: F32, F16 and BF16 as they lie in the file (a read-only view), others as new float32.

    `out`, C-contiguous, of the tensor's shape and any float type, is filled and returned instead: then the only further
    memory is that of one chunk. KeyError for a name that the file does not hold.
    """
    shape, kind, offset, size = tensors[name]
    if out is not None and (out.shape != shape or not out.flags.c_contiguous):
        raise ValueError(f"out must be contiguous and of shape {list(shape)}, not {list(out.shape)}")
    block, width = gguf.GGML_QUANT_SIZES[kind]
    with np.errstate(all="ignore"):  # any value may be infinite or NaN
        if kind.name in _STORED:
            touch(size)
            stored = np.frombuffer(data, _STORED[kind.name], size // width, start + offset).reshape(shape)
            if out is None:
                return stored
            out[...] = stored
            return out
        if out is None:
            out = np.empty(shape, np.float32)
        blocks, flat = np.frombuffer(data, np.uint8, size, start + offset), out.reshape(-1)
        # The package works on rows. Given CHUNK elements as one row, it is twice as fast as left alone, and needs less.
        for at in range(0, flat.size, CHUNK):
            row = blocks[at // block * width : (at + CHUNK) // block * width]
            touch(len(row))
            flat[at : at + CHUNK] = gguf.quants.dequantize(row.reshape(1, -1), kind)[0]
    return out


def open_source(path: str | os.PathLike) -> tuple[Source, Tokenizer | None]:
    """The model in a GGUF file, its weights not yet read, and its tokenizer if it has one. Raises CheckpointError."""
    where = os.fspath(path)
    meta, shapes, _, read = open_gguf(path)
    config, table, used = config_from_gguf(where, meta, shapes, read)
    tokenizer = build_tokenizer(where, meta) if any(key.startswith("tokenizer.ggml.") for key in meta) else None
    if tokenizer and tokenizer.backend.get_vocab_size() > config.vocab_size:
        raise CheckpointError(f"{where}: the tokenizer has {tokenizer.backend.get_vocab_size()} tokens, the model "
                              f"{config.vocab_size}")  # fmt: skip
    return Source(where, config, table, shapes, read, ignored=used), tokenizer
