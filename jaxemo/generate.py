"""The decode loop: KV cache, sampling, steering and readout inside one compiled program.

`prefill` reads prompts, `begin` samples each row's first token, and `decode` goes on until every row is done or a number of
steps is made; it can be called again (to show text as it comes). Rows that are done can give their place to rows that wait,
inside the loop. Shapes are fixed by the padded prompt length and the room for new tokens; everything else is a value.
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
    """What the loop carries of B rows; N is the room for new tokens. A row depends on nothing of the others."""

    job: jax.Array  # [B] a number that tells the row from others, wherever it goes
    token: jax.Array  # [B] the last one written, not yet read
    prompt: jax.Array  # [B] tokens of the prompt
    most: jax.Array  # [B] tokens that may be written
    lengths: jax.Array  # [B] tokens that are written
    done: jax.Array  # [B]
    tokens: jax.Array  # [B, N]
    logprobs: jax.Array  # [B, N]
    scores: Any  # [B, N, E], or None where nothing is read
    sampling: Sampling
    interventions: Any  # without what all rows share
    cache: model.Cache


def filter_logits(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """`logits [B, V]` with the tokens that top-k, top-p (nucleus) and min-p leave out set to -inf. Ties are kept."""
    V = logits.shape[-1]

    def largest_k():
        return ~above(logits, jnp.ones_like(logits), jnp.where(top_k > 0, top_k, V).astype(logits.dtype))

    kept = lax.cond((top_k > 0).any(), largest_k, lambda: jnp.ones(logits.shape, bool))
    p = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    most = p.max(-1, keepdims=True)
    kept &= ~above(p, p, jnp.where(top_p < 1, top_p, jnp.inf)) & (p >= min_p[:, None] * most) | (p == most)
    return jnp.where(kept, logits, -jnp.inf)


def above(x: jax.Array, weight: jax.Array, limit: jax.Array) -> jax.Array:
    """Which of `x [B, V]` have that much of their row's `weight` in larger ones that it reaches `limit [B]`.

    That is, which rank too low, found without sorting: by halving the range of floats, taken as whole numbers, in 32 steps.
    """
    bits = lax.bitcast_convert_type(x + 0.0, jnp.int32)  # -0 is 0
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    def halve(_, bounds):  # the least number that keeps below the limit is in (low, high]
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        fits = jnp.where(order > middle[:, None], weight, 0).sum(-1) < limit
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    ends = jnp.full(len(x), -(2**31), jnp.int32), jnp.full(len(x), 2**31 - 1, jnp.int32)
    return order < lax.fori_loop(0, 32, halve, ends)[1][:, None]


def largest(logits: jax.Array) -> jax.Array:
    """Where each row of `logits [B, V]` is largest, the first of equals: XLA:CPU's own argmax is ten times as slow."""
    parts = split(logits)
    part = jnp.argmax(parts.max(-1), axis=-1)
    within = jnp.argmax(jnp.take_along_axis(parts, part[:, None, None], axis=1)[:, 0], axis=-1)
    return (part * parts.shape[-1] + within).astype(jnp.int32)


def draw(key: jax.Array, logits: jax.Array) -> jax.Array:
    """A token of each row with the probabilities of `logits [B, V]` and `key [B]`: first a part of them, then one of that
    part, so that few random numbers are made."""
    parts = split(logits)
    first, second = jnp.moveaxis(jax.vmap(jax.random.split)(key), 1, 0)
    part = jax.vmap(jax.random.categorical)(first, jax.nn.logsumexp(parts, axis=-1))
    chosen = jnp.take_along_axis(parts, part[:, None, None], axis=1)[:, 0]
    within = jax.vmap(jax.random.categorical)(second, chosen)
    return (part * parts.shape[-1] + within).astype(jnp.int32)


def split(logits: jax.Array, n: int = 256) -> jax.Array:
    """`logits [B, V]` in parts of `n` tokens, `[B, V / n, n]`; what fills the last is -inf."""
    B, V = logits.shape
    return jnp.pad(logits, ((0, 0), (0, -V % n)), constant_values=-jnp.inf).reshape(B, -1, n)


