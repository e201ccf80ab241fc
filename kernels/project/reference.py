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
    """
    y = x if centre is None else x.astype(jnp.float32) - centre.astype(jnp.float32)
    dtype = jnp.promote_types(y.dtype, directions.dtype)
    scores = jnp.einsum(
        "...d,ed->...e",
        y.astype(dtype),
        directions.astype(dtype),
        precision="highest" if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    if cosine:
        square = jnp.sum(jnp.square(y.astype(jnp.float32)), axis=-1, keepdims=True)
        scores = scores * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    if offset is not None:
        scores = scores - offset
    return scores if scale is None else scores * scale
