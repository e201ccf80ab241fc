"""`top_tokens`: for each direction, the tokens of a batch that score highest (max-activating examples)."""

import jax
import jax.numpy as jnp
from jaxemo.kernels.project.reference import project
from jaxemo.kernels.project_pool.reference import selected


def top_tokens(
    x: jax.Array,
    directions: jax.Array,
    spans: jax.Array,
    centre: jax.Array | None = None,
    offset: jax.Array | None = None,
    scale: jax.Array | None = None,
    cosine: bool = False,
    k: int = 8,
) -> tuple[jax.Array, jax.Array]:
    """The `k` highest scores among the tokens of `x [B, T, D]` in `spans [B, P, 2]`, and where they are: both `[E, k]`.

    Scores, float32, as in `project`, highest first; places, int32, are `row * T + position`, equal scores in order of
    place. Scores that are not finite are left out. Where fewer than k are left, scores are -inf and places -1.
    """
    B, T, _ = x.shape
    here = selected(spans, jnp.broadcast_to(jnp.arange(T), (B, T)))[..., None]
    scores = project(jnp.where(here, x, 0), directions, centre, offset, scale, cosine)
    scores = jnp.where(here & jnp.isfinite(scores), scores, -jnp.inf).reshape(B * T, directions.shape[0]).T
    return highest(scores, jnp.arange(B * T, dtype=jnp.int32)[None], k)


def highest(scores: jax.Array, places: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k highest of `scores [E, n]`, of equals the first, and which of `places [E, n]` (or `[1, n]`) they have."""
    short = max(k - scores.shape[1], 0)
    scores = jnp.pad(scores, ((0, 0), (0, short)), constant_values=-jnp.inf)
    places = jnp.pad(places, ((0, 0), (0, short)), constant_values=-1)
    best, order = jax.lax.top_k(scores, k)
    return best, jnp.where(best > -jnp.inf, jnp.take_along_axis(places, order, axis=1), -1)
