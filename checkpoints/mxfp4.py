"""MXFP4, as OpenAI published gpt-oss in it: four-bit floats in groups of 32 that share a power of two.

A tensor NAME is stored as NAME_blocks `[X, out, in/32, 16]`, two numbers a byte, the first in the low half, and NAME_scales
`[X, out, in/32]`, exponents plus 127. Here it is shown under its own name, as `[X, in, out]`.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxemo.checkpoints.keys import CheckpointError

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[..., np.ndarray]


def unpacked(where: str, shapes: Shapes, read: Read) -> tuple[Shapes, Read]:
    """The same tensors, with every pair of blocks and scales shown as the float32 tensor that it stands for."""
    plain = {name: shape for name, shape in shapes.items() if not name.endswith(("_blocks", "_scales"))}
    packed = {}
    for name in (n.removesuffix("_blocks") for n in shapes if n.endswith("_blocks")):
        blocks, scales = shapes[f"{name}_blocks"], shapes.get(f"{name}_scales")
        if len(blocks) != 4 or blocks[-1] != 16 or scales != blocks[:-1]:
            raise CheckpointError(f"{where}: {name}_blocks of shape {list(blocks)} and {name}_scales of shape "
                                  f"{scales and list(scales)} do not belong together")  # fmt: skip
        packed[name] = (blocks[0], blocks[2] * 32, blocks[1])

    def read_any(name: str) -> np.ndarray:
        if name not in packed:
            return read(name)
        values = np.empty(packed[name], np.float32)
        blocks, scales = read(f"{name}_blocks"), read(f"{name}_scales")
        if blocks.dtype != np.uint8 or scales.dtype != np.uint8:
            raise CheckpointError(f"{where}: {name}_blocks and {name}_scales should hold bytes")
        for x in range(len(blocks)):  # expert by expert, to hold little at once
            pairs = np.stack([VALUES[blocks[x] & 15], VALUES[blocks[x] >> 4]], axis=-1)
            scaled = np.ldexp(pairs.reshape(*scales.shape[1:], 32), scales[x, ..., None].astype(np.int32) - 127)
            values[x] = scaled.reshape(len(scaled), -1).T
        return values

    return plain | packed, read_any
