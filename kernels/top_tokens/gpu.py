"""`top_tokens` for Hopper GPUs. It was lowered and interpreted, and has not run on a GPU yet.

Every 64 tokens leave their k best of each direction, and XLA picks the best of those.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxemo.kernels import hopper
from jaxemo.kernels.project_pool.gpu import fold, within
from jaxemo.kernels.top_tokens.reference import highest


def top_tokens(x, directions, spans, centre, offset, scale, *, cosine, k, tile, interpret):
    B, T, _ = x.shape
    E, unit = directions.shape[0], hopper.UNIT["top_tokens"]
    kept = min(k, hopper.PIECE)

    def line(value, dtype):
        return jnp.full((unit,), value, dtype)

    def finish(scores, refs, stage, place):
        (spans_ref, best_ref, place_ref), (row, first, column) = refs, place
        inside = within(spans_ref, row, T)

        def take(j, before):
            """The best that comes after `before`, score and place: which is lower, or as high and further on."""

            def step(t, score, found):
                best, where = found
                place = line(row * T + first + t, jnp.int32)
                after = (score < before[0]) | ((score == before[0]) & (place > before[1]))
                better = jnp.broadcast_to(inside(first + t), (unit,)) & after & (score > best)
                return jnp.where(better, score, best), jnp.where(better, place, where)

            found = fold(stage, (line(-jnp.inf, jnp.float32), line(-1, jnp.int32)), step)
            at = row, first // hopper.PIECE, j, pl.ds(column, unit)
            best_ref[at], place_ref[at] = found
            return found

        hopper.put(stage, scores)
        # No place comes after the first `before`, so that infinite scores are left out; NaN is not higher than anything.
        lax.fori_loop(0, kept, take, (line(jnp.inf, jnp.float32), line(2**31 - 1, jnp.int32)))
        hopper.wait()

    pieces = pl.cdiv(T, tile) * tile // hopper.PIECE
    best, place = hopper.sweep(
        *(x, directions, centre, offset, scale, finish),
        lambda _, width: [jax.ShapeDtypeStruct((B, pieces, kept, width), dtype) for dtype in (jnp.float32, jnp.int32)],
        op="top_tokens",
        cosine=cosine,
        tile=tile,
        interpret=interpret,
        scalars=[spans],
    )
    return highest(*(found[..., :E].reshape(-1, E).T for found in (best, place)), k)
