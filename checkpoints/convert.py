"""From a checkpoint's named tensors to the model's parameters, through a family's table.

All faults are collected first (unknown, missing, doubly mapped tensors, wrong shapes) and raised together; only then
are tensors read, one at a time, so that no second copy of the model is ever held.
"""

import concurrent.futures
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxemo.checkpoints.families import CheckpointError, Row

from jaxemo import params as params_lib
from jaxemo.config import ModelConfig


def convert(
    where: str,
    config: ModelConfig,
    table: Sequence[Row],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype,
    stacked: bool,
) -> params_lib.Params:
    """Parameters in `dtype` on the default device, layers stacked or separate.

    `shapes` holds every tensor of the checkpoint by name and `read` returns one as float32. Raises CheckpointError.
    """
    described = params_lib.describe(config)
    source = match(where, config, table, shapes)

    def make(key) -> np.ndarray:
        name, row = source[key]
        array = row.transform(config, read(name))
        leaf = described[key[0]] if len(key) == 1 else described["layers"][key[1]][key[2]]
        if array.shape != leaf.shape:
            raise CheckpointError(f"{where}: {name} becomes {list(array.shape)}, the model needs {list(leaf.shape)}")
        return np.array(array, dtype=dtype, order="C")  # always a copy: never an alias of a mapped file

    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        single = {
            name: pool.submit(lambda n: jax.device_put(make((n,))), name) for name in described if name != "layers"
        }
        layers: Any
        if stacked:
            layers = {}
            for weight, leaf in described["layers"][0].items():
                whole = np.empty((config.n_layers, *leaf.shape), dtype)
                for i, array in enumerate(pool.map(lambda i, w=weight: make(("layers", i, w)), range(config.n_layers))):
                    whole[i] = array
                layers[weight] = jax.device_put(whole)
        else:

            def one_layer(i):
                return {w: jax.device_put(make(("layers", i, w))) for w in described["layers"][i]}

            layers = tuple(pool.map(one_layer, range(config.n_layers)))
        out = {"layers": layers, **{name: array.result() for name, array in single.items()}}
    return jax.block_until_ready(out)


def match(where: str, config: ModelConfig, table: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]):
    """{weight key: (tensor name, row)}: every tensor used once and every weight filled once, else CheckpointError."""
    wanted: set[tuple] = {(name,) for name in params_lib.describe(config) if name != "layers"}
    wanted |= {("layers", i, w) for i, layer in enumerate(params_lib.describe(config)["layers"]) for w in layer}
    patterns = [(re.compile(re.escape(row.source).replace(r"\{i\}", r"(\d+)")), row) for row in table]
    found: dict[tuple, tuple[str, Row]] = {}
    faults = []
    for name in shapes:
        hits = [(m, row) for pattern, row in patterns if (m := pattern.fullmatch(name))]
        if len(hits) != 1:
            faults.append(
                f"tensor {name} is not known" if not hits else f"tensor {name} matches {len(hits)} table rows"
            )
            continue
        m, row = hits[0]
        key = (row.target[0], int(m[1]), row.target[1]) if m.groups() else row.target
        if key not in wanted:
            faults.append(f"tensor {name} has no place in a model of {config.n_layers} layers")
        elif key in found:
            faults.append(f"tensors {found[key][0]} and {name} are the same weight")
        else:
            found[key] = (name, row)
    for key in sorted(wanted - set(found), key=str):
        by_target = {row.target: row.source for row in table}
        name = by_target[key].format() if len(key) == 1 else by_target[key[0], key[2]].format(i=key[1])
        faults.append(f"tensor {name} is missing")
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(f"{where}: " + "; ".join(faults[:8]) + more)
    return found


def as_dtype(dtype) -> np.dtype:
    """The NumPy type (bfloat16 included) of a name such as "bf16", "bfloat16", "fp32", or of any JAX dtype."""
    name = {"bf16": "bfloat16", "fp32": "float32", "f32": "float32"}.get(dtype, dtype)
    found = jnp.dtype(name)
    if found not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"dtype {dtype!r} is not supported; use float32 or bfloat16")
    return found
