"""`project`: how far each activation reaches along each direction."""

import jax
import jax.numpy as jnp


def project(x: jax.Array, directions: jax.Array) -> jax.Array:
    """Scores, float32 `[..., T, E]`, of activations `x [..., T, D]` on `directions [E, D]`: `x · d_e`.

    Both may be float32 or bfloat16; products are accumulated in float32 and float32 operands are not rounded to
    TF32 or bfloat16. With unit directions a score has the unit of the activations. Raises ValueError where the
    shapes do not fit.
    """
    x, directions = jnp.asarray(x), jnp.asarray(directions)
    if directions.ndim != 2 or x.ndim < 1 or x.shape[-1] != directions.shape[-1]:
        raise ValueError(f"project needs x [..., D] and directions [E, D], got {x.shape} and {directions.shape}")
    dtype = jnp.promote_types(x.dtype, directions.dtype)
    return jnp.einsum(
        "...d,ed->...e",
        x.astype(dtype),
        directions.astype(dtype),
        precision="highest" if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
