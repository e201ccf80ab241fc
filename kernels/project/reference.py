"""`project`: how far each activation reaches along each direction."""

import jax
import jax.numpy as jnp


def project(
    x: jax.Array,
    directions: jax.Array,
    centre: jax.Array | None = None,
    offset: jax.Array | None = None,
    scale: jax.Array | None = None,
    cosine: bool = False,
) -> jax.Array:
    """Scores, float32 `[..., E]`, of activations `x [..., D]` on `directions [E, D]`: `(y · d_e − offset_e) · scale_e`.

    `y` is x minus `centre [D]`, divided by its length where `cosine` (a zero y scores 0 before the offset). With unit
    directions a score has the unit of the activations, or is a cosine; `offset [E]` and `scale [E]` make it a z-score.
    Operands may be float32 or bfloat16; products are accumulated in float32 and float32 operands are not rounded to TF32
    or bfloat16.

    Lengths are float32 sums of squares: cosines are right for lengths from 1e-15 to 1e18. Shorter activations may count as
    zero, and what is too long for its square scores NaN. So may infinity, which float32 operands cannot be split into
    parts with: an activation with a number that is not finite has some score that is not finite.
    """
    y = x if centre is None else x.astype(jnp.float32) - centre.astype(jnp.float32)
    narrow = y.dtype == directions.dtype and y.dtype in (jnp.bfloat16, jnp.float16)
    y, directions = (v if narrow else v.astype(jnp.float32) for v in (y, directions))
    scores = jnp.einsum(
        "...d,ed->...e", y, directions, precision=None if narrow else "highest", preferred_element_type=jnp.float32
    )
    if cosine:
        scores = scores * inverse(jnp.sum(jnp.square(y.astype(jnp.float32)), axis=-1, keepdims=True))
    if offset is not None:
        scores = scores - offset
    return scores if scale is None else scores * scale


def inverse(square: jax.Array) -> jax.Array:
    """One by the length, from its square: 0 for a length of 0, and NaN for a square that float32 does not hold."""
    some = square > 0
    length = jnp.where(some, jax.lax.rsqrt(jnp.where(some, square, 1.0)), 0.0)
    return jnp.where(square < jnp.inf, length, jnp.nan)
