"""The transformer: one layer function, one forward pass. Read it from top to bottom.

A forward pass takes three trees of arrays: weights, interventions (what to add, remove or clamp) and probes (what to
measure); see `steering` and `capture`. Nothing about an experiment is compiled in. Every model family is this one
program: `config` holds its constants, and a norm, a bias or a gate is applied where the weights have one (see
`params.describe`). Sequences are right-padded and attention is causal, so padding never reaches a real token; position
and cache slot of a token are the same number.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxemo import capture, steering
from jaxemo import params as params_lib
from jaxemo.config import ModelConfig, Rope
from jaxemo.quantise import full

MASKED = -1e30  # a finite stand-in for -inf: a row whose keys are all masked stays free of NaN
CHUNK = 256  # keys that are attended to at once; a cache is read no further than it is filled, in such steps


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens so far, laid out as a decode step reads them.

    `k [L, B, K, H, S]` and `v [L, B, K, S, H]`, or tuples of L arrays without the leading axis for separate layers.
    """

    k: Any
    v: Any


def init_cache(config: ModelConfig, rows: int, positions: int, dtype, stacked: bool) -> Cache:
    """An empty cache for `rows` sequences of up to `positions` tokens."""
    K, H, L = config.n_kv_heads, config.head_dim, config.n_layers
    S = positions if positions <= CHUNK else -(-positions // CHUNK) * CHUNK
    shapes = (rows, K, H, S), (rows, K, S, H)
    if stacked:
        return Cache(*(jnp.zeros((L, *shape), dtype) for shape in shapes))
    return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(L)) for shape in shapes))


