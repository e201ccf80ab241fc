"""LanguageModel: weights, configuration and tokenizer together; the object a user holds."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxemo import capture as capture_lib
from jaxemo import checkpoints, generate, model
from jaxemo import params as params_lib
from jaxemo import steering as steering_lib
from jaxemo import tokens as tokens_lib
from jaxemo.capture import Capture
from jaxemo.config import ModelConfig
from jaxemo.steering import Steering
from jaxemo.tokens import TokenBatch, Tokenizer

SteeringArg = Steering | None | Sequence[Steering | None]


READ = ("projection", "z", "cosine", "centred")


class Directions(Protocol):
    """Named directions to read: `names [E]`, `directions [L, E, D]`, and the layer to read them at by default.

    Reading them as "z" also needs `neutral_mean` and `neutral_std` `[L, E]`.
    """

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def directions(self) -> np.ndarray: ...
    @property
    def layer(self) -> int: ...


@flax.struct.dataclass
class Output:
    """`logits` float32 `[B, T, V]` (`[B, V]` for `logits="last"`, None for None) and what a Capture asked for."""

    logits: Any
    captured: Any  # Captured


@flax.struct.dataclass
class Reading:
    """Scores of texts on named directions.

    `scores [B, T, E]` at one layer or `[L, B, T, E]` at all, 0 on padding; `pooled` the means over each text's tokens or
    the selected ones without attention sinks, `[B, E]` or `[L, B, E]`; `tokens` the text of every token; `names` the
    directions.
    """

    names: tuple[str, ...] = flax.struct.field(pytree_node=False)
    tokens: list[list[str]] = flax.struct.field(pytree_node=False)
    lengths: np.ndarray
    scores: np.ndarray
    pooled: np.ndarray


@flax.struct.dataclass
class Generation:
    """What was generated: `texts`, `tokens [B, N]` (0 after the end), their `lengths [B]`, the `logprobs [B, N]` of the
    tokens under the (steered) model at temperature 1, and `scores [B, N, E]` of every token where a readout was asked for.
    """

    texts: Any = flax.struct.field(pytree_node=False)
    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    scores: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Continuations:
    """Rows and O ways to go on from each: their `batch`, the continuations' `ids [O, B, R + 1]` and `counts [O, B]`, and what block
    `below` reads: the residual stream of the rows `first [B, T, D]` and of all but the last of the ids, `more [O, B, R, D]`; at block
    0, token ids."""

    batch: TokenBatch
    ids: np.ndarray
    counts: np.ndarray
    first: Any
    more: Any
    below: int


@functools.partial(jax.jit, static_argnames=("config", "logits"))
def _forward(config, params, ids, lengths, interventions, probes, logits):
    x, _, captured = model.forward(config, params, ids, interventions=interventions, probes=probes, lengths=lengths)
    if logits is None:
        return Output(None, captured)
    if logits == "last":
        x = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return Output(model.unembed(config, params, x), captured)


@functools.partial(jax.jit, static_argnames="config")
def _logprobs(config, params, ids, lengths, interventions):
    x, _, _ = model.forward(config, params, ids, interventions=interventions, lengths=lengths)
    return jnp.pad(_following(config, params, x[:, :-1], ids[:, 1:]), ((0, 0), (1, 0)))


def _following(config, params, x, ids):
    """Log-probability `[B, T]` of `ids [B, T]` where the residual stream before each is `x [B, T, D]`."""

    def one_row(row):  # row by row: all logits at once would be B * T * V floats
        x, following = row
        logits = model.unembed(config, params, x)
        return jnp.take_along_axis(logits, following[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)

    return lax.map(one_row, (x, ids))


def _through(config, params, first, lengths, more, interventions, layers):
    """The residual stream after `layers` of what comes `first`, `[B, T, D]`, and of each way to go on, `[O, B, R, D]`; both are
    given as what the first of the layers reads (see `model.forward`)."""
    (B, T), R = first.shape[:2], more.shape[2]
    cache = model.init_cache(config, B, T + R, params["embed"].dtype, params_lib.is_stacked(params))
    x, cache, _ = model.forward(config, params, first, None, cache, interventions, None, lengths + R, layers)

    def one(more):
        return model.forward(config, params, more, lengths, cache, interventions, None, lengths + R, layers)[0]

    return x, lax.map(one, more) if R else jnp.zeros((len(more), B, 0, x.shape[-1]), x.dtype)


@functools.partial(jax.jit, static_argnames=("config", "below"))
def _begin(config, params, ids, lengths, more, below):
    return _through(config, params, ids, lengths, more, None, (0, below))


@functools.partial(jax.jit, static_argnames=("config", "below"))
def _continuations(config, params, first, lengths, more, ids, counts, interventions, below):
    x, xs = _through(config, params, first, lengths, more, interventions, (below, config.n_layers))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)

    def one(choice):
        x, ids, count = choice
        logprobs = _following(config, params, jnp.concatenate([last, x], axis=1), ids)
        return jnp.where(jnp.arange(ids.shape[1]) < count[:, None], logprobs, 0).sum(1)

    return lax.map(one, (xs, ids, counts)).T


def adjustment(vectors: Directions, kind: str) -> dict[str, Any]:
    """What makes a projection the `kind` of score asked for (see `LanguageModel.read`), as arguments of a Capture.

    A "centred" one needs the `centre` besides.
    """
    if kind not in READ:
        raise ValueError(f"kind={kind!r}; expected one of {', '.join(READ)}")
    if kind == "z":
        if not vectors.neutral_mean.any() and (vectors.neutral_std == 1).all():  # type: ignore[attr-defined]
            raise ValueError(
                "these directions were not calibrated on neutral text, so they have no z-scores; read them as "
                '"projection", "cosine" or "centred"'
            )
        return {"offset": vectors.neutral_mean, "scale": 1 / vectors.neutral_std}  # type: ignore[attr-defined]
    return {"cosine": kind != "projection"}


class LanguageModel:
    """A decoder-only transformer ready to run. `params` decides device, dtype and layer layout; see `jaxemo.params`."""

    def __init__(
        self,
        config: ModelConfig,
        params: params_lib.Params,
        tokenizer: Tokenizer | None = None,
        source: str = "",
        no_tokenizer: str = "this model has no tokenizer; give token ids [B, T] instead of texts",
    ):
        params_lib.check(config, params)
        self.config, self.params, self._tokenizer, self.source = config, params, tokenizer, source
        self._no_tokenizer = no_tokenizer  # what calls that need one say

    def __repr__(self) -> str:
        c = self.config
        return (f"LanguageModel({self.source or c.family}: {params_lib.count(c) / 1e6:.0f} M parameters, {c.n_layers} layers, "
                f"d_model {c.d_model}, {self.params['embed'].dtype})")  # fmt: skip

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError(self._no_tokenizer)
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def tokenize(self, texts_or_chats, add_generation_prompt: bool = True) -> TokenBatch:
        """Texts or chats (one or several) as right-padded rows, which know where the turns of chats lie.

        A chat ends where the assistant's answer begins, or as it does without the generation prompt.
        """
        return tokens_lib.pad(tokens_lib.encode(self.tokenizer, texts_or_chats, add_generation_prompt))

    def batch(self, inputs) -> TokenBatch:
        """What the other methods take (texts, chats, a TokenBatch, an integer array) as a checked TokenBatch."""
        if not isinstance(inputs, TokenBatch) and not hasattr(inputs, "ndim"):
            inputs = self.tokenize(inputs)
        batch = tokens_lib.as_batch(inputs, self.config.vocab_size)
        if batch.lengths.max() > self.config.max_positions:
            raise ValueError(
                f"a row has {batch.lengths.max()} tokens; the model was made for {self.config.max_positions}"
            )
        return batch

    def forward(
        self,
        batch,
        steering: SteeringArg = None,
        capture: Capture | None = None,
        logits: Literal["all", "last"] | None = "all",
    ) -> Output:
        """One compiled pass over a TokenBatch, an integer array `[B, T]`, texts or chats.

        `steering` is one Steering for all rows or a list with one (or None) a row; `capture` says what else to return;
        `logits` is "all" positions, each row's "last" token, or None. Compiles once for each shape, for having or not
        having steering, and for the kinds of capture; never for their values.
        """
        if logits not in ("all", "last", None):
            raise ValueError(f"logits={logits!r}; expected 'all', 'last' or None")
        batch = self.batch(batch)
        interventions = None if steering is None else steering_lib.resolve(self.config, steering, batch)
        probes = None if capture is None else capture_lib.resolve(self.config, capture, batch)
        return _forward(self.config, self.params, batch.ids, batch.lengths, interventions, probes, logits)

    def logprobs(self, batch, steering: SteeringArg = None) -> jax.Array:
        """Log-probability `[B, T]` of every token given those before it (0 for the first; padding is meaningless)."""
        batch = self.batch(batch)
        interventions = None if steering is None else steering_lib.resolve(self.config, steering, batch)
        return _logprobs(self.config, self.params, batch.ids, batch.lengths, interventions)

    def begin_continuations(self, batch, texts, below: int = 0) -> Continuations:
        """Rows and their continuations (see `continuations`), read up to block `below`: what steering at that block and later ones
        has in common, so that many steerings of the same rows share it."""
        batch = self.batch(batch)
        if len(texts) != len(batch.ids) or any(isinstance(row, str) for row in texts) or len({*map(len, texts)}) != 1:
            raise ValueError(
                f"texts: expected as many continuations for each of the {len(batch.ids)} rows, a list of them a row"
            )
        if not 0 <= below < self.config.n_layers:
            raise ValueError(
                f"below={below}: the model's {self.config.n_layers} layers are 0 to {self.config.n_layers - 1}"
            )
        more = [[self.tokenizer.encode(text)[len(self.tokenizer.prefix) :] for text in row] for row in texts]
        counts = np.array([[len(ids) for ids in row] for row in more], np.int32).T
        if not counts.all():
            o, row = np.argwhere(counts == 0)[0]
            raise ValueError(f"texts: continuation {o} of row {row}, {texts[row][o]!r}, has no tokens")
        if (longest := int((batch.lengths + counts.max(0)).max())) > self.config.max_positions:
            raise ValueError(
                f"a row with its continuation has {longest} tokens; the model was made for {self.config.max_positions}"
            )
        R = tokens_lib.bucket(int(counts.max()) - 1) if counts.max() > 1 else 0  # the last token need not be read
        ids = np.zeros((*counts.shape, R + 1), np.int32)
        for o, row in np.ndindex(counts.shape):
            ids[o, row, : counts[o, row]] = more[row][o]
        first, rest = batch.ids, ids[:, :, :-1]
        if below:
            first, rest = _begin(self.config, self.params, first, batch.lengths, rest, below)
        return Continuations(batch, ids, counts, first, rest, below)

    def continuations(self, batch, texts=None, steering: SteeringArg = None) -> tuple[jax.Array, np.ndarray]:
        """Log-probability `[B, O]` of each of O ways to go on from each row, and how many tokens `[B, O]` each has.

        `texts` holds O strings a row; each is encoded by itself, so a word that goes on a text begins with its space. A row is
        read once, whatever O is. What is steered in all tokens is steered in those of every continuation too. In place of `batch`
        and `texts` may stand what `begin_continuations` made of them; raises ValueError for steering below where that ends.
        """
        c = batch if isinstance(batch, Continuations) else self.begin_continuations(batch, texts)
        interventions = None
        if steering is not None:
            interventions = steering_lib.resolve(self.config, steering, c.batch, c.ids.shape[2])
            if interventions.layers.acts[: c.below].any():
                raise ValueError(
                    f"layers below {c.below} are steered, but were read already; begin the continuations below them"
                )
        found = _continuations(
            self.config, self.params, c.first, c.batch.lengths, c.more, c.ids, c.counts, interventions, c.below
        )
        return found, c.counts.T

    def read(
        self,
        texts,
        vectors: Directions,
        layer: int | None = None,
        steering: SteeringArg = None,
        tokens: tokens_lib.Selection = "all",
        kind: str = "projection",
    ) -> Reading:
        """Score every token's residual stream, after block `layer` (all layers if None), on `vectors`' directions.

        Args:
          tokens: those that each row's `pooled` is the mean over: any selection, such as "user" or "before_answer".
            Attention sinks among them are left out (see `capture.ordinary`), unless there is nothing else.
          kind: "projection" on the directions, in the unit of the residual stream; "z", that less the mean of
            neutral tokens and in their standard deviations (of single tokens, also where it is pooled); "cosine"; or
            "centred", the cosine after the mean of all the texts' `tokens` is taken away. Which
            of several emotions a text has most of is told by "z", or by "centred" among texts: a direction's projection
            and cosine have an offset of their own.
        """
        self.check_directions(vectors, "all" if layer is None else layer)
        batch = self.batch(texts)
        lengths = np.asarray(batch.lengths)
        wanted: dict[str, Any] = {"resid_post": "all" if layer is None else [layer]}
        adjust = adjustment(vectors, kind)
        if kind == "centred":
            if len(lengths) < 2:
                raise ValueError("a single text cannot be centred on the mean of the texts; give more, or another kind")
            means = Capture(mean=wanted, tokens=tokens, sinks=False)
            mean = np.asarray(self.forward(batch, steering, means, logits=None).captured.mean["resid_post"]).mean(1)
            adjust["centre"] = np.zeros((self.config.n_layers, self.config.d_model), np.float32)
            adjust["centre"][slice(None) if layer is None else layer] = mean if layer is None else mean[0]
        capture = Capture(
            scores=wanted, pooled=wanted, directions=vectors.directions, tokens=tokens, sinks=False, **adjust
        )
        captured = self.forward(batch, steering, capture, logits=None).captured
        real = np.arange(batch.ids.shape[1]) < lengths[:, None]
        scores = np.where(real[..., None], np.asarray(captured.scores["resid_post"]), 0)  # [n, B, T, E]
        pooled = np.array(captured.pooled["resid_post"])
        words = [[self._token(i) for i in row[:n]] for row, n in zip(batch.ids, lengths, strict=True)]
        one = layer is not None
        return Reading(tuple(vectors.names), words, lengths, scores[0] if one else scores,
                       pooled[0] if one else pooled)  # fmt: skip

    def check_directions(self, vectors, layers: Any = ()) -> None:
        """Raise TypeError for what is no set of directions, ValueError for those of another model or without such layers."""
        if not hasattr(vectors, "directions"):
            raise TypeError(f"{type(vectors).__name__} is no set of directions, as `jaxemo.emotions.extract(lm)` makes one and "
                            "`jaxemo.EmotionVectors.load(path)` reads one")  # fmt: skip
        steering_lib.check_made_for(self.config, getattr(vectors, "made_for", ""))
        known = tuple(getattr(vectors, "layers", range(self.config.n_layers)))
        wanted = () if layers == () else steering_lib.resolve_layers(layers, self.config.n_layers)
        if lacking := sorted(set(wanted) - set(known)):
            raise ValueError(
                f"there are no directions at layers {lacking}: these vectors were extracted at {list(known)}"
            )

    def _token(self, index) -> str:
        return str(index) if self._tokenizer is None else self._tokenizer.token(index)

    def generate(
        self,
        prompts,
        steering: SteeringArg = None,
        max_new_tokens: int = 64,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        min_p: float | Sequence[float] = 0.0,
        seed: int | Sequence[int] = 0,
        stop: Sequence[int | str] | None = None,
        read: Directions | None = None,
        layer: int | None = None,
        stream: Callable[[list[str]], Any] | None = None,
    ) -> Generation:
        """Continue prompts (texts, chats, a TokenBatch or an integer array), steered, and read every generated token.

        Args:
          steering: as in `forward`; its token selection says whether prompt, generated tokens or all are steered.
          temperature, top_k, top_p, min_p: one value or one a row; temperature 0 is greedy.
          seed: row i of an integer seed draws from `fold_in(key(seed), i)`; a list gives each row its own seed, so that
            a row's text does not depend on what shares its batch, nor on its place in it.
          stop: token ids and strings that end a text (kept out of it); by default the model's own end tokens, [] for none.
          read, layer: directions to score every generated token on, from the same pass, after block `layer` (by default
            `read.layer`).
          stream: called after every token with each row's new piece of text.
        """
        batch = self.batch(prompts)
        B, T = batch.ids.shape
        if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number, at least 1")
        if layer is not None and read is None:
            raise ValueError(f"layer={layer} says where to read, but there is nothing to read: give read=")
        if read is not None:
            self.check_directions(read, getattr(read, "layer", ()) if layer is None else layer)
        if batch.lengths.max() + max_new_tokens > self.config.max_positions:
            raise ValueError(f"{batch.lengths.max()} prompt tokens and {max_new_tokens} new ones exceed the model's "
                             f"{self.config.max_positions} positions")  # fmt: skip
        stop_ids, stop_texts = self.stops(stop)
        sampling = sampling_of(B, temperature, top_k, top_p, min_p, seed)
        interventions = None
        if steering is not None:
            interventions = steering_lib.resolve(self.config, steering, batch, max_new_tokens)
        probes = None
        if read is not None:
            at = read.layer if layer is None else layer
            wanted = Capture(scores={"resid_post": [at]}, directions=read.directions)
            probes = capture_lib.resolve(self.config, wanted, batch)

        room = tokens_lib.bucket(max_new_tokens, 16)
        most = np.full(B, max_new_tokens, np.int32)
        logits, cache, _ = generate.prefill(self.config, self.params, batch.ids, batch.lengths, batch.lengths + most,
                                            interventions, None, T + room)  # fmt: skip
        own, shared = (None, None) if interventions is None else steering_lib.split(interventions)
        state = generate.begin(
            logits, cache, np.arange(B, dtype=np.int32), batch.lengths, most, sampling, stop_ids, own, probes, room
        )
        shown = [0] * B
        pace = 1 if stream else 16 if stop_texts else max_new_tokens + 1
        while True:
            if not stream:
                state, *_ = generate.decode(self.config, self.params, shared, state, stop_ids, np.int32(pace), probes)
            if not (stream or stop_texts):
                break
            done = np.asarray(state.done)
            finished = done.all()
            texts = self._texts(state.tokens, state.lengths)
            ends = [_first(text, stop_texts) for text in texts]  # where a stop string ends the text, in characters
            if stream:
                pieces = []
                for i, text in enumerate(texts):
                    # Hold back a character whose bytes are not all there yet, and what may be the start of a stop.
                    whole = text.rstrip("�")
                    safe = len(text) if finished or done[i] else len(whole) - _overlap(whole, stop_texts)
                    upto = min(safe, ends[i])
                    pieces.append(text[shown[i] : upto])
                    shown[i] = max(shown[i], upto)
                if any(pieces) or not finished:
                    stream(pieces)
            stopped = done | [end <= len(text) for end, text in zip(ends, texts, strict=True)]
            if read is not None:  # what is kept must have been read, which is a step after it is written
                tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
                for row in np.flatnonzero(stopped & ~done):
                    stopped[row] = self.cut(tokens[row, : lengths[row]], stop_texts)[1] < lengths[row]
            if stopped.all():
                break
            if stop_texts:
                state = state.replace(done=jnp.asarray(stopped))
            if stream:
                state, *_ = generate.decode(self.config, self.params, shared, state, stop_ids, np.int32(pace), probes)

        # Cut on the host: a slice of a device array compiles.
        tokens, lengths = np.array(state.tokens)[:, :max_new_tokens], np.array(state.lengths)
        logprobs = np.array(state.logprobs)[:, :max_new_tokens]
        scores = None if state.scores is None else np.array(state.scores)[:, :max_new_tokens]
        written: Any = None
        if self._tokenizer is not None:
            written = []
            for i, row in enumerate(tokens):
                text, kept = self.cut(row[: lengths[i]], stop_texts)
                written.append(text)
                lengths[i], tokens[i, kept:], logprobs[i, kept:] = kept, 0, 0
                if scores is not None:
                    scores[i, kept:] = 0
        return Generation(written, tokens, lengths, logprobs, scores)

    def stops(self, stop) -> tuple[np.ndarray, list[str]]:
        """Stop token ids, padded so that their number does not recompile, and the stop strings that are not one token."""
        if stop is None:
            stop = self._tokenizer.stop_ids if self._tokenizer is not None else ()
        ids, texts = [], []
        for item in [stop] if isinstance(stop, str | int) else stop:
            if isinstance(item, bool) or not isinstance(item, str | int | np.integer):
                raise TypeError(f"stop={stop!r}: {item!r} is neither a token id nor a text")
            if isinstance(item, str):
                special = self.tokenizer.backend.token_to_id(item)
                if not item:
                    raise ValueError("an empty string cannot stop a text")
                if special is not None and special in self.tokenizer.stop_ids:
                    ids.append(special)
                else:
                    texts.append(item)
            else:
                ids.append(int(item))
        return np.array(ids + [-1] * (max(8, len(ids)) - len(ids)), np.int32), texts

    def cut(self, tokens: np.ndarray, stops: Sequence[str]) -> tuple[str, int]:
        """The text of `tokens` up to the first of `stops`, and the fewest tokens that hold it."""
        text = self.tokenizer.decode(tokens)
        end, kept = _first(text, stops), len(tokens)
        if end <= len(text):
            text, kept = text[:end], 0
            while not self.tokenizer.decode(tokens[:kept]).startswith(text):
                kept += 1
        return text, kept

    def _texts(self, tokens, lengths) -> list[str]:
        rows = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
        return [self.tokenizer.decode(row[:n]) for row, n in rows]


def _first(text: str, stops: Sequence[str]) -> int:
    """Where the first of `stops` begins in `text`; beyond its end if none does."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text) + 1)


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `stops`."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def sampling_of(rows: int, temperature, top_k, top_p, min_p, seed) -> generate.Sampling:
    """How `rows` rows draw (see `LanguageModel.generate`)."""

    def per_row(name, value, dtype, low, high):
        array = np.asarray(value, np.float64)
        fits = (array >= low) & (array <= high) & (np.issubdtype(dtype, np.floating) | (array % 1 == 0))
        if array.shape not in ((), (rows,)) or not fits.all():
            kind = "number" if np.issubdtype(dtype, np.floating) else "whole number"
            raise ValueError(f"{name}={value}: expected a {kind} from {low} to {high}, or {rows} of them")
        return array.astype(dtype) if array.shape else np.full(rows, array, dtype)

    seeds = per_row("seed", seed, np.uint32, 0, 2**32 - 1)
    if np.ndim(seed) == 0:
        keys = jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seeds, jnp.arange(rows))
    else:
        keys = jax.vmap(jax.random.key)(seeds)
    return generate.Sampling(
        temperature=per_row("temperature", temperature, np.float32, 0, np.inf),
        top_k=per_row("top_k", top_k, np.int32, 0, np.iinfo(np.int32).max),
        top_p=per_row("top_p", top_p, np.float32, 0, 1),
        min_p=per_row("min_p", min_p, np.float32, 0, 1),
        key=keys,
    )


