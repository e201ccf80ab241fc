"""`project_pool` for Hopper GPUs. It was lowered and interpreted, and has not run on a GPU yet.

Every 64 tokens leave one sum or maximum of each direction, and XLA reduces those.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxemo.kernels import hopper
from jaxemo.kernels.project_pool.reference import selected


def within(spans_ref, row, T: int):
    """A function that tells of a position whether it lies in the row's spans; `spans_ref [B, P, 2]`."""
    spans = [(spans_ref[row, p, 0], spans_ref[row, p, 1]) for p in range(spans_ref.shape[1])]
    return lambda at: functools.reduce(jnp.logical_or, [(a <= at) & (at < b) for a, b in spans]) & (at < T)


def fold(stage, start, step):
    """`step(token, scores of one token [unit], carry)` over the 64 tokens in `stage`, from the carry `start`."""
    return lax.fori_loop(0, hopper.PIECE, lambda t, carry: step(t, stage[t], carry), start)


def project_pool(x, directions, spans, centre, offset, scale, *, cosine, how, tile, interpret):
    B, T, _ = x.shape
    E, unit = directions.shape[0], hopper.UNIT["project_pool"]
    here = selected(spans, jnp.broadcast_to(jnp.arange(T), (B, T)))
    if how == "last":
        last = jnp.max(jnp.where(here, jnp.arange(T), -1), axis=1)
        spans = jnp.stack([last, last + 1], axis=-1)[:, None].astype(jnp.int32)
        spans = jnp.where(last[:, None, None] < 0, 0, spans)
    empty, join = (-jnp.inf, jnp.maximum) if how == "max" else (0.0, jnp.add)

    def finish(scores, refs, stage, place):
        (spans_ref, out_ref), (row, first, column) = refs, place
        inside = within(spans_ref, row, T)

        def step(t, scores, total):
            # What is not selected may be anything, NaN too, and must not reach a sum.
            return jnp.where(jnp.broadcast_to(inside(first + t), (unit,)), join(total, scores), total)

        hopper.put(stage, scores)
        total = fold(stage, jnp.full((unit,), empty, jnp.float32), step)
        hopper.wait()
        out_ref[row, first // hopper.PIECE, pl.ds(column, unit)] = total

    pieces = pl.cdiv(T, tile) * tile // hopper.PIECE
    (found,) = hopper.sweep(
        *(x, directions, centre, offset, scale, finish),
        lambda _, width: [jax.ShapeDtypeStruct((B, pieces, width), jnp.float32)],
        op="project_pool",
        cosine=cosine,
        tile=tile,
        interpret=interpret,
        scalars=[spans],
    )
    found = found[..., :E]
    if how == "max":
        return found.max(1)
    found = found.sum(1)
    return found / jnp.maximum(here.sum(1), 1)[:, None] if how == "mean" else found