def einsum(spec: str, x: jax.Array, w: jax.Array, out=None) -> jax.Array:
    """A matrix product in the type of `x`; float32 means float32 on every device, not TF32 or bfloat16."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(spec, x, full(w, x.dtype), precision=precision, preferred_element_type=out or x.dtype)


def project(spec: str, x: jax.Array, weights, name: str) -> jax.Array:
    """`x` times the weight `name`, plus its bias where it has one."""
    y = einsum(spec, x, weights[name])
    return y + weights[f"{name}_bias"].astype(y.dtype) if f"{name}_bias" in weights else y


def norm(config: ModelConfig, x: jax.Array, weights, name: str) -> jax.Array:
    """The norm `name` over as many last axes as its gain has, in float32; x itself where the model has no such norm.

    RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba, Kiros and Hinton 2016).
    """
    if name not in weights:
        return x
    axes = tuple(range(-weights[name].ndim, 0))
    x32 = x.astype(jnp.float32)
    if config.norm == "layer":
        x32 = x32 - jnp.mean(x32, axes, keepdims=True)
    y = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axes, keepdims=True) + config.norm_eps) * weights[name]
    return (y + weights[f"{name}_bias"] if f"{name}_bias" in weights else y).astype(x.dtype)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    return cap * jnp.tanh(x / cap) if cap else x


def rope_angles(rope: Rope | None, dim: int, positions: jax.Array, lengths: jax.Array) -> jax.Array:
    """Cosine and sine `[2, B, T, 1, R/2]` at absolute `positions [B, T]`, for rows of `lengths [B]`; see `Rope`."""
    if rope is None:
        angle = jnp.zeros((*positions.shape, 1, dim // 2), jnp.float32)
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    exponent = np.arange(0, dim, 2) / dim
    if rope.dynamic != 1:
        beyond = jnp.maximum(lengths, rope.original)[:, None, None, None] / rope.original
        growth = (rope.dynamic * beyond - (rope.dynamic - 1)) ** (dim / (dim - 2))
        frequency = (rope.theta * growth) ** -jnp.asarray(exponent, jnp.float32)
    else:
        frequency = jnp.asarray(rope.theta**-exponent / rope.factors, jnp.float32)
    if rope.long_factors:
        longer = jnp.asarray(rope.theta**-exponent / rope.long_factors, jnp.float32)
        frequency = jnp.where((lengths > rope.original)[:, None, None, None], longer, frequency)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)]) * rope.scale


def rotate(x: jax.Array, rotation: jax.Array | None) -> jax.Array:
    """Rotate the pairs (i, i + R/2) of the first R dimensions of `x [B, T, heads, H]`."""
    if rotation is None:
        return x
    cos, sin = rotation
    half = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def attention(config: ModelConfig, weights, x, positions, rotation, window, cache, index, fresh: bool):
    """Causal grouped-query attention of `x [B, T, D]` over itself, if `fresh`, or over all that `cache` holds up to each token.

    `cache` is None, a Cache of all layers of which this is number `index`, or this layer's alone (`index` None). `window` is None
    or how many tokens back a token sees. Returns the output `[B, T, D]` and the cache with the new keys and values.

    Keys are taken a chunk at a time, and the softmax is that of all by keeping the largest logit so far (Milakov and
    Gimelshein 2018): a chunk in which a token sees nothing changes no bit of its result.
    """
    B, T, _ = x.shape
    K, G, H = config.n_kv_heads, config.n_heads // config.n_kv_heads, config.head_dim
    q = rotate(norm(config, project("btd,dnh->btnh", x, weights, "wq"), weights, "q_norm"), rotation)
    k = rotate(norm(config, project("btd,dkh->btkh", x, weights, "wk"), weights, "k_norm"), rotation)
    q = jnp.moveaxis(q.reshape(B, T, K, G, H), 1, 3).reshape(B, K, G * T, H)  # all that read the same keys
    position = jnp.tile(positions, (1, G))[:, None, :, None]  # theirs, [B, 1, G * T, 1]
    keys = Cache(jnp.moveaxis(k, 1, 3), jnp.swapaxes(project("btd,dkh->btkh", x, weights, "wv"), 1, 2))
    if cache is not None:
        cache = write_cache(cache, index, keys, positions[:, 0])
    if not fresh:
        keys = cache
    S = keys.v.shape[-2]
    size = min(S, CHUNK)
    if fresh:
        index, beyond = None, (0, -S % size)  # what is added lies after every token
        keys = Cache(jnp.pad(keys.k, [(0, 0)] * 3 + [beyond]), jnp.pad(keys.v, [(0, 0)] * 2 + [beyond, (0, 0)]))

    def chunk(number, carry):
        largest, total, mixed = carry
        key, value = read_cache(keys, index, number * size, size)
        at = number * size + jnp.arange(size)
        seen = at <= position
        if window is not None:
            seen &= position - at < window
        logits = einsum("bkqh,bkhs->bkqs", q, key, jnp.float32) * (config.attn_scale or H**-0.5)
        logits = jnp.where(seen, softcap(logits, config.attn_softcap), MASKED)
        new = jnp.maximum(largest, logits.max(-1))
        kept, p = jnp.exp(largest - new), jnp.exp(logits - new[..., None])
        share = einsum("bkqs,bksh->bkqh", p.astype(value.dtype), value, jnp.float32)
        return new, total * kept + p.sum(-1), mixed * kept[..., None] + share

    largest, total = jnp.full((B, K, G * T), MASKED), jnp.zeros((B, K, G * T))
    if config.attn_sinks:  # they take a share of the softmax and have no values to mix
        largest = jnp.broadcast_to(jnp.repeat(weights["sinks"].reshape(K, G), T, axis=1), total.shape)
        total = total + 1.0
    carry = (largest, total, jnp.zeros((B, K, G * T, H)))
    if keys.v.shape[-2] == size:
        carry = chunk(0, carry)
    else:
        first, end = 0, keys.v.shape[-2] // size
        if not fresh:
            first = 0 if window is None else jnp.maximum(positions.min() - window + 1, 0) // size
            end = positions.max() // size + 1
        carry = lax.fori_loop(first, end, chunk, carry)
    mixed = (carry[2] / carry[1][..., None]).astype(x.dtype)
    mixed = jnp.moveaxis(mixed.reshape(B, K, G, T, H), 3, 1).reshape(B, T, K * G, H)
    # einsum sums in alphabetical order of its letters: that of the weight in memory saves copying it
    return project("btno,nod->btd", mixed, weights, "wo"), cache


def read_cache(cache: Cache, index, start, size: int):
    """`size` keys `[B, K, H, size]` and values `[B, K, size, H]` from position `start` on, of layer `index` if it holds several."""

    def part(array, axis):
        starts, sizes = [0] * array.ndim, list(array.shape)
        starts[axis], sizes[axis] = start, size
        if index is None:
            return lax.dynamic_slice(array, starts, sizes)
        starts[0], sizes[0] = index, 1
        return lax.dynamic_slice(array, starts, sizes)[0]

    return part(cache.k, -1), part(cache.v, -2)


def write_cache(cache: Cache, index, new: Cache, start) -> Cache:
    """Put `new` keys `[B, K, H, T]` and values `[B, K, T, H]` at each row's own positions `start[b] ...` (`index` as above)."""

    def put(whole, new, axis):
        def row(whole, new, at):
            starts = [0] * whole.ndim
            starts[axis] = at
            if index is None:
                return lax.dynamic_update_slice(whole, new, starts)
            starts[0] = index
            return lax.dynamic_update_slice(whole, new[None], starts)

        rows = 0 if index is None else 1
        return jax.vmap(row, (rows, 0, 0), rows)(whole, new, start)

    return Cache(put(cache.k, new.k, -1), put(cache.v, new.v, -2))


