"""`project_pool` for TPUs: the scores of a tile are reduced where they are; only `[B, E]` is written."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxemo.kernels.project.tpu import estimate, out_type, params, passes, readout, resident, score


def selected(spans_ref, P: int, row, start, count: int, T: int) -> jax.Array:
    """Which of the positions from `start` on lie in the row's `P` spans, `[count, 1]`, and in the row's `T` tokens.

    `spans_ref` is in SMEM, where only a flat array fills its place: `[B · P · 2]`.
    """
    at = start + lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    here = jnp.zeros((count, 1), jnp.bool)
    for p in range(P):
        first = 2 * (row * P + p)
        here |= (spans_ref[first] <= at) & (at < spans_ref[first + 1])
    return here & (at < T)


def project_pool(x, directions, spans, centre, offset, scale, *, cosine, how, tile, interpret):
    B, T, D = x.shape
    E, P = directions.shape[0], spans.shape[1]
    arrays = readout(x.dtype, directions, centre, offset, scale)
    start = -jnp.inf if how == "max" else 0.0

    def kernel(spans_ref, x_ref, arrays, out_ref, count_ref):
        row, i = pl.program_id(0), pl.program_id(1)

        @pl.when(i == 0)
        def _():
            out_ref[...] = jnp.full_like(out_ref, start)
            count_ref[0] = 0.0

        here = selected(spans_ref, P, row, i * tile, tile, T)
        count = jnp.sum(here.astype(jnp.float32))

        @pl.when(count > 0)
        def _():
            # What is not selected may be anything, NaN too, and must not reach a sum.
            s = score(jnp.where(here, x_ref[...], 0), arrays, cosine)
            if how == "max":
                out_ref[...] = jnp.maximum(out_ref[...], jnp.max(jnp.where(here, s, -jnp.inf), 0, keepdims=True))
            elif how == "last":
                at = lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
                last = jnp.max(jnp.where(here, at, -1), 0, keepdims=True)
                out_ref[...] = jnp.sum(jnp.where(at == last, s, 0), 0, keepdims=True)
            else:
                out_ref[...] += jnp.sum(jnp.where(here, s, 0), 0, keepdims=True)
            count_ref[0] += count

        if how == "mean":

            @pl.when(i == pl.num_programs(1) - 1)
            def _():
                out_ref[...] = out_ref[...] / jnp.maximum(count_ref[0], 1.0)

    out = out_type((B, 1, E), jnp.float32, x, arrays, spans)
    return pl.pallas_call(
        kernel,
        out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, pl.cdiv(T, tile)),
            in_specs=[pl.BlockSpec((None, tile, D), lambda b, i, _: (b, i, 0)), resident(arrays)],
            out_specs=pl.BlockSpec((None, 1, E), lambda b, i, _: (b, 0, 0)),
            scratch_shapes=[pltpu.SMEM((1,), jnp.float32)],
        ),
        compiler_params=params(1, 1),
        cost_estimate=estimate(B * T * E * D * passes(x.dtype, arrays), (x, arrays, spans), out),
        interpret=interpret,
        name="project_pool",
    )(spans.reshape(-1), x, arrays)[:, 0]
