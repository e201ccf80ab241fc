"""`top_tokens` for TPUs: each tile of tokens leaves its k best of every direction, and XLA picks the best of those."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxemo.kernels.project.tpu import estimate, out_type, params, passes, readout, resident, score
from jaxemo.kernels.project_pool.tpu import selected
from jaxemo.kernels.top_tokens.reference import highest


def top_tokens(x, directions, spans, centre, offset, scale, *, cosine, k, tile, interpret):
    B, T, D = x.shape
    E, P = directions.shape[0], spans.shape[1]
    arrays = readout(x.dtype, directions, centre, offset, scale)
    kept = min(k, tile)
    blocks = pl.cdiv(T, tile)

    def kernel(spans_ref, x_ref, arrays, best_ref, place_ref, left_ref):
        row, i = pl.program_id(0), pl.program_id(1)
        at = lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
        here = selected(spans_ref, P, row, i * tile, tile, T)
        s = score(jnp.where(here, x_ref[...], 0), arrays, cosine)
        left_ref[...] = jnp.where(here & (jnp.abs(s) < jnp.inf), s, -jnp.inf)

        @pl.loop(0, kept)
        def _(j):
            s = left_ref[...]
            best = jnp.max(s, 0, keepdims=True)
            where = jnp.min(jnp.where(s == best, at, tile), 0, keepdims=True)  # the first of equals
            best_ref[pl.ds(j, 1)] = best
            place_ref[pl.ds(j, 1)] = row * T + i * tile + where
            left_ref[...] = jnp.where(at == where, -jnp.inf, s)

    outs = [out_type((B, blocks, kept, E), dtype, x, arrays, spans) for dtype in (jnp.float32, jnp.int32)]
    out = pl.BlockSpec((None, None, kept, E), lambda b, i, _: (b, i, 0, 0))
    best, place = pl.pallas_call(
        kernel,
        outs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, blocks),
            in_specs=[pl.BlockSpec((None, tile, D), lambda b, i, _: (b, i, 0)), resident(arrays)],
            out_specs=[out, out],
            scratch_shapes=[pltpu.VMEM((tile, E), jnp.float32)],
        ),
        compiler_params=params(2),
        cost_estimate=estimate(B * T * E * D * passes(x.dtype, arrays), (x, arrays, spans), outs),
        interpret=interpret,
        name="top_tokens",
    )(spans.reshape(-1), x, arrays)
    return highest(best.reshape(-1, E).T, place.reshape(-1, E).T, k)
