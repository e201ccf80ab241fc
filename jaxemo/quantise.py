"""Weight-only quantisation, for models that do not fit: 8 or 4 bits a weight in memory, full precision in arithmetic.

The projections of the layers are held as small whole numbers q with w = low + scale · q, where every output channel (8
bits), or every 32 inputs of an output channel (4 bits), has its own low and scale, in float32 or float16. They are
multiplied out where they are used. Embeddings, norms, biases and routers stay as they are.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

BITS = {"int8": 8, "int4": 4}
GROUP = 32  # inputs that share a scale in 4 bits; fewer where a weight's inputs do not divide into groups of 32
PROJECTIONS = frozenset({"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"})


@flax.struct.dataclass
class Quantised:
    """A weight `[*lead, *inner]`; `lead` may hold a layer and an expert axis.

    `values` is uint8, `[*lead, in, out]` or, with two inputs a byte, the even one in the low half, `[*lead, in/2, out]`;
    `low` and `scale` are `[*lead, groups, out]`, float32 for 8 bits and float16 for 4.
    """

    values: Any
    low: Any
    scale: Any
    inner: tuple[int, ...] = flax.struct.field(pytree_node=False)
    kind: str = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-2], *self.inner)

    def full(self, dtype) -> jax.Array:
        """The weight multiplied out, in `dtype`."""
        q = self.values
        if self.kind == "int4":
            q = jnp.stack([q & 15, q >> 4], axis=-2)  # [*lead, in/2, 2, out]
        q = q.reshape(*self.scale.shape[:-1], -1, q.shape[-1])  # [*lead, groups, in/groups, out]
        low, scale = self.low.astype(jnp.float32), self.scale.astype(jnp.float32)
        w = low[..., None, :] + scale[..., None, :] * q.astype(jnp.float32)
        return w.reshape(self.shape).astype(dtype)


def full(weight, dtype):
    """A weight ready to multiply with, whether it is quantised or not."""
    return weight.full(dtype) if isinstance(weight, Quantised) else weight


def quantise(w: np.ndarray, inputs: int, inner: tuple[int, ...], kind: str) -> Quantised:
    """A float32 weight `[*lead, *inner]` whose first `inner` dimensions are `inputs` inputs; `kind` is "int8" or "int4".

    The smallest weight of a group becomes 0 and the largest 255 or 15; what lies between is rounded to nearest. Raises
    ValueError for an unknown kind, and for an odd number of inputs in 4 bits.
    """
    if kind not in BITS:
        raise ValueError(f"quantise={kind!r}; expected {' or '.join(BITS)}")
    if kind == "int4" and inputs % 2:
        raise ValueError(f"a weight of {inputs} inputs cannot be held in 4 bits, two a byte; use int8")
    lead = w.shape[: w.ndim - len(inner)]
    groups = 1 if kind == "int8" else inputs // math.gcd(inputs, GROUP)
    grouped = w.reshape(*lead, groups, inputs // groups, -1)
    top, form = 2 ** BITS[kind] - 1, np.float32 if kind == "int8" else np.float16
    low = grouped.min(-2).astype(form)
    scale = ((grouped.max(-2) - low) / top).astype(form)
    steps = (grouped - low[..., None, :]) / np.where(scale > 0, scale, 1)[..., None, :]
    values = np.clip(np.rint(steps), 0, top).astype(np.uint8).reshape(*lead, inputs, -1)
    if kind == "int4":
        values = values[..., ::2, :] | values[..., 1::2, :] << 4
    return Quantised(values, low, scale, inner, kind)
