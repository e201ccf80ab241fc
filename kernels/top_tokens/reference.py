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
    place. Where fewer than k tokens are selected, scores are -inf and places -1.
    """
    B, T, _ = x.shape
    here = selected(spans, jnp.broadcast_to(jnp.arange(T), (B, T)))
    scores = project(jnp.where(here[..., None], x, 0), directions, centre, offset, scale, cosine)
    scores = jnp.where(here[..., None], scores, -jnp.inf).reshape(B * T, -1).T
    if k > B * T:
        scores = jnp.pad(scores, ((0, 0), (0, k - B * T)), constant_values=-jnp.inf)
    best, place = jax.lax.top_k(scores, k)
    return best, jnp.where(best > -jnp.inf, place, -1)
