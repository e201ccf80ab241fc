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
    Where a and b are 0 no number of x changes. Tokens outside all spans of their row may hold anything: nothing of them
    reaches x' elsewhere, nor the derivatives by bank, a and b. Lengths that are kept are from 1e-15 to 1e18, as in `project`;
    a longer token becomes NaN.
    """
    positions = start[:, None, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[:, None]
    here = (spans[:, None, :, 0] <= positions) & (positions < spans[:, None, :, 1])  # [B, T, M]
    inside = here.any(-1, keepdims=True)

    def steered(v):  # elsewhere NaN would reach derivatives, as zero times NaN
        return jnp.where(inside, v, 0.0)

    x32 = x.astype(jnp.float32)
    s = jnp.einsum("btd,md->btm", steered(x32), bank, precision="highest")
    c = jnp.where(here, a[:, None] - b[:, None] * s, 0.0)
    y = x32 + jnp.einsum("btm,md->btd", c, bank, precision="highest")
    before, norm = _norm(steered(x32)), _norm(steered(y))
    rescale = keep_norm[:, None] & (c != 0).any(-1) & (norm > 0)
    y = (y * jnp.where(rescale, before / jnp.where(rescale, norm, 1.0), 1.0)[..., None]).astype(x.dtype)
    return y, None if directions is None else project(y, directions)


def _norm(x):
    # The where keeps the gradient of a zero vector finite.
    square = jnp.sum(jnp.square(x), axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
