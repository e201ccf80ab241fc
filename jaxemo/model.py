"""The transformer: one layer function, one forward pass. Read it from top to bottom.

A forward pass takes three trees of arrays: weights, interventions (what to add, remove or clamp) and probes (what to
measure); see `steering` and `capture`. Nothing about an experiment is compiled in. Sequences are right-padded and
attention is causal, so padding never reaches a real token; position and cache slot of a token are the same number.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxemo import capture, steering
from jaxemo import params as params_lib
from jaxemo.config import ModelConfig

MASKED = -1e30  # a finite stand-in for -inf: a row whose keys are all masked stays free of NaN


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens so far: `[L, B, S, K, H]`, or tuples of L `[B, S, K, H]` for separate layers."""

    k: Any
    v: Any


def init_cache(config: ModelConfig, rows: int, positions: int, dtype, stacked: bool) -> Cache:
    """An empty cache for `rows` sequences of up to `positions` tokens."""
    shape = (rows, positions, config.n_kv_heads, config.head_dim)
    if stacked:
        return Cache(*(jnp.zeros((config.n_layers, *shape), dtype) for _ in "kv"))
    return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers)) for _ in "kv"))


def einsum(spec: str, x: jax.Array, w: jax.Array, out=None) -> jax.Array:
    """A matrix product in the type of its operands; float32 means float32 on every device, not TF32 or bfloat16."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(spec, x, w, precision=precision, preferred_element_type=out or x.dtype)


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, in float32 (Zhang and Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * gain.astype(jnp.float32)).astype(x.dtype)


def rope_angles(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[B, T, 1, H/2]` of the rotary angles at absolute `positions [B, T]` (Su et al. 2021)."""
    frequency = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + H/2) of `x [B, T, heads, H]`."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(config: ModelConfig, weights, x, rotation, past, start):
    """Causal grouped-query attention of `x [B, T, D]` over itself and over `past`, the cached keys and values.

    `past` is None or a pair `[B, S, K, H]` of which row b's first `start[b]` positions count. Returns the output
    `[B, T, D]` and the new keys and values `[B, T, K, H]`.
    """
    B, T, _ = x.shape
    K, G, H = config.n_kv_heads, config.n_heads // config.n_kv_heads, config.head_dim
    q = rotate(einsum("btd,dnh->btnh", x, weights["wq"]), *rotation).reshape(B, T, K, G, H)
    k = rotate(einsum("btd,dkh->btkh", x, weights["wk"]), *rotation)
    v = einsum("btd,dkh->btkh", x, weights["wv"])

    logits = einsum("btkgh,bskh->bkgts", q, k, jnp.float32) * H**-0.5
    logits = jnp.where(jnp.tril(jnp.ones((T, T), bool)), logits, MASKED)
    if past is None:
        mixed = einsum("bkgts,bskh->btkgh", jax.nn.softmax(logits).astype(v.dtype), v)
    else:
        past_k, past_v = past
        S = past_k.shape[1]
        seen = jnp.arange(S) < start[:, None, None, None, None]
        past_logits = jnp.where(seen, einsum("btkgh,bskh->bkgts", q, past_k, jnp.float32) * H**-0.5, MASKED)
        p = jax.nn.softmax(jnp.concatenate([past_logits, logits], axis=-1)).astype(v.dtype)
        mixed = einsum("bkgts,bskh->btkgh", p[..., :S], past_v) + einsum("bkgts,bskh->btkgh", p[..., S:], v)
    return einsum("btnh,nhd->btd", mixed.reshape(B, T, K * G, H), weights["wo"]), (k, v)


def mlp(weights, x):
    """SwiGLU feed-forward (Shazeer 2020)."""
    return einsum("btf,fd->btd", jax.nn.silu(einsum("btd,df->btf", x, weights["w_gate"])) *
                  einsum("btd,df->btf", x, weights["w_up"]), weights["w_down"])  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)  # traced once for all layers when they are separate
