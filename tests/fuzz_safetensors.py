"""Damaged safetensors files without end: `python tests/fuzz_safetensors.py [COUNT] [SEED]` tries COUNT of them (100,000).

Every one must be read as it stands, with the values that the `safetensors` package finds in it, or be refused with a
CheckpointError that names the file. The tests run some hundreds.
"""

import json
import pathlib
import random
import sys
import tempfile
import time
import tracemalloc

import ml_dtypes
import numpy as np
import safetensors.numpy
from jaxemo.checkpoints import CheckpointError
from jaxemo.checkpoints.safetensors import DTYPES, open_tensors


def sample() -> bytes:
    """A small whole file: every dtype that models are stored in, and shapes of none to four dimensions."""
    rng = np.random.default_rng(0)
    tensors = {
        "model.embed.weight": rng.standard_normal((5, 3)).astype(ml_dtypes.bfloat16),
        "model.norm.weight": rng.standard_normal(7).astype(np.float32),
        "half": rng.standard_normal((2, 3, 1, 2)).astype(np.float16),
        "double": rng.standard_normal((2, 2)),
        "blocks": rng.integers(0, 256, (3, 2, 16), np.uint8),
        "steps": np.array(12, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "mask": rng.random(9) < 0.5,
        'odd "name" {é}': rng.integers(-9, 9, (3,), np.int32),
    }
    return safetensors.numpy.save(tensors, {"format": "pt", "note": '{"a": [1, {"b": "}"}]}'})


ODD = [0, 1, -1, 2, 7, 8, 2**31, 2**32, 2**56, 2**63 - 1, 2**64, 10**400, 0.5, 1e300, True, None, "F32", "F4", "bf16", "",
       [], {}, [1], [[1]], [0] * 9, [2**40] * 3, {"dtype": "F32"}]  # fmt: skip


def mutate(rng: random.Random, data: bytes) -> bytes:
    """One to three changes: to the header as JSON, to its text, to its length, or to the file's bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        length = int.from_bytes(data[:8], "little")
        header, rest = data[8 : 8 + length], data[8 + length :]
        how = rng.randrange(10)
        if how <= 5:
            try:
                table = json.loads(header)
                names = list(table)
                name = rng.choice(names)
                entry = table[name]
                kind = rng.randrange(8)
                if kind == 0:
                    entry[rng.choice(["dtype", "shape", "data_offsets", "more"])] = rng.choice(ODD)
                elif kind == 1:
                    part = entry[rng.choice(["shape", "data_offsets"])]
                    at = rng.randrange(len(part))
                    part[at] = rng.choice(
                        [part[at] + rng.choice([-9, -4, -2, -1, 1, 2, 4, 9]), part[at], rng.choice(ODD)]
                    )
                elif kind == 2:
                    del entry[rng.choice(list(entry))]
                elif kind == 3:
                    entry["dtype"] = rng.choice(["F16", "BF16", "F32", "U8", "I64", "F8_E4M3", "C64", "F4", "f32"])
                elif kind == 4:
                    table[name] = rng.choice([*ODD, table[rng.choice(names)]])
                elif kind == 5:
                    del table[name]
                elif kind == 6:
                    other = table[rng.choice(names)]
                    part = rng.choice(["shape", "data_offsets"])
                    entry[part], other[part] = other[part], entry[part]
                else:
                    table["__metadata__"] = rng.choice([*ODD, {"a": "b"}, {"a": {"b": "c"}}])
                header = json.dumps(table, indent=rng.choice([None, None, 1]), ensure_ascii=rng.random() < 0.5).encode()
            except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                pass  # a change before this one broke it, or this entry is not one of a tensor
        elif how == 6 and header:
            text = bytearray(header)
            for _ in range(rng.choice([1, 1, 3])):
                text[rng.randrange(len(text))] = rng.choice(b'0129-.,:[]{}"\\ \n\0\xffeE')
            header = bytes(text)
        elif how == 7 and header:
            at, end = sorted(rng.randrange(len(header) + 1) for _ in range(2))
            what = rng.choice([b"", header[at:end] * 2, b" " * 9, b"[" * 5000, b'{"a":' * 2000, b"\xed\xa0\x80"])
            header = header[:at] + what + header[end:]
        elif how == 8:
            rest = rng.choice([rest[: rng.randrange(len(rest) + 1)], rest + bytes(rng.randrange(1, 99)), b""])
        else:
            length = rng.choice([0, 1, length - 1, length + 1, length + 8, len(data), 1 << 25, 1 << 63, (1 << 64) - 1])
            data = (length % (1 << 64)).to_bytes(8, "little") + header + rest
            if rng.random() < 0.5:
                data = data[: rng.randrange(len(data) + 1)]
            continue
        data = len(header).to_bytes(8, "little") + header + rest
    return data


def attempt(path: pathlib.Path) -> bool:
    """Whether the file is read; False if it is refused by the project's own error. Anything else comes through."""
    try:
        shapes, read = open_tensors([path])
        mine = {name: read(name) for name in shapes}
    except CheckpointError as error:
        message = str(error)
        assert str(path) in message and len(message) < 2000, message
        return False
    assert shapes == {name: array.shape for name, array in mine.items()}
    assert sum(array.nbytes for array in mine.values()) < path.stat().st_size
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    assert theirs.keys() == mine.keys()
    for name, array in mine.items():
        other = theirs[name]
        assert list(array.shape) == other["shape"] and array.tobytes() == bytes(other["data"]), name
        assert array.dtype == DTYPES[other["dtype"]], (name, other["dtype"])
    return True


def main(count: int, seed: int) -> None:
    whole, began, read = sample(), time.monotonic(), 0
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "damaged.safetensors"
        for i in range(count):
            data = mutate(random.Random(f"{seed}/{i}"), whole)
            path.unlink(missing_ok=True)  # an older file may still be mapped
            path.write_bytes(data)
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.monotonic()
            try:
                read += attempt(path)
            except BaseException:
                kept = pathlib.Path(f"fuzz-{seed}-{i}.safetensors")
                kept.write_bytes(data)
                print(f"file {i} of seed {seed} is kept as {kept}")
                raise
            took, peak = time.monotonic() - start, tracemalloc.get_traced_memory()[1] - before
            assert took < 2 and peak < 2 * len(data) + (1 << 20), (i, took, peak)
    print(f"{count} files (seed {seed}): {read} read, {count - read} refused, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(*(int(given) for given in (sys.argv[1:] + ["100000", "0"][len(sys.argv) - 1 :])))
