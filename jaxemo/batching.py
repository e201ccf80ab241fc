"""Continuous batching: many jobs, each a prompt with its own steering and seed, through one compiled decode loop.

Prompts are read a few at a time, sorted by length, and wait; a row that is done gives them its place inside the loop (see
`generate.decode`). Jobs that differ in samples, or in what acts after the prompt, share one reading of the prompt; prompts share that
of the beginning they have in common, and conditions that of the blocks below all that is steered. All shapes are those of the whole set
of jobs, so that what is left to do of it gives the same numbers.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxemo import capture, generate, steering, tokens
from jaxemo.capture import Capture
from jaxemo.steering import Steering

PACE = 16  # steps between looks at what is done
BANK = 256  # directions that one loop holds, so far as no single steering has more
COMMON = 16  # tokens that prompts share are read once, in multiples of this


class Job(NamedTuple):
    """A prompt's token ids (`tokens.Ids` where a selection names turns), how it is steered, and the seed of its draws."""

    prompt: Sequence[int]
    steering: Steering | None
    key: int


class Result(NamedTuple):
    """What came of job number `job`: its new `tokens [n]`, their `logprobs [n]` and, where asked for, their `scores [n, E]`, the
    prompt's `pooled [E]` scores, and `words [W]`, the log-probabilities of some tokens right after the prompt."""

    job: int
    tokens: np.ndarray
    logprobs: np.ndarray
    scores: np.ndarray | None
    pooled: np.ndarray | None
    words: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is done with every job. `most` new tokens at most, 0 for none; `draw` makes the Sampling of jobs from their keys.

    `stops` are token ids and `stop_texts` strings that end a row. `of_prompt` pools scores over the prompt, `of_tokens` scores
    the new tokens (at one layer); `words` are token ids.
    """

    most: int
    draw: Any
    stops: np.ndarray
    stop_texts: Sequence[str] = ()
    of_prompt: Capture | None = None
    of_tokens: Capture | None = None
    words: Sequence[int] = ()


def run(lm, jobs: Sequence[Job], wanted: Wanted, done: Collection[int] = (), rows: int = 64) -> Iterator[Result]:
    """The results of all jobs but those `done`, as they come. At most `rows` are decoded at once.

    A job's result does not depend on which others are there to do, nor on its place among them.
    """
    return _Run(lm, jobs, wanted, rows).results([i for i in range(len(jobs)) if i not in done])


@jax.jit
def _logprobs(logits, words):
    return jax.nn.log_softmax(logits, axis=-1)[:, words]


class _Run:
    """The shapes that hold for all of the jobs, and what is known of them."""

    def __init__(self, lm, jobs, wanted, rows):
        self.lm, self.jobs, self.wanted = lm, jobs, wanted
        self.rows = min(rows, 1 << (len(jobs) - 1).bit_length())
        self.few = max(self.rows // 4, 1)  # prompts read at once
        self.acts = functools.cache(self._acts)
        self.below = functools.cache(self._below)
        self.common = self._common()
        self.room = tokens.bucket(wanted.most, 16) if wanted.most else 0
        self.positions = self.common + max(map(self._bucket, jobs)) + self.room
        self.split = self._split()
        self.groups = self._groups()
        self.M = max(steering.room(slots) for _, slots, _ in self.groups)
        self.steered = any(job.steering is not None for job in jobs)

    def _bucket(self, job) -> int:
        return tokens.bucket(len(job.prompt) - self.common)

    def _about(self, job):
        return job.steering, len(job.prompt), getattr(job.prompt, "turns", ())

    def _acts(self, spec, length, turns) -> list[steering.Entry]:
        return steering.entries(self.lm.config, spec, length, turns, self.wanted.most)

    def _below(self, spec, length, turns, stop):
        """What `spec` does to the tokens before position `stop`, as something to compare."""
        return spec is not None and spec.keep_norm, tuple(
            (_digest(e.directions, e.a, e.b), e.span.start, min(e.span.stop, stop))
            for e in self.acts(spec, length, turns)
            if e.span.start < stop and (e.a.any() or e.b.any())
        )

    def _common(self) -> int:
        """How many tokens all prompts begin with; 0 where it would not pay, or where keys depend on the prompt's length."""
        prompts = {tuple(job.prompt) for job in self.jobs}
        ropes = [kind.rope for kind in self.lm.config.attention if kind.rope]
        if len(prompts) < 2 or any(rope.dynamic != 1 or rope.long_factors for rope in ropes):
            return 0
        limit = min(map(len, prompts)) - 1
        if self.wanted.of_prompt:  # the tokens that are scored must be read with the prompt
            for _, length, turns in {self._about(job) for job in self.jobs}:
                limit = min(limit, tokens.spans(self.wanted.of_prompt.tokens, length, 0, turns)[0].start)
        first, last = min(prompts), max(prompts)  # what these share, all do
        shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        return min(shared, limit) // COMMON * COMMON

    def _split(self) -> int:
        """The block up to which a prompt is read once for all conditions, in eighths of the depth, each of which compiles once; 0
        where prompts are not read several times."""
        lowest = steering.lowest({job.steering for job in self.jobs})
        if self.wanted.of_prompt:
            lowest = min(lowest, min(steering.resolve_layers(layers, self.lm.config.n_layers)[0]
                                     for layers in self.wanted.of_prompt.pooled.values()))  # fmt: skip
        lowest -= lowest % -(-self.lm.config.n_layers // 8)
        if not lowest:
            return 0
        prompts = {tuple(job.prompt) for job in self.jobs}
        readings = {(tuple(job.prompt), self.below(*self._about(job), len(job.prompt))) for job in self.jobs}
        return lowest if len(readings) >= 2 * len(prompts) else 0

    def _groups(self):
        """Jobs of steerings that share a bank (all, unless they have too many directions), with its slots and where it acts."""
        of: dict[Steering | None, list[int]] = {}
        for i, job in enumerate(self.jobs):
            of.setdefault(job.steering, []).append(i)
        groups: list[Any] = [([], {}, np.zeros(self.lm.config.n_layers, bool))]
        for members in of.values():
            rows = [self.acts(*about) for about in dict.fromkeys(self._about(self.jobs[i]) for i in members)]
            slots = dict(groups[-1][1])
            for row in rows:
                steering.assign(row, slots)
            if len(slots) > BANK and groups[-1][1]:
                groups.append(([], {}, np.zeros(self.lm.config.n_layers, bool)))
            for row in rows:
                steering.assign(row, groups[-1][1])
                groups[-1][2][:] |= np.any([entry.active for entry in row], axis=0) if row else False
            groups[-1][0].extend(members)
        return groups

    # ---- reading prompts ---------------------------------------------------------------------------------------------

    def interventions(self, jobs, slots):
        """What acts on `jobs`' rows, without what they share; None where nothing is steered anywhere."""
        if not self.steered:
            return None
        found = [self.acts(*self._about(job)) for job in jobs]
        numbers = [steering.assign(row, slots) for row in found]
        arrays = steering.arrange(self.lm.config, [job.steering for job in jobs], found, numbers, self.M)
        return steering.split(arrays)[0]

    def under(self, prompts):
        """What block `self.split` reads of a few prompts, and their cache of the blocks before it."""
        batch = tokens.pad(self._full(prompts), self.common + tokens.bucket(max(map(len, prompts)) - self.common))
        whole = batch.lengths + np.int32(self.wanted.most)
        return generate.prefill_below(self.lm.config, self.lm.params, batch.ids, whole, self.positions, self.split)

    def prefill(self, jobs, slots, shared, wanted=None, cache=None, upto=None, under=None):
        """Read the prompts of `jobs`, a full batch, or their first tokens `upto`; or go on from the `cache` of these. Where what is
        `under` them was read already, it is given row for row: what `self.under` returns."""
        interventions = self.interventions(jobs, slots)
        if interventions is not None:
            interventions = steering.join(interventions, shared)
        start = 0 if cache is None else self.common
        batch = tokens.pad([job.prompt for job in jobs], start + max(map(self._bucket, jobs)) if upto is None else None)
        ids, lengths = batch.ids[:, start:upto], batch.lengths
        probes = None if wanted is None else capture.resolve(self.lm.config, wanted, batch)
        given = {} if cache is None else {"start": np.full(len(jobs), start, np.int32), "cache": cache}
        if under is not None:
            x, below = under
            ids, given["below"] = x[:, start:upto], self.split
            given["cache"] = below if cache is None else generate.join_cache(below, cache, self.split)
        return generate.prefill(
            self.lm.config, self.lm.params, ids, lengths if upto is None else np.full(len(jobs), upto, np.int32),
            lengths + np.int32(self.wanted.most), interventions, probes, self.positions, **given,
        )  # fmt: skip

    def pools(self, left, slots, shared):
        """Read prompts, a few at a time: (logits, cache, captured, the jobs that go on from each row)."""
        begins: dict[Any, list[int]] = {}  # by what happens in the tokens that prompts share
        for i in left:
            begins.setdefault(self.below(*self._about(self.jobs[i]), self.common), []).append(i)
        for chunk in _batched(begins.values(), self.few):
            first = None
            if self.common:
                one_each = self._full([self.jobs[members[0]] for members in chunk])
                under = self.under([one_each[0].prompt[: self.common]]) if self.split else None  # they begin alike
                first = self.prefill(one_each, slots, shared, upto=self.common, under=under)[1]
            alike: dict[Any, list[tuple[int, int]]] = {}  # jobs whose prompts are one reading
            for number, members in enumerate(chunk):
                for i in members:
                    job = self.jobs[i]
                    key = self._bucket(job), tuple(job.prompt), self.below(*self._about(job), len(job.prompt))
                    alike.setdefault(key, []).append((number, i))
            for _, of_length in itertools.groupby(sorted(alike, key=lambda key: key[0]), key=lambda key: key[0]):
                same_length = list(of_length)
                prompts = list(dict.fromkeys(prompt for _, prompt, _ in same_length))
                for some in _batched(prompts, self.few) if self.split else [prompts]:
                    place = {prompt: row for row, prompt in enumerate(some)}
                    below = self.under(some) if self.split else None
                    for keys in _batched((key for key in same_length if key[1] in place), self.few):
                        members = [alike[key] for key in keys]
                        jobs = self._full([self.jobs[of[0][1]] for of in members])
                        cache, under = None, None
                        if first is not None:
                            cache = generate.take_cache(first, np.array(self._full([of[0][0] for of in members])))
                        if below is not None:
                            rows = np.array(self._full([place[prompt] for _, prompt, _ in keys]))
                            under = jnp.take(below[0], rows, 0), generate.take_cache(below[1], rows)
                        yield (
                            *self.prefill(jobs, slots, shared, self.wanted.of_prompt, cache, under=under),
                            [[i for _, i in of] for of in members],
                        )

    def _full(self, items: list) -> list:
        return items + [items[-1]] * (self.few - len(items))

    # ---- decoding ----------------------------------------------------------------------------------------------------

    def results(self, left: list[int]) -> Iterator[Result]:
        for members, slots, acts in self.groups:
            here = sorted(set(members) & set(left))
            if not here:
                continue
            shared = None
            if self.steered:
                bank = np.zeros((self.lm.config.n_layers, self.M, self.lm.config.d_model), np.float32)
                bank[:, : steering.room(slots)] = steering.bank(self.lm.config, slots)
                shared = steering.LayerInterventions(jnp.asarray(bank), None, None, None, jnp.asarray(acts))
            yield from self._group(here, slots, shared)

    def _group(self, left, slots, shared) -> Iterator[Result]:
        about: dict[int, tuple] = {}  # what the reading of the prompt gave: (pooled, words)
        state, seen = None, set()
        probes = None
        if self.wanted.of_tokens is not None:
            rows = tokens.TokenBatch(np.zeros((self.rows, 1), np.int32), np.ones(self.rows, np.int32))
            probes = capture.resolve(self.lm.config, self.wanted.of_tokens, rows)

        def finished(of, gone):
            job, lengths = np.asarray(of.job), np.asarray(of.lengths)
            rows = [r for r in np.flatnonzero(gone & (job >= 0)) if job[r] not in seen]
            if not rows:
                return
            arrays = [None if x is None else np.asarray(x) for x in (of.tokens, of.logprobs, of.scores)]
            for r in rows:
                seen.add(int(job[r]))
                cut = [None if x is None else x[r, : lengths[r]] for x in arrays]
                yield Result(int(job[r]), *cut, *about.pop(int(job[r])))

        for queue, waiting, last in self._queues(left, slots, shared, probes, about):
            if queue is None:  # nothing to generate
                for i in sorted(about):
                    none = np.zeros(0, np.float32)
                    yield Result(i, none.astype(np.int32), none, None, *about.pop(i))
                continue
            if state is None:
                state = generate.take(queue, np.arange(self.rows) % self.few)
                state = state.replace(done=jnp.ones(self.rows, bool), job=jnp.full(self.rows, -1, jnp.int32))
            while True:
                state, queue, waiting = generate.decode(
                    self.lm.config,
                    self.lm.params,
                    shared,
                    state,
                    self.wanted.stops,
                    np.int32(PACE),
                    probes,
                    queue,
                    waiting,
                    last,
                )
                state = self._stop_texts(state)
                done, wait = np.asarray(state.done), np.asarray(waiting)
                yield from finished(queue, ~wait)
                if last:
                    yield from finished(state, done)
                if not wait.any() and (done.all() if last else done.any()):
                    break

    def _stop_texts(self, state):
        """Mark the rows done in which a stop string is written."""
        if not self.wanted.stop_texts:
            return state
        done, lengths, written = np.array(state.done), np.asarray(state.lengths), np.asarray(state.tokens)
        for r in np.flatnonzero(~done):
            kept = self.lm.cut(written[r, : lengths[r]], self.wanted.stop_texts)[1]
            done[r] = kept < lengths[r]
        return state.replace(done=jnp.asarray(done))

    def _queues(self, left, slots, shared, probes, about):
        """Rows that wait, a few at a time, with their first tokens: (queue, waiting, whether they are the last)."""
        ahead = None
        for logits, cache, captured, members in self.pools(left, slots, shared):
            pooled = None if captured is None else np.asarray(captured.pooled["resid_post"])[0]
            words = np.asarray(_logprobs(logits, np.array(self.wanted.words))) if self.wanted.words else None
            flat = [(row, i) for row, of in enumerate(members) for i in of]
            about |= {
                i: (None if pooled is None else pooled[row], None if words is None else words[row]) for row, i in flat
            }
            if not self.wanted.most:
                yield None, None, True
                continue
            for part in _batched(flat, self.few):
                rows, numbers = np.array(self._full(list(part))).T
                jobs = [self.jobs[i] for i in numbers]
                there = np.arange(self.few) < len(part)
                queue = generate.begin(
                    jnp.take(logits, rows, 0), generate.take_cache(cache, rows),
                    np.where(there, numbers, -1).astype(np.int32), np.array([len(job.prompt) for job in jobs], np.int32),
                    np.full(self.few, self.wanted.most, np.int32), self.wanted.draw([job.key for job in jobs]),
                    self.wanted.stops, self.interventions(jobs, slots), probes, self.room,
                )  # fmt: skip
                if ahead is not None:
                    yield *ahead, False
                ahead = queue, jnp.asarray(there)
        if ahead is not None:
            yield *ahead, True


def _digest(*arrays: np.ndarray) -> bytes:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def _batched(items, n: int):
    items = iter(items)
    while part := list(itertools.islice(items, n)):
        yield part
