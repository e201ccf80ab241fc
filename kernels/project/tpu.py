"""`project` for TPUs, and what the other ops' TPU kernels share with it.

A tile of activations comes into VMEM once; the directions stay there. The matrix unit multiplies bfloat16, so float32
operands beside bfloat16 activations are split into a high and a low bfloat16 part; float32 activations are multiplied at
the highest precision.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxemo.kernels import choice
from jaxemo.kernels.project.reference import inverse
from jaxemo.kernels.split import round_inside, split


def product(x: list[jax.Array], y: list[jax.Array], contract: tuple[int, int]) -> jax.Array:
    """The float32 product of two matrices given in parts, over the axes `contract`, without products of low parts."""
    if y[0].shape[0] == 1:  # one row, which Mosaic does not multiply matrices of bfloat16 with
        a, b = (functools.reduce(jnp.add, [part.astype(jnp.float32) for part in reversed(parts)]) for parts in (x, y))
        return jnp.sum(a * b, axis=1, keepdims=True) if contract == (1, 1) else a * b
    precision = lax.Precision.HIGHEST if x[0].dtype == jnp.float32 else lax.Precision.DEFAULT
    terms = [
        lax.dot_general(u, v, (((contract[0],), (contract[1],)), ((), ())), precision, jnp.float32)
        for i, u in enumerate(x)
        for j, v in enumerate(y)
        if i + j < max(len(x), len(y))
    ]
    return functools.reduce(jnp.add, reversed(terms))  # small terms first


def readout(x_dtype, directions, centre=None, offset=None, scale=None):
    """The arrays that stay in VMEM: the directions' parts, `[2, E]` offset and scale, and the centre `[1, D]` or None."""
    E = directions.shape[0]
    directions = directions.astype(jnp.float32) if x_dtype == jnp.float32 else directions
    offset = jnp.zeros(E) if offset is None else offset
    scale = jnp.ones(E) if scale is None else scale
    return {
        "parts": split(directions, 0 if x_dtype == jnp.float32 else 2),
        "affine": jnp.stack([offset, scale]).astype(jnp.float32),
        "centre": None if centre is None else centre.astype(jnp.float32)[None],
    }


def score(x: jax.Array, arrays, cosine: bool) -> jax.Array:
    """`[t, E]` scores of a tile `[t, D]`, by `readout`'s arrays as the kernel holds them."""
    parts = 0 if x.dtype == jnp.float32 else 3 if len(arrays["parts"]) == 1 else 2
    y = x if arrays["centre"] is None else x.astype(jnp.float32) - arrays["centre"][...]
    s = product(split(y, parts, round_inside), [part[...] for part in arrays["parts"]], (1, 1))
    if cosine:
        s = s * inverse(jnp.sum(jnp.square(y.astype(jnp.float32)), axis=-1, keepdims=True))
    return (s - arrays["affine"][0:1]) * arrays["affine"][1:2]


def resident(arrays):
    """Block specs for arrays that every program of the grid sees whole, fetched once."""
    return jax.tree.map(
        lambda array: pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim, pipeline_mode=pl.Buffered(1)), arrays
    )


def params(parallel: int, sequential: int = 0) -> pltpu.CompilerParams:
    """For a grid whose first axes may run in any order and whose last ones may not."""
    figures = choice.device(choice.device_kind("tpu"))
    return pltpu.CompilerParams(
        dimension_semantics=(pltpu.PARALLEL,) * parallel + (pltpu.ARBITRARY,) * sequential,
        vmem_limit_bytes=int(0.9 * figures.on_chip) if figures else None,
    )


def passes(x_dtype, arrays) -> int:
    """How many products of bfloat16 numbers one product of `score` is."""
    if x_dtype == jnp.float32:
        return 6
    return len(arrays["parts"]) if arrays["centre"] is None else 3


def estimate(products: int, operands, outputs) -> pl.CostEstimate:
    """What a kernel costs that moves each operand and output once and makes so many products, for XLA's scheduler."""
    moved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((operands, outputs)))
    return pl.CostEstimate(flops=2 * products, bytes_accessed=moved, transcendentals=0)


def out_type(shape, dtype, x, *operands) -> jax.ShapeDtypeStruct:
    """The type of an output, which varies over the mesh axes that any operand varies over (inside `shard_map`)."""
    kind = jax.typeof(x).manual_axis_type
    varying = kind.varying.union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(operands)))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind.update(varying=varying))


def project(x, directions, centre, offset, scale, *, cosine, tile, interpret):
    E, D = directions.shape
    shape = x.shape[:-1]
    x = x.reshape(-1, D)
    N = x.shape[0]
    arrays = readout(x.dtype, directions, centre, offset, scale)

    def kernel(x_ref, arrays, out_ref):
        out_ref[...] = score(x_ref[...], arrays, cosine)

    out = out_type((N, E), jnp.float32, x, arrays)
    return pl.pallas_call(
        kernel,
        out,
        grid=(pl.cdiv(N, tile),),
        in_specs=[pl.BlockSpec((tile, D), lambda i: (i, 0)), resident(arrays)],
        out_specs=pl.BlockSpec((tile, E), lambda i: (i, 0)),
        compiler_params=params(1),
        cost_estimate=estimate(N * E * D * passes(x.dtype, arrays), (x, arrays), out),
        interpret=interpret,
        name="project",
    )(x, arrays).reshape(*shape, E)
