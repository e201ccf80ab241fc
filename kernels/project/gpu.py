"""`project` for Hopper GPUs. It was lowered and interpreted, and has not run on a GPU yet."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxemo.kernels import hopper


def write(scores, ref, stage, place) -> None:
    """Copies scores `[64, 64]` by way of `stage` to where they belong in `ref [B, T, E]`; what is outside falls away."""
    row, token, column = place
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    stage[...] = scores
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(stage, ref.at[row, pl.ds(token, hopper.PIECE), pl.ds(column, hopper.UNIT["project"])])


def out_type(B, T, E, width, tile, interpret) -> jax.ShapeDtypeStruct:
    """Scores with as much padding as the copies need. The interpreter does not drop what is outside an array."""
    columns = hopper.up(E, 32)  # of a swizzled line
    return jax.ShapeDtypeStruct((B, T, columns) if interpret is False else (B, hopper.up(T, tile), width), jnp.float32)


def project(x, directions, centre, offset, scale, *, cosine, tile, interpret):
    E, D = directions.shape
    shape = x.shape[:-1]
    x = x.reshape(1, -1, D)
    (scores,) = hopper.sweep(
        *(x, directions, centre, offset, scale),
        lambda scores, refs, stage, place: write(scores, refs[0], stage, place),
        lambda T, width: [out_type(1, T, E, width, tile, interpret)],
        op="project",
        cosine=cosine,
        tile=tile,
        interpret=interpret,
    )
    return scores[0, : x.shape[1], :E].reshape(*shape, E)
