"""`project_pool`: the scores of `project`, reduced over selected tokens of each row."""

import jax
import jax.numpy as jnp
from jaxemo.kernels.project.reference import project

HOW = ("mean", "max", "last")


def selected(spans: jax.Array, positions: jax.Array) -> jax.Array:
    """Which `positions [B, T]` lie in any of their row's `spans [B, P, 2]` (start <= position < stop), `[B, T]`."""
    at = positions[:, :, None]
    return ((spans[:, None, :, 0] <= at) & (at < spans[:, None, :, 1])).any(-1)


def project_pool(
    x: jax.Array,
    directions: jax.Array,
    spans: jax.Array,
    centre: jax.Array | None = None,
    offset: jax.Array | None = None,
    scale: jax.Array | None = None,
    cosine: bool = False,
    how: str = "mean",
) -> jax.Array:
    """Scores `[B, E]`, float32, of `x [B, T, D]`: the mean, the maximum or the last over the tokens in `spans [B, P, 2]`.

    The rest as in `project`. What lies outside the spans, such as padding, is not read, whatever it holds. A row whose
    spans name no token of it has mean and last 0 and maximum -inf. NaN among the scores of a row makes its mean and its
    maximum NaN.
    """
    B, T, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    here = selected(spans, positions)
    scores = project(jnp.where(here[..., None], x, 0), directions, centre, offset, scale, cosine)
    if how == "max":
        return jnp.max(jnp.where(here[..., None], scores, -jnp.inf), axis=1, initial=-jnp.inf)
    if how == "last":
        last = jnp.max(jnp.where(here, positions, -1), axis=1, keepdims=True, initial=-1)
        here = positions == last
    return jnp.sum(jnp.where(here[..., None], scores, 0), axis=1) / jnp.maximum(here.sum(1), 1)[:, None]
