"""`steer_project` for TPUs: a tile is read once, steered, scored and written once."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxemo.kernels.project.tpu import estimate, out_type, params, passes, product, readout, resident, score
from jaxemo.kernels.split import round_inside, split


def steer_project(x, bank, a, b, spans, start, keep_norm, directions, *, tile, interpret):
    B, T, D = x.shape
    M, E = bank.shape[0], 0 if directions is None else directions.shape[0]
    parts = 0 if x.dtype == jnp.float32 else 2
    held = {
        "bank": split(bank.astype(jnp.float32), parts),
        "readout": None if directions is None else readout(x.dtype, directions),
    }
    # a, b, first and last position, one row of four a batch row
    how = jnp.stack([a, b], axis=1).astype(jnp.float32)  # [B, 2, M]
    where = spans.transpose(0, 2, 1)  # [B, 2, M]
    products = M * D * (5 if parts else 12) + (E * D * passes(x.dtype, held["readout"]) if E else 0)

    def kernel(start_ref, keep_ref, x_ref, how_ref, where_ref, held, *out_refs):
        row, i = pl.program_id(0), pl.program_id(1)
        x = x_ref[...]
        bank = [part[...] for part in held["bank"]]
        s = product([x], bank, (1, 1))  # [t, M]
        at = start_ref[row] + i * tile + lax.broadcasted_iota(jnp.int32, (tile, M), 0)
        here = (where_ref[0:1] <= at) & (at < where_ref[1:2])
        c = jnp.where(here, how_ref[0:1] - how_ref[1:2] * s, 0.0)
        x32 = x.astype(jnp.float32)
        y = x32 + product(split(c, parts, round_inside), bank, (1, 0))
        norm, before = (jnp.sqrt(jnp.sum(jnp.square(v), -1, keepdims=True)) for v in (y, x32))
        moved = jnp.max(jnp.abs(c), -1, keepdims=True) > 0
        rescale = (keep_ref[row] != 0) & moved & (norm > 0)
        y = (y * jnp.where(rescale, before / jnp.where(rescale, norm, 1.0), 1.0)).astype(x.dtype)
        out_refs[0][...] = y
        if E:
            out_refs[1][...] = score(y, held["readout"], False)

    def tiles(width):
        return pl.BlockSpec((None, tile, width), lambda b, i, *_: (b, i, 0))

    row = pl.BlockSpec((None, 2, M), lambda b, i, *_: (b, 0, 0))
    operands = (x, how, where, held)
    outs = [out_type(x.shape, x.dtype, *operands)] + [out_type((B, T, E), jnp.float32, *operands)] * bool(E)
    out = pl.pallas_call(
        kernel,
        outs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, pl.cdiv(T, tile)),
            in_specs=[tiles(D), row, row, resident(held)],
            out_specs=[tiles(D)] + [tiles(E)] * bool(E),
        ),
        compiler_params=params(2),
        cost_estimate=estimate(B * T * products, operands, outs),
        interpret=interpret,
        name="steer_project",
    )(start, keep_norm.astype(jnp.int32), *operands)
    return out[0], out[1] if E else None