def sample(logits: jax.Array, sampling: Sampling, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next token `[B]` and its log-probability under `logits [B, V]` (before temperature and filters)."""
    greedy = largest(logits)

    def drawn():
        scaled = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
        filtered = lax.cond(
            ((sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)).any(),
            lambda: filter_logits(scaled, sampling.top_k, sampling.top_p, sampling.min_p),
            lambda: scaled,
        )
        keys = jax.vmap(jax.random.fold_in)(sampling.key, position)
        return jnp.where(sampling.temperature > 0, draw(keys, filtered), greedy)

    token = lax.cond((sampling.temperature > 0).any(), drawn, lambda: greedy)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "positions", "below"))
def prefill_below(
    config: ModelConfig, params: params_lib.Params, ids: jax.Array, whole: jax.Array, positions: int, below: int
) -> tuple[jax.Array, model.Cache]:
    """The residual stream `[B, T, D]` that block `below` reads of prompts `ids [B, T]`, and a cache with the blocks before it."""
    cache = model.init_cache(config, len(ids), positions, params["embed"].dtype, params_lib.is_stacked(params))
    return model.forward(config, params, ids, None, cache, None, None, whole, (0, below))[:2]


@functools.partial(jax.jit, static_argnames=("config", "positions", "below"), donate_argnames="cache")
def prefill(
    config: ModelConfig,
    params: params_lib.Params,
    ids: jax.Array,
    lengths: jax.Array,
    whole: jax.Array,
    interventions: steering.Interventions | None,
    probes: capture.Probes | None,
    positions: int,
    start: jax.Array | None = None,
    cache: model.Cache | None = None,
    below: int = 0,
) -> tuple[jax.Array, model.Cache, Any]:
    """Read prompts `ids [B, T]` into a cache of `positions`, or on from position `start [B]` of the `cache` given. With `below`, from
    that block on: `ids` are then what it reads and the cache what the blocks before it wrote, by `prefill_below`.

    `lengths [B]` are the prompts' whole lengths, `whole [B]` those with all that may be generated. Returns the logits
    `[B, V]` of the next token, the cache, and what `probes` asked for.
    """
    if cache is None:
        cache = model.init_cache(config, len(ids), positions, params["embed"].dtype, params_lib.is_stacked(params))
    layers = (below, config.n_layers) if below else None
    x, cache, captured = model.forward(config, params, ids, start, cache, interventions, probes, whole, layers)
    last = lengths - 1 - (0 if start is None else start)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return model.unembed(config, params, x), cache, captured


@functools.partial(jax.jit, static_argnames="room")
def begin(
    logits: jax.Array,
    cache: model.Cache,
    job: jax.Array,
    prompt: jax.Array,
    most: jax.Array,
    sampling: Sampling,
    stop: jax.Array,
    interventions: steering.Interventions | None,
    probes: capture.Probes | None,
    room: int,
) -> State:
    """The rows whose prompts are in `cache`, each with its first token. `most [B] <= room` is how many it may get."""
    B = len(job)
    none = jnp.zeros(B, jnp.int32)
    scores = None if probes is None else jnp.zeros((B, room, probes.layers.directions.shape[1]), jnp.float32)
    state = State(job, none, prompt, most, none, none > 0, jnp.zeros((B, room), jnp.int32), jnp.zeros((B, room)), scores,
                  sampling, interventions, cache)  # fmt: skip
    return write(state, logits, stop)


def write(s: Any, logits: jax.Array, stop: jax.Array) -> State:
    """Sample each row's next token from `logits [B, V]` and write it, unless it ends the row.

    A row is done when its last token is written or, where it is to be scored, when that has been read.
    """
    token, logprob = sample(logits, s.sampling, s.prompt + s.lengths)
    done = s.done | (token[:, None] == stop).any(-1) | (s.lengths >= s.most)
    row, column = jnp.arange(len(done)), jnp.where(done, s.tokens.shape[1], s.lengths)  # out of bounds: not written
    lengths = s.lengths + ~done
    return s.replace(
        token=jnp.where(done, s.token, token),
        lengths=lengths,
        done=done | (lengths >= s.most) if s.scores is None else done,
        tokens=s.tokens.at[row, column].set(token, mode="drop"),
        logprobs=s.logprobs.at[row, column].set(logprob, mode="drop"),
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("state", "queue"))
def decode(
    config: ModelConfig,
    params: params_lib.Params,
    shared: steering.LayerInterventions | None,
    state: State,
    stop: jax.Array,
    steps: jax.Array,
    probes: capture.Probes | None,
    queue: State | None = None,
    waiting: jax.Array | None = None,
    last: jax.Array | bool = True,
) -> tuple[State, State | None, jax.Array | None]:
    """Make `steps` steps, or fewer where every row is done. `stop [n]` holds the token ids that end a row.

    Each token is fed through the model once; from that pass come the next token and, through `probes` (the scores of
    one layer), its own scores. The stop token is not written. `shared` has the interventions' bank and the layers where it
    acts (see `steering.split`).

    With a `queue` of rows, of which some are `waiting [Q]`, each row that is done changes places with one that waits. Unless
    these are the `last`, the loop then also ends when a place is free and nobody waits.
    """

    def refill(carry):
        state, queue, waiting = carry
        row, at = jnp.argmax(state.done), jnp.argmax(waiting)
        return *exchange(state, row, queue, at), waiting.at[at].set(False)

    def step(carry):
        i, s, queue, waiting = carry
        if queue is not None:
            s, queue, waiting = lax.while_loop(lambda c: c[0].done.any() & c[2].any(), refill, (s, queue, waiting))
        interventions = None if s.interventions is None else steering.join(s.interventions, shared)
        position = jnp.where(s.done, 0, s.prompt + s.lengths - 1)  # a row that is done no longer needs its cache
        x, cache, captured = model.forward(
            config, params, s.token[:, None], position, s.cache, interventions, probes, s.prompt + s.most
        )
        s = s.replace(cache=cache)
        if captured is not None:
            at = jnp.arange(len(s.done)), jnp.where(s.done, s.tokens.shape[1], s.lengths - 1)
            s = s.replace(scores=s.scores.at[at].set(captured.scores["resid_post"][0, :, 0], mode="drop"))
        return i + 1, write(s, model.unembed(config, params, x[:, 0]), stop), queue, waiting

    def more(carry):
        i, s, _, waiting = carry
        busy = ~s.done.all()
        if queue is not None:
            busy = (busy | waiting.any()) & (last | ~s.done.any() | waiting.any())
        return (i < steps) & busy

    return lax.while_loop(more, step, (jnp.int32(0), state, queue, waiting))[1:]


def axes(state: State) -> Any:
    """Along which axis of each leaf the rows lie."""
    cache = jax.tree.map(lambda leaf: leaf.ndim - 4, state.cache)
    found = jax.tree.map(lambda _: 0, state).replace(cache=cache)
    if state.interventions is None:
        return found
    layers = jax.tree.map(lambda _: 1, state.interventions.layers)
    return found.replace(interventions=found.interventions.replace(layers=layers))


def exchange(state: Any, row: jax.Array, queue: Any, at: jax.Array) -> tuple[State, State]:
    """`row` of `state` and row `at` of the `queue` in one another's place. The cache of what leaves is lost."""

    def put(axis, x, i, y, j):
        return lax.dynamic_update_index_in_dim(x, lax.dynamic_index_in_dim(y, j, axis), i, axis)

    where = axes(state)
    filled = jax.tree.map(lambda axis, x, y: put(axis, x, row, y, at), where, state, queue)
    where, state = where.replace(cache=None), state.replace(cache=None)
    left = jax.tree.map(lambda axis, y, x: put(axis, y, at, x, row), where, queue.replace(cache=None), state)
    return filled, left.replace(cache=queue.cache)


@jax.jit
def take(state: State, index: jax.Array) -> State:
    """The rows `index [n]`, in this order; the same one may be among them several times."""
    return jax.tree.map(lambda axis, leaf: jnp.take(leaf, index, axis), axes(state), state)


@functools.partial(jax.jit, static_argnames="below")
def join_cache(lower: model.Cache, upper: model.Cache, below: int) -> model.Cache:
    """The blocks before `below` of one cache and those from there on of the other."""

    def join(a, b):
        return (*a[:below], *b[below:]) if isinstance(a, tuple) else jnp.concatenate([a[:below], b[below:]])

    return model.Cache(join(lower.k, upper.k), join(lower.v, upper.v))


@jax.jit
def take_cache(cache: model.Cache, index: jax.Array) -> model.Cache:
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, leaf.ndim - 4), cache)
