"""float32 numbers as sums of bfloat16 numbers, which is what matrix units multiply."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def round_outside(x: jax.Array) -> jax.Array:
    """float32 `x` with bfloat16's precision. XLA may compile a conversion there and back away."""
    return lax.reduce_precision(x, 8, 7)


def round_inside(x: jax.Array) -> jax.Array:
    """The same within a TPU kernel: Mosaic has no `reduce_precision`, and keeps conversions."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def split(x: jax.Array, parts: int, rounding: Callable[[jax.Array], jax.Array] = round_outside) -> list[jax.Array]:
    """`x` as `parts` bfloat16 arrays that add up to it, with 8 bits each; as it is where it is bfloat16 or for 0 parts."""
    if parts == 0 or x.dtype == jnp.bfloat16:
        return [x]
    found = []
    x = x.astype(jnp.float32)
    for _ in range(parts):
        rounded = rounding(x)
        found.append(rounded.astype(jnp.bfloat16))
        x = x - rounded
    return found