def compare(model: LanguageModel, other: LanguageModel, batch) -> dict[str, float]:
    """How far apart two models' next-token predictions are on the same tokens, a batch as `forward` takes it.

    `max_logit` and `mean_logit`, the largest and the mean absolute difference of logits; `kl`, the mean divergence
    KL(model ‖ other) in nats a token; `top1`, the share of positions where the likeliest token is the same.
    """
    batch = model.batch(batch)
    real = np.arange(batch.ids.shape[1]) < np.asarray(batch.lengths)[:, None]
    a, b = (np.asarray(lm.forward(batch).logits)[real] for lm in (model, other))
    p, q = (np.asarray(jax.nn.log_softmax(x)) for x in (a, b))
    return {
        "max_logit": float(np.abs(a - b).max()),
        "mean_logit": float(np.abs(a - b).mean()),
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "top1": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }


def load(
    model: str | os.PathLike,
    dtype=None,
    stacked: bool | None = None,
    quantise: Literal["int8", "int4"] | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """A LanguageModel from any of: a registry name, a `.gguf` file, a directory as Hugging Face lays it out or as
    `jaxemo convert` writes it, or a repository of the Hugging Face hub, "ORG/NAME" or "ORG/NAME:FILE.gguf".

    What is not here is fetched on first use; `revision` is a branch, tag or commit of a repository. `dtype` is float32 or
    bfloat16, by default float32 on CPU and bfloat16 on accelerators. `stacked` chooses the layer layout (see
    `jaxemo.params`): by default separate on CPU and stacked on accelerators. `quantise` holds the layers' projections in
    8 or 4 bits (see `jaxemo.quantise`). A directory without a tokenizer loads; only calls that need text raise then.

    Raises FileNotFoundError for a name that means nothing, CheckpointError (a ValueError) where a file is damaged or not
    understood, PermissionError for terms not yet accepted, and RuntimeError where a download fails.
    """
    from jaxemo.checkpoints import convert, huggingface, loading

    on_cpu = jax.default_backend() == "cpu"
    dtype = convert.as_dtype(dtype or ("float32" if on_cpu else "bfloat16"))
    path = checkpoints.resolve(model, revision=revision)
    source, tokenizer = loading.open_model(path)
    params = convert.load(source, dtype, not on_cpu if stacked is None else stacked, quantise)
    return LanguageModel(source.config, params, tokenizer, os.fspath(model), huggingface.no_tokenizer(path))