def layer(config: ModelConfig, weights, x, rotation, past, start):
    """One pre-norm block. Returns what it adds to the residual stream, by attention and by MLP, and its keys/values."""
    attn_out, kv = attention(config, weights, rms_norm(x, weights["attn_norm"], config.norm_eps), rotation, past, start)
    mlp_out = mlp(weights, rms_norm(x + attn_out, weights["mlp_norm"], config.norm_eps))
    return attn_out, mlp_out, kv


def write_cache(cache: Cache, index, kv, start) -> Cache:
    """Put new keys and values `[B, T, K, H]` of layer `index` at each row's own positions `start[b] ...`."""

    def put(rows, new):
        return jax.vmap(lambda row, new, at: lax.dynamic_update_slice(row, new, (at, 0, 0)))(rows, new, start)

    def put_stacked(cached, new):
        def at_row(row, new, at):
            return lax.dynamic_update_slice(row, new[None], (index, at, 0, 0))

        return jax.vmap(at_row, in_axes=(1, 0, 0), out_axes=1)(cached, new, start)

    if not isinstance(cache.k, tuple):
        return Cache(put_stacked(cache.k, kv[0]), put_stacked(cache.v, kv[1]))
    k, v = list(cache.k), list(cache.v)
    k[index], v[index] = put(k[index], kv[0]), put(v[index], kv[1])
    return Cache(tuple(k), tuple(v))


def forward(
    config: ModelConfig,
    params: params_lib.Params,
    tokens: jax.Array,
    start: jax.Array | None = None,
    cache: Cache | None = None,
    interventions: steering.Interventions | None = None,
    probes: capture.Probes | None = None,
) -> tuple[jax.Array, Any, Any]:
    """Run `tokens [B, T]` through all layers; `unembed` turns the returned residual stream into logits.

    Without `start`, row b's tokens begin at position 0 and a `cache`, if given, is filled. With `start [B]`, they
    begin at position `start[b]` and attend to the cache below it. Returns the residual stream after the last layer
    `[B, T, D]`, the cache, and what `probes` asked for (a `Captured`); None for what was not given.
    """
    fresh = start is None
    if cache is None and not fresh:
        raise ValueError("tokens that start later than position 0 need a cache of what came before")
    B, T = tokens.shape
    begin = jnp.zeros(B, jnp.int32) if start is None else start
    positions = begin[:, None] + jnp.arange(T)
    rotation = rope_angles(config, positions)

    def block(carry, inputs):
        x, cache, captured = carry
        index, weights, intervention, probe = inputs
        past = None if fresh else (cache.k[index], cache.v[index])
        attn_out, mlp_out, kv = layer(config, weights, x, rotation, past, begin)
        after = x + attn_out + mlp_out
        steered = after if interventions is None else steering.apply(interventions, intervention, after, positions)
        if probes is not None:
            sites = {
                "resid_pre": x,
                "attn_out": attn_out,
                "mlp_out": mlp_out,
                "resid_post": steered,
                "unsteered": after,
            }
            captured = capture.collect(probes, probe, captured, sites, positions)
        if cache is not None:
            cache = write_cache(cache, index, kv, begin)
        return (steered, cache, captured), None

    x = params["embed"][tokens]
    captured = None if probes is None else capture.init(config, probes, x)
    per_layer = (
        None if interventions is None else interventions.layers,
        None if probes is None else probes.layers,
    )
    carry = (x, cache, captured)
    if params_lib.is_stacked(params):
        carry, _ = lax.scan(block, carry, (jnp.arange(config.n_layers), params["layers"], *per_layer))
    else:
        for i, weights in enumerate(params["layers"]):
            carry, _ = block(carry, (i, weights, *jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)))
    return carry


def unembed(config: ModelConfig, params: params_lib.Params, x: jax.Array) -> jax.Array:
    """Logits, float32 `[..., V]`, of a residual stream `x [..., D]` (also the logit lens)."""
    x = rms_norm(x, params["final_norm"], config.norm_eps)
    return einsum("...d,vd->...v", x, params["embed" if config.tie_embeddings else "unembed"], jnp.float32)