# How an MLP's hidden units are made from its one or two projections.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def mlp(config: ModelConfig, weights, x, matmul=project):
    """Feed-forward network, gated (Shazeer 2020) or plain. `matmul` multiplies with a weight and adds its bias."""
    activation = ACTIVATIONS[config.activation]
    up = matmul("...d,df->...f", x, weights, "w_up")
    if not config.gated:
        return matmul("...f,fd->...d", activation(up), weights, "w_down")
    gate = matmul("...d,df->...f", x, weights, "w_gate")
    if config.glu_limit:
        gate, up = jnp.minimum(gate, config.glu_limit), jnp.clip(up, -config.glu_limit, config.glu_limit) + 1
    return matmul("...f,fd->...d", activation(gate) * up, weights, "w_down")


def experts(config: ModelConfig, weights, x):
    """Mixture of experts: each token goes through the `n_active` MLPs its router scores highest; none is dropped.

    The pairs of token and expert are sorted by expert, so that each expert's tokens lie together.
    """
    B, T, D = x.shape
    flat = x.reshape(B * T, D)
    p = jax.nn.softmax(project("nd,dx->nx", flat.astype(jnp.float32), weights, "router"))
    p, chosen = lax.top_k(p, config.n_active)
    if config.normalise_router:
        p = p / p.sum(-1, keepdims=True)
    order = jnp.argsort(chosen.reshape(-1))
    token, expert = order // config.n_active, chosen.reshape(-1)[order]
    matmul = functools.partial(grouped, expert, jnp.bincount(expert, length=config.n_experts))
    out = mlp(config, weights, flat[token], matmul)
    out = out.astype(jnp.float32) * p.reshape(-1)[order, None]
    return jnp.zeros((B * T, D), jnp.float32).at[token].add(out).astype(x.dtype).reshape(B, T, D)


