"""`steer_project` for Hopper GPUs. It was lowered and interpreted, and has not run on a GPU yet.

One warpgroup keeps 64 tokens in shared memory, from where they were read to where they are written: it projects them on the
bank, adds the update twice (once for the length that it leads to, once for good), and scores the result. The bank and the
directions, in bfloat16 parts, stream past.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxemo.kernels.hopper import PARAMS, PIECE, TILED, TILED_FLOAT32, K, columns, pad, up
from jaxemo.kernels.project.gpu import out_type, write
from jaxemo.kernels.split import split


def stream(body, count: int, width: int, down: bool, refs, start=None):
    """`body(step, blocks, carry)`, without a carry where there is no `start`, over blocks of `refs` as they pass in shared memory.

    Blocks are `[64, width]`, one below the other (`down`), or `[width, 64]`, side by side.
    """
    spec = plgpu.BlockSpec((K, width), lambda k: (k, 0), transforms=TILED)
    if not down:
        spec = plgpu.BlockSpec((width, K), lambda k: (0, k), transforms=TILED)
    return plgpu.emit_pipeline(
        lambda at, *rest: body(at[0], rest[: len(refs)], *rest[len(refs) :]),
        grid=(count,),
        in_specs=[spec] * len(refs),
        max_concurrent_steps=2,
        init_carry=start,
    )(*refs)


def steer_project(x, bank, a, b, spans, start, keep_norm, directions, *, tile, interpret):
    B, T, D = x.shape
    M, E = up(max(bank.shape[0], 1), K), 0 if directions is None else directions.shape[0]
    C = columns(E, 64, 128) if E else 0
    count = 0 if directions is None else 1 + (directions.dtype == jnp.float32)
    banks = [pad(part, 0, M) for part in split(bank.astype(jnp.float32), 2)]
    readout = [pad(part.T, 1, up(E, C)) for part in split(directions, count)] if E else []
    how = pad(jnp.stack([a, b], axis=1).astype(jnp.float32), 2, M)
    where = pad(spans.transpose(0, 2, 1), 2, M)
    x = pad(x, 1, up(T, 8))
    steps = D // K

    def kernel(x_ref, bank_refs, down_refs, how_ref, where_ref, start_ref, keep_ref, readout_refs, *refs):
        *out_refs, x_tile, c_tile, hows, wheres, ready, pieces = refs
        row, first = lax.axis_index("row"), lax.axis_index("tile") * PIECE
        tokens = pl.ds(first, PIECE)

        @pl.loop(0, steps)
        def _(k):
            plgpu.copy_gmem_to_smem(x_ref.at[row, tokens, pl.ds(k * K, K)], x_tile.at[k], ready)

        plgpu.copy_gmem_to_smem(how_ref.at[row], hows, ready)
        plgpu.copy_gmem_to_smem(where_ref.at[row], wheres, ready)
        plgpu.barrier_wait(ready)

        def product(width, multiply):
            """The sum of the products that `multiply(total)` adds to `total [64, width]`."""

            def run(total):
                multiply(total)
                plgpu.wgmma_wait(0)
                return total[...]

            return pl.run_scoped(run, plgpu.ACC((PIECE, width), jnp.float32))

        def project(width, parts):
            def multiply(total):
                def body(k, blocks):
                    for block in blocks:
                        plgpu.wgmma(total, x_tile.at[k], block)
                    plgpu.wgmma_wait(0)

                stream(body, steps, width, True, parts)

            return product(width, multiply)

        def across(line):
            return lax.broadcast_in_dim(line, (PIECE, M), (1,))

        s = project(M, down_refs)
        at = lax.broadcasted_iota(jnp.int32, (PIECE, M), 0) + (start_ref[row] + first)
        here = (across(wheres[0]) <= at) & (at < across(wheres[1]))
        c = jnp.where(here, across(hows[0]) - across(hows[1]) * s, jnp.zeros_like(s))
        moved = jnp.sum(jnp.where(c != 0, jnp.ones_like(c), jnp.zeros_like(c)), axis=1) > 0
        high = c.astype(jnp.bfloat16)
        c_tile[0] = high
        c_tile[1] = (c - high.astype(jnp.float32)).astype(jnp.bfloat16)
        plgpu.commit_smem()

        def updated(k, blocks):
            """64 columns of x, and of x with the update."""

            def multiply(total):
                for i, j in ((0, 0), (0, 1), (1, 0)):
                    plgpu.wgmma(total, c_tile.at[i], blocks[j])

            x = x_tile[k].astype(jnp.float32)
            return x, x + product(K, multiply)

        def measure(k, blocks, squares):
            return tuple(square + jnp.sum(v * v, axis=1) for square, v in zip(squares, updated(k, blocks), strict=True))

        none = jnp.zeros((PIECE,), jnp.float32)
        before, after = stream(measure, steps, M, False, bank_refs, (none, none))
        some = moved & (before > 0) & (after > 0)
        ratio = jnp.where(some, before, none + 1) / jnp.where(some, after, none + 1)
        keep = jnp.broadcast_to(keep_ref[row] != 0, (PIECE,))
        # A row of length 0 that was moved is rescaled to 0, as is said of keep_norm.
        vanish = moved & (before == 0)
        factor = jnp.where(keep & moved, jnp.where(vanish, none, ratio * lax.rsqrt(ratio)), none + 1)

        def finish(k, blocks):
            _, y = updated(k, blocks)
            x_tile[k] = (y * lax.broadcast_in_dim(factor, y.shape, (0,))).astype(x.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_tile.at[k], out_refs[0].at[row, tokens, pl.ds(k * K, K)])

        stream(finish, steps, M, False, bank_refs)
        if E:

            @pl.loop(0, up(E, C) // C)
            def _(block):
                scores = project(C, [part.at[:, pl.ds(block * C, C)] for part in readout_refs])
                for right in range(0, C, 64):
                    write(scores[:, right : right + 64], out_refs[1], pieces[0], (row, first, block * C + right))

        plgpu.wait_smem_to_gmem(0)

    shapes = [jax.ShapeDtypeStruct((B, up(T, 8) if interpret is False else up(T, PIECE), D), x.dtype)]
    if E:
        shapes.append(out_type(B, up(T, 8), E, up(E, C), PIECE, interpret))
    out = plgpu.kernel(
        kernel,
        out_type=shapes,
        grid=(B, pl.cdiv(T, PIECE)),
        grid_names=("row", "tile"),
        scratch_types=[
            plgpu.SMEM((steps, PIECE, K), x.dtype, transforms=TILED),
            plgpu.SMEM((2, PIECE, M), jnp.bfloat16, transforms=TILED),
            plgpu.SMEM((2, M), jnp.float32),
            plgpu.SMEM((2, M), jnp.int32),
            plgpu.Barrier(num_arrivals=steps + 2),
            [plgpu.SMEM((PIECE, 64), jnp.float32, transforms=TILED_FLOAT32)] * bool(E),
        ],
        compiler_params=PARAMS,
        interpret=interpret,
        kernel_name="steer_project",
    )(x, banks, [part.T for part in banks], how, where, start, keep_norm.astype(jnp.int32), readout)
    return out[0][:, :T], out[1][:, :T, :E] if E else None
