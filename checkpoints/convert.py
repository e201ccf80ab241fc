"""From a checkpoint's named tensors to the model's parameters, through a family's table.

All faults are collected first (unknown, missing, doubly used tensors) and raised together; only then are tensors read,
one at a time, so that no second copy of the model is ever held.
"""

import concurrent.futures
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxemo.checkpoints.entries import Entry, Table, same
from jaxemo.checkpoints.keys import CheckpointError

from jaxemo import params as params_lib
from jaxemo.config import ModelConfig
from jaxemo.quantise import PROJECTIONS, Quantised
from jaxemo.quantise import quantise as quantise_weight


class Source(NamedTuple):
    """A checkpoint that has been opened and not yet read."""

    where: str  # begins every message
    config: ModelConfig
    table: Table
    shapes: Mapping[str, tuple[int, ...]]  # every tensor, as NumPy orders dimensions
    read: Callable[..., np.ndarray]  # read(name) is one's values as stored, read(name, out) fills `out` with them
    prefixes: tuple[tuple[str, str], ...] = ()  # see families.Family
    ignored: tuple[str, ...] = ()


Key = tuple[str, int]  # a weight's name and layer; layer -1 for those that are not in a layer


def load(source: Source, dtype, stacked: bool, quantise: str | None = None) -> params_lib.Params:
    """Parameters in `dtype` on the default device, layers stacked or separate, their projections perhaps quantised.

    Every weight is read straight into the memory that the device takes over. Raises CheckpointError.
    """
    described, found = params_lib.describe(source.config), match(source)
    layer, L = described["layers"][0], source.config.n_layers

    def empty(name: str, leaf: params_lib.Leaf, lead: tuple[int, ...] = ()):
        """Memory for a weight, or for `lead` of them."""
        if quantise and name in PROJECTIONS:
            form = pack(np.zeros(leaf.shape, np.float32), leaf)
            return jax.tree.map(lambda a: aligned_empty((*lead, *a.shape), a.dtype), form)
        return aligned_empty((*lead, *leaf.shape), params_lib.dtype_of(leaf, dtype))

    def pack(w: np.ndarray, leaf: params_lib.Leaf) -> Quantised:
        inner = leaf.shape[1:] if leaf.axes[0] == "experts" else leaf.shape
        return quantise_weight(w, leaf.fan_in, inner, quantise or "")

    def fill(out, name: str, leaf: params_lib.Leaf, i: int) -> None:
        """Read a weight of layer i into `out`, which has its form."""
        if not isinstance(out, Quantised):
            read_into(source, out, *found[name, i])
            return
        w = np.empty(leaf.shape, np.float32)
        read_into(source, w, *found[name, i])
        jax.tree.map(lambda a, b: np.copyto(a, b), out, pack(w, leaf))

    def one(name: str, leaf: params_lib.Leaf, i: int):
        out = empty(name, leaf)
        fill(out, name, leaf, i)
        return jax.device_put(out)

    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        single = {n: pool.submit(one, n, leaf, -1) for n, leaf in described.items() if n != "layers"}
        layers: Any
        if stacked:
            layers = {}
            for n, leaf in layer.items():
                whole = empty(n, leaf, (L,))
                rows = [jax.tree.map(lambda a, i=i: a[i], whole) for i in range(L)]
                list(pool.map(fill, rows, [n] * L, [leaf] * L, range(L)))
                layers[n] = jax.device_put(whole)
        else:
            layers = tuple(pool.map(lambda i: {n: one(n, leaf, i) for n, leaf in layer.items()}, range(L)))
        out = {"layers": layers, **{name: array.result() for name, array in single.items()}}
    return jax.block_until_ready(out)


def read_into(source: Source, out: np.ndarray, entry: Entry, names: list[str]) -> None:
    """Read the tensors `names` of one weight, transformed as its table entry says, into `out`."""
    for i, name in enumerate(names):
        part = out[i] if "{x}" in entry.source else out
        stored = list(source.shapes[name])
        if entry.transform is same and tuple(stored) == part.shape:
            source.read(name, part)
            continue
        try:
            array = entry.transform(source.config, source.read(name))
        except (ValueError, IndexError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{source.where}: {name} of shape {stored} does not fit this model: {error}"
            ) from error
        if not regroups(array.shape, part.shape):
            raise CheckpointError(f"{source.where}: {name} of shape {stored} becomes {list(array.shape)}, the model needs "
                                  f"{list(part.shape)}")  # fmt: skip
        part[...] = array.reshape(part.shape)


def aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Memory that a CPU device takes over as it is, without a second copy (it wants 64-byte alignment)."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def regroups(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether one shape is the other with neighbouring dimensions split or joined: `[D, N·H]` and `[D, N, H]`."""
    a, b = (set(itertools.accumulate(shape, lambda x, y: x * y)) for shape in (stored, wanted))
    return math.prod(stored) == math.prod(wanted) and (a <= b or b <= a)


def match(source: Source) -> dict[Key, tuple[Entry, list[str]]]:
    """For every weight, its table entry and the tensors it is read from.

    CheckpointError unless every weight has its tensors and every number of every tensor is used once.
    """
    shapes = {_plain(name, source.prefixes): name for name in source.shapes}
    ignored = re.compile("|".join(source.ignored) or r"(?!)")
    left = {name for name in shapes if not ignored.fullmatch(name)}
    faults = [] if len(shapes) == len(source.shapes) else ["two tensors have one name but for a prefix"]
    config, described = source.config, params_lib.describe(source.config)
    wanted = [(name, -1) for name in described if name != "layers"]
    wanted += [(name, i) for i in range(config.n_layers) for name in described["layers"][0]]

    found: dict[Key, tuple[Entry, list[str]]] = {}
    filled: dict[str, int] = {}  # how many numbers of the model each tensor gives
    for name, i in wanted:
        options = source.table[name]
        options = (options,) if isinstance(options, Entry) else options
        alternatives = [(option, sources(option, i, config.n_experts)) for option in options]
        entry, names = next((one for one in alternatives if one[1][0] in shapes), alternatives[0])
        missing = [n for n in names if n not in shapes]
        faults += [f"tensor {n} is missing" for n in missing]
        leaf = described[name] if i < 0 else described["layers"][i][name]
        for n in names if not entry.shared else ():
            filled[n] = filled.get(n, 0) + math.prod(leaf.shape) // len(names)
        left -= set(names)
        found[name, i] = entry, [shapes.get(n, n) for n in names]
        if len(faults) > 100:
            break
    unembed, embed = source.table.get("unembed"), found.get(("embed", -1))
    if config.tie_embeddings and isinstance(unembed, Entry) and unembed.source in left and embed:
        # Written out all the same by some; then it must be what the model will use.
        left.discard(unembed.source)
        if embed[1][0] in source.shapes and not np.array_equal(
            source.read(shapes[unembed.source]), source.read(embed[1][0])
        ):
            faults.append(f"tensor {unembed.source} differs from the embedding, which the configuration ties it to")
    faults += [f"tensor {name} is not known" for name in sorted(left)]
    for name, size in filled.items():  # known before any memory is asked for
        if name in shapes and math.prod(source.shapes[shapes[name]]) != size:
            faults.append(
                f"tensor {name} has shape {list(source.shapes[shapes[name]])}, but the model takes {size} numbers from it"
            )
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(f"{source.where}: " + "; ".join(faults[:8]) + more)
    return found


def sources(entry: Entry, layer: int, n_experts: int) -> list[str]:
    """The names of the tensors that an entry asks for in one layer."""
    name = entry.source.replace("{i}", str(layer))
    return [name.replace("{x}", str(x)) for x in range(n_experts)] if "{x}" in name else [name]


def _plain(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    """The name as the table has it."""
    for theirs, ours in prefixes:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def as_dtype(dtype) -> np.dtype:
    """The NumPy type (bfloat16 included) of a name such as "bf16", "bfloat16", "fp32", or of any JAX dtype."""
    name = {"bf16": "bfloat16", "fp32": "float32", "f32": "float32"}.get(dtype, dtype)
    try:
        found = jnp.dtype(name)
    except TypeError:
        found = None
    if found not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"dtype {dtype!r} is not supported; use float32 or bfloat16")
    return found