def grouped(expert, counts, _spec, x, weights, name):
    """Row i of `x [n, in]` times the matrix `[X, in, out][expert[i]]`; `expert [n]` is sorted, `counts [X]` its counts."""
    w, precision = (
        full(weights[name], x.dtype),
        lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT,
    )

    def blocks(x, w):  # XLA:CPU would multiply every row with every expert
        n, X, b = len(x), len(counts), 32
        ends = jnp.cumsum(counts)
        first = jnp.cumsum(-(-counts // b)) - (-(-counts // b))  # each expert's first block
        block = jnp.arange(n // b + min(n, X))
        which = jnp.minimum(jnp.searchsorted(first, block, side="right") - 1, X - 1)
        rows = (ends - counts)[which][:, None] + (block - first[which])[:, None] * b + jnp.arange(b)
        rows = jnp.where(rows < ends[which][:, None], rows, n)  # n: no row

        def one(_, inputs):
            rows, which = inputs
            return None, jnp.dot(x.at[rows].get(mode="fill", fill_value=0), w[which], precision=precision)

        _, y = lax.scan(one, None, (rows, which))
        return jnp.zeros((n, w.shape[-1]), x.dtype).at[rows].set(y, mode="drop")

    y = lax.platform_dependent(
        x, w, cpu=blocks, default=lambda x, w: lax.ragged_dot(x, w, counts.astype(jnp.int32), precision=precision)
    )
    return y + weights[f"{name}_bias"][expert].astype(y.dtype) if f"{name}_bias" in weights else y


@functools.partial(jax.jit, static_argnames=("config", "fresh"))  # traced once for all layers when they are separate
def layer(config: ModelConfig, weights, x, positions, rotation, window, cache, index, fresh: bool):
    """One block. Returns what it adds to the residual stream, by attention and by MLP, and the cache (see `attention`)."""
    attn_in = norm(config, x, weights, "attn_norm")
    attn_out, cache = attention(config, weights, attn_in, positions, rotation, window, cache, index, fresh)
    attn_out = norm(config, attn_out, weights, "attn_post_norm") * config.residual_scale
    mlp_in = norm(config, x if config.parallel else x + attn_out, weights, "mlp_norm")
    mlp_out = (experts if config.n_experts else mlp)(config, weights, mlp_in)
    return attn_out, norm(config, mlp_out, weights, "mlp_post_norm") * config.residual_scale, cache


def forward(
    config: ModelConfig,
    params: params_lib.Params,
    tokens: jax.Array,
    start: jax.Array | None = None,
    cache: Cache | None = None,
    interventions: steering.Interventions | None = None,
    probes: capture.Probes | None = None,
    lengths: jax.Array | None = None,
    layers: tuple[int, int] | None = None,
) -> tuple[jax.Array, Any, Any]:
    """Run `tokens [B, T]` through all layers; `unembed` turns the returned residual stream into logits.

    With `layers` (first, last), only through those from the first to before the last; in place of tokens then stands the residual
    stream `[B, T, D]` that the first reads, if that is not 0.

    Without `start`, row b's tokens begin at position 0 and a `cache`, if given, is filled. With `start [B]`, they
    begin at position `start[b]` and attend to the cache below it. `lengths [B]` are the rows' whole lengths, with what
    may still be generated, which some rotary embeddings depend on (see `Rope`); by default the room there is. Returns the
    residual stream after the last layer `[B, T, D]`, the cache, and what `probes` asked for (a `Captured`); None for
    what was not given.
    """
    fresh, stacked = start is None, params_lib.is_stacked(params)
    if cache is None and not fresh:
        raise ValueError("tokens that start later than position 0 need a cache of what came before")
    B, T = tokens.shape[:2]
    begin = jnp.zeros(B, jnp.int32) if start is None else start
    positions = begin[:, None] + jnp.arange(T)
    if lengths is None:
        lengths = jnp.full(B, T if cache is None else jax.tree.leaves(cache)[0].shape[-1])
    kinds, pattern = config.attention, np.array(config.pattern or [0] * config.n_layers)
    dim = next((kind.rope.dim for kind in kinds if kind.rope), 0)
    rotations = jnp.stack([rope_angles(kind.rope, dim, positions, lengths) for kind in kinds]) if dim else None
    windows = np.array([kind.window or np.iinfo(np.int32).max for kind in kinds], np.int32)
    windowed = any(kind.window for kind in kinds)

    def block(carry, inputs):
        x, cache, captured = carry
        index, kind, weights, intervention, probe = inputs
        rotation, window = rotations[kind] if dim else None, jnp.asarray(windows)[kind] if windowed else None
        own, number = (cache, index) if stacked or cache is None else (Cache(cache.k[index], cache.v[index]), None)
        attn_out, mlp_out, own = layer(config, weights, x, positions, rotation, window, own, number, fresh)
        after = x + attn_out + mlp_out
        steered, scores = after, None
        if interventions is not None:
            scored = None if probes is None else capture.projected(probes, probe)
            steered, scores = steering.apply(interventions, intervention, after, begin, scored)
        if probes is not None:
            sites = {
                "resid_pre": x,
                "attn_out": attn_out,
                "mlp_out": mlp_out,
                "resid_post": steered,
                "unsteered": after,
            }
            captured = capture.collect(probes, probe, captured, sites, positions, scores)
        if cache is not None and not stacked:
            own = Cache(
                *((*whole[:index], part, *whole[index + 1 :]) for whole, part in ((cache.k, own.k), (cache.v, own.v)))
            )
        return (steered, own, captured), None

    first, last = layers or (0, config.n_layers)
    x = tokens if first else embed(config, params, tokens, positions)
    captured = None if probes is None else capture.init(config, probes, x)
    per_layer = (
        None if interventions is None else interventions.layers,
        None if probes is None else probes.layers,
    )
    carry = (x, cache, captured)
    if stacked:
        every = jnp.arange(config.n_layers), jnp.asarray(pattern), params["layers"], *per_layer

        def pick(carry, i):  # a slice of the stacked weights would be a copy of them
            return block(carry, jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), every))

        carry, _ = lax.scan(block, carry, every) if layers is None else lax.scan(pick, carry, jnp.arange(first, last))
    else:
        for i in range(first, last):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)
            carry, _ = block(carry, (i, pattern[i], params["layers"][i], *own))
    return carry


def embed(config: ModelConfig, params: params_lib.Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """The residual stream before the first layer, `[B, T, D]`."""
    x = params["embed"][tokens] * config.embed_scale
    return x + params["pos_embed"][positions] if config.learned_positions else x


def unembed(config: ModelConfig, params: params_lib.Params, x: jax.Array) -> jax.Array:
    """Logits, float32 `[..., V]`, of a residual stream `x [..., D]` (also the logit lens)."""
    x = norm(config, x, params, "final_norm")
    logits = einsum("...d,vd->...v", x, params["embed" if config.tie_embeddings else "unembed"], jnp.float32)
    if "unembed_bias" in params:
        logits = logits + params["unembed_bias"].astype(jnp.float32)
    return softcap(logits * config.logit_scale, config.logit_softcap)
