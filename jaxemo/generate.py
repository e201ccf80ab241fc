"""The decode loop: KV cache, sampling, steering and readout inside one compiled program.

`prefill` reads the prompts and samples each row's first token; `decode` runs until every row has stopped or a limit
is reached, and can be called again to go on (to show text as it comes). Shapes are fixed by the padded prompt length
and the room for new tokens; everything else is a value.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxemo import capture, model, steering
from jaxemo import params as params_lib
from jaxemo.config import ModelConfig


@flax.struct.dataclass
class Sampling:
    """How each row's tokens are drawn; arrays of length B, so that rows may differ.

    Filters apply in this order: temperature, top-k, top-p, min-p. `temperature` 0 is greedy, `top_k` 0, `top_p` 1 and
    `min_p` 0 keep every token. A draw depends on the row's `key` and the token's position, not on the other rows.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    key: jax.Array


@flax.struct.dataclass
class State:
    """Everything the loop carries. N is the room for new tokens."""

    step: jax.Array  # [] tokens written so far
    token: jax.Array  # [B] sampled, not yet written or read
    logprob: jax.Array  # [B] its log-probability at temperature 1
    position: jax.Array  # [B] its absolute position
    done: jax.Array  # [B]
    tokens: jax.Array  # [B, N]
    logprobs: jax.Array  # [B, N]
    lengths: jax.Array  # [B] tokens before the stop token
    whole: jax.Array  # [B] how long the row can get: its prompt and all that may be asked for
    scores: Any  # [B, N, E], or None where nothing is read
    cache: model.Cache


def filter_logits(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """`logits [B, V]` with the tokens that top-k, top-p (nucleus) and min-p leave out set to -inf. Ties are kept."""
    V = logits.shape[-1]
    ranked = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(V)
    kept = rank < jnp.where(top_k > 0, top_k, V)[:, None]
    p = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    kept &= jnp.cumsum(p, axis=-1) - p < top_p[:, None]
    kept &= p >= min_p[:, None] * p[:, :1]
    kept |= rank == 0
    lowest = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def sample(logits: jax.Array, sampling: Sampling, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next token `[B]` and its log-probability under `logits [B, V]` (before temperature and filters)."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw():
        scaled = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
        filtered = lax.cond(
            ((sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)).any(),
            lambda: filter_logits(scaled, sampling.top_k, sampling.top_p, sampling.min_p),
            lambda: scaled,
        )
        keys = jax.vmap(jax.random.fold_in)(sampling.key, position)
        drawn = jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, greedy)

    token = lax.cond((sampling.temperature > 0).any(), draw, lambda: greedy)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "room"))
def prefill(
    config: ModelConfig,
    params: params_lib.Params,
    ids: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    interventions: steering.Interventions | None,
    probes: capture.Probes | None,
    new_tokens: jax.Array,
    room: int,
) -> State:
    """Read prompts `ids [B, T]` and sample the first token; the cache gets T + `room` positions.

    `new_tokens [] <= room` is how many will be asked for at most.
    """
    B, T = ids.shape
    cache = model.init_cache(config, B, T + room, params["embed"].dtype, params_lib.is_stacked(params))
    whole = lengths + new_tokens
    x, cache, _ = model.forward(config, params, ids, cache=cache, interventions=interventions, lengths=whole)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    token, logprob = sample(model.unembed(config, params, last), sampling, lengths)
    scores = None if probes is None else jnp.zeros((B, room, probes.layers.directions.shape[1]), jnp.float32)
    return State(
        step=jnp.int32(0),
        token=token,
        logprob=logprob,
        position=lengths,
        done=jnp.zeros(B, bool),
        tokens=jnp.zeros((B, room), jnp.int32),
        logprobs=jnp.zeros((B, room), jnp.float32),
        lengths=jnp.zeros(B, jnp.int32),
        whole=whole,
        scores=scores,
        cache=cache,
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(
    config: ModelConfig,
    params: params_lib.Params,
    state: State,
    sampling: Sampling,
    stop: jax.Array,
    limit: jax.Array,
    interventions: steering.Interventions | None,
    probes: capture.Probes | None,
) -> State:
    """Write tokens until step `limit` or until every row is done. `stop [n]` holds the token ids that end a row.

    Each token is fed through the model once; from that pass come the next token and, through `probes` (the scores of
    one layer), its own scores. The stop token is not written.
    """

    def step(s: State) -> State:
        done = s.done | (s.token[:, None] == stop).any(-1)
        x, cache, captured = model.forward(
            config, params, s.token[:, None], s.position, s.cache, interventions, probes, s.whole
        )
        token, logprob = sample(model.unembed(config, params, x[:, 0]), sampling, s.position + 1)
        scores = s.scores
        if captured is not None:
            read = jnp.where(done[:, None], 0, captured.scores["resid_post"][0, :, 0])
            scores = scores.at[:, s.step].set(read)
        return State(
            step=s.step + 1,
            token=jnp.where(done, s.token, token),
            logprob=logprob,
            position=jnp.where(done, s.position, s.position + 1),
            done=done,
            tokens=s.tokens.at[:, s.step].set(jnp.where(done, 0, s.token)),
            logprobs=s.logprobs.at[:, s.step].set(jnp.where(done, 0, s.logprob)),
            lengths=s.lengths + ~done,
            whole=s.whole,
            scores=scores,
            cache=cache,
        )

    return lax.while_loop(lambda s: (s.step < limit) & ~s.done.all(), step, state)
