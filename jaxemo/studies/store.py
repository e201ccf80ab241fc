"""What a study measured so far: a JSONL file with a line for each arm, which a killed run goes on with."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxemo import files
from jaxemo.steering import Steering


def measure(
    out: str | os.PathLike,
    by: Mapping[str, Any],
    steerings: Mapping[str, Steering | None],
    one: Callable[[str], dict[str, Any]],
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """`one(arm)` of every arm that `out` does not hold yet; all arms' records.

    `by` says what was measured on. Raises ValueError for an `out` of another `by` or with an arm of another steering, and
    BlockingIOError for one that is being written.
    """
    files.check_writable(out)
    with open(out, "a+b") as file:
        files.lock(file, out)
        found = files.records(file, out, "a study", [b'{"study": ', b'{"arm": '])
        if not found:
            files.append(file, [{"study": dict(by)}])
        elif found[0].get("study") != dict(by):
            raise ValueError(f"{os.fspath(out)!r} is of other choices or weights; write elsewhere")
        done = {record["arm"]: record for record in found[1:]}
        for name, steering in steerings.items():
            if name in done and done[name]["steering"] != fingerprint(steering):
                raise ValueError(f"{os.fspath(out)!r} has {name!r} with another steering; write elsewhere")
        left = [name for name in steerings if name not in done]
        with tqdm(
            total=len(steerings), initial=len(steerings) - len(left), unit="arm", desc="arms", disable=not progress
        ) as bar:
            for name in left:
                done[name] = {"arm": name, "steering": fingerprint(steerings[name])} | one(name)
                files.append(file, [done[name]])
                bar.update()
    return {name: done[name] for name in steerings}


def fingerprint(steering: Steering | None) -> str:
    digest = hashlib.sha256()
    for term in steering.terms if steering else ():
        digest.update(repr((term.kind, term.tokens)).encode())
        for array in (term.directions, term.value, term.active):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def save(result: Any, out: str | os.PathLike, name: str) -> None:
    """A study's result as text and as JSON, with its table, in the directory `out`."""
    fields = plain(dataclasses.asdict(result) | {"table": result.table()})
    text = json.dumps(fields, indent=1, allow_nan=False)
    files.write_atomically(pathlib.Path(out) / f"{name}.txt", f"{result}\n".encode())
    files.write_atomically(pathlib.Path(out) / f"{name}.json", f"{text}\n".encode())


def plain(x: Any) -> Any:
    """For JSON, which has no arrays and no NaN."""
    if isinstance(x, np.ndarray):
        return plain(x.tolist())
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and math.isnan(x) else x


def numbers(array: np.ndarray) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [None if np.isnan(x) else float(x) for x in array]
