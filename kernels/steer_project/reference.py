"""`steer_project`: the intervention on the residual stream (see `jaxemo.steering`), and the scores of its result."""

import jax
import jax.numpy as jnp
from jaxemo.kernels.project.reference import project


def steer_project(
    x: jax.Array,
    bank: jax.Array,
    a: jax.Array,
    b: jax.Array,
    spans: jax.Array,
    start: jax.Array,
    keep_norm: jax.Array,
    directions: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """`x' = x + Σ_m (a_m − b_m · (x · d_m)) d_m` for the unit directions `d_m` of `bank [M, D]`, and `project(x', directions)`.

    Args:
      x: `[B, T, D]`; its first token lies at position `start [B]` of each row.
      a, b: coefficients `[B, M]`, float32.
      spans: `[B, M, 2]`, the positions start <= t < stop at which each direction acts.
      keep_norm: `[B]` bool, whether steered tokens are rescaled to the length they had.
      directions: `[E, D]` to score the result on, or None.

    Computed in float32. Returns x' in the type of x, and float32 scores `[B, T, E]` of x' as it is returned, or None.
    Where a and b are 0 no bit of x changes.
    """
    positions = start[:, None, None] + jnp.arange(x.shape[1])[:, None]
    here = (spans[:, None, :, 0] <= positions) & (positions < spans[:, None, :, 1])  # [B, T, M]
    x32 = x.astype(jnp.float32)
    s = jnp.einsum("btd,md->btm", x32, bank, precision="highest")
    c = jnp.where(here, a[:, None] - b[:, None] * s, 0.0)
    y = x32 + jnp.einsum("btm,md->btd", c, bank, precision="highest")
    norm = _norm(y)
    rescale = keep_norm[:, None] & (c != 0).any(-1) & (norm > 0)
    y = (y * jnp.where(rescale, _norm(x32) / jnp.where(rescale, norm, 1.0), 1.0)[..., None]).astype(x.dtype)
    return y, None if directions is None else project(y, directions)


def _norm(x):
    # The where keeps the gradient of a zero vector finite.
    square = jnp.sum(jnp.square(x), axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
