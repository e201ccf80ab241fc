"""Sweeps: conditions x prompts x samples through one compiled loop, kept line by line as they are done."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from jaxemo import batching, files, language_model, params, steering
from jaxemo import tokens as tokens_lib
from jaxemo.capture import Capture
from jaxemo.language_model import Directions, LanguageModel
from jaxemo.steering import Steering

HEADER, ROW = b'{"sweep": ', b'{"condition": '  # how the lines of a store begin


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """What came of every condition (C), prompt (P) and sample (S), in that order.

    `texts [C, P, S]`; `tokens [C, P, S, N]` (0 after the end), their `lengths [C, P, S]` and `logprobs [C, P, S, N]` under the
    steered model; `ended [C, P, S]`, whether a text ended by itself; `scores [C, P, S, E]` on the directions `names`, and
    `words [C, P, S, W]`, the log-probabilities of first tokens; None where not asked for. `settings` are what it was made with.
    `seconds` and `fresh` count this run's part alone.
    """

    conditions: tuple[str, ...]
    texts: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    ended: np.ndarray
    names: tuple[str, ...]
    scores: np.ndarray | None
    words: np.ndarray | None
    settings: dict[str, Any]
    fresh: int
    seconds: float

    def __str__(self) -> str:
        C, P, S = self.lengths.shape
        made = int(self.lengths.sum())
        lines = [f"{C} conditions x {P} prompts x {S} samples: {made:,} tokens"]
        if self.fresh:
            lines[0] += f"; {self.fresh:,} of the {C * P * S:,} texts in {self.seconds:.1f} s"
        width = max(map(len, self.conditions))
        lines.append(f"{'condition':{width}}  tokens  logprob  ended  the first text")
        for c, name in enumerate(self.conditions):
            n = int(self.lengths[c].sum())
            mean = f"{self.logprobs[c].sum() / n:7.2f}" if n else "      -"
            text = " ".join(str(self.texts[c, 0, 0]).split())[:60]
            lines.append(f"{name:{width}}  {n / (P * S):6.1f}  {mean}  {self.ended[c].mean():5.0%}  {text}")
        return "\n".join(lines)


def sweep(
    lm: LanguageModel,
    prompts,
    conditions: Mapping[str, Steering | None],
    samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: Sequence[int | str] | None = None,
    read: Directions | None = None,
    layer: int | None = None,
    kind: str = "projection",
    tokens: tokens_lib.Selection = "generated",
    words: Sequence[str] = (),
    rows: int = 64,
    out: str | os.PathLike | None = None,
    progress: bool = True,
) -> Grid:
    """Generate from every prompt under every condition, `samples` times, `rows` at once, and score what is asked for.

    A text depends on its prompt, condition, sample and the seed, not on what else is done; sample s of a prompt has the same
    draws under every condition, so that conditions compare in pairs.

    Args:
      prompts: texts or chats, or an integer array `[P, T]`.
      conditions: `{name: steering}`; None is no steering. `jaxemo.emotions.conditions` makes grids of them with controls.
      max_new_tokens: at most; 0 reads the prompts only.
      temperature, top_k, top_p, min_p, stop: as in `LanguageModel.generate`.
      read, layer, kind: directions to score on, after block `layer` (by default `read.layer`), as "projection", "z" or "cosine".
      tokens: whose mean is the score: "generated" or a selection of the prompt's (attention sinks are left out of these).
      words: texts whose first tokens' log-probabilities right after the prompt are returned.
      out: a `.jsonl` or `.parquet` file. Each text is on the disk when it is done, and the same call goes on where a killed one
        was, with the same results.

    Raises ValueError for what cannot be asked for, and for an `out` that was written with other settings, weights or prompts.
    """
    settings, jobs, wanted = _plan(lm, prompts, conditions, samples, max_new_tokens, (temperature, top_k, top_p, min_p), seed,
                                   stop, read, layer, kind, tokens, words)  # fmt: skip
    P = len(jobs) // len(conditions) // samples
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows={rows!r}: expected how many texts are written at once, at least 1")
    place = {(name, p, s): (c * P + p) * samples + s
             for c, name in enumerate(conditions) for p in range(P) for s in range(samples)}  # fmt: skip
    keys = list(place)
    done: dict[int, dict] = {}
    store, file = None, None
    if out is not None:
        out = pathlib.Path(out)
        if out.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"out={str(out)!r}: expected a .jsonl or a .parquet file")
        files.check_writable(out)
        store = out if out.suffix == ".jsonl" else out.with_name(f"{out.name}.jsonl")
    try:
        if store is not None:
            file = open(store, "a+b")  # noqa: SIM115  (closed below, with its lock)
            files.lock(file, store)
            done = _done(file, out, store, settings, place)
        begin, fresh, written = time.monotonic(), len(jobs) - len(done), 0
        with tqdm(total=len(jobs), initial=len(done), unit="text", desc="sweep", disable=not progress) as bar:
            for result in batching.run(lm, jobs, wanted, set(done), rows):
                record = _record(lm, wanted, keys[result.job], result, tokens == "generated")
                done[result.job] = record
                if file is not None:
                    files.append(file, [record])
                written += len(result.tokens)
                bar.update()
                if max_new_tokens:
                    bar.set_postfix_str(f"{written / (time.monotonic() - begin):.0f} tokens/s", refresh=False)
        seconds = time.monotonic() - begin
        records = [done[i] for i in range(len(jobs))]
        if out is not None and store is not None:
            _finish(out, store, settings, records)
    finally:
        if file is not None and store is not None:
            if not os.fstat(file.fileno()).st_size:
                store.unlink(missing_ok=True)  # nothing was begun
            file.close()
    return _grid(tuple(conditions), P, samples, max_new_tokens, settings, records, fresh, seconds)


def _plan(lm, prompts, conditions, samples, most, how, seed, stop, read, layer, kind, tokens, words):
    """(settings that tell this sweep from others, its jobs, what is done with each)."""
    if not isinstance(conditions, Mapping) or not conditions:
        raise ValueError("conditions are {name: steering or None, ...}, at least one")
    for name, spec in conditions.items():
        if not isinstance(name, str) or not (spec is None or isinstance(spec, Steering)):
            raise TypeError(
                f"conditions[{name!r}] is {type(spec).__name__}; expected names, each with a Steering or None"
            )
    for what, value, least in (("samples", samples, 1), ("max_new_tokens", most, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{what}={value!r}: expected a whole number, at least {least}")
    if samples > 1 and how[0] == 0:
        raise ValueError(f"samples={samples} at temperature 0 would all be the same; give a temperature")
    batch = lm.batch(prompts)
    if batch.lengths.max() + most > lm.config.max_positions:
        raise ValueError(f"{batch.lengths.max()} prompt tokens and {most} new ones exceed the model's "
                         f"{lm.config.max_positions} positions")  # fmt: skip
    texts = tokens_lib.rows_of(batch)
    for p, (text, turns) in enumerate(zip(texts, tokens_lib.turns_of(batch), strict=True)):
        for spec in conditions.values():
            steering.entries(
                lm.config, spec, len(text), turns, int(most), p
            )  # what acts nowhere is refused before the work
    of_prompt, of_tokens = None, None
    if read is not None:
        at = read.layer if layer is None else layer
        lm.check_directions(read, at)
        if kind == "centred":
            raise ValueError('kind="centred" needs the mean of all texts; a sweep reads "projection", "z" or "cosine"')
        if tokens == "generated" and not most:
            raise ValueError('tokens="generated", but max_new_tokens=0: select tokens of the prompt')
        asked = {"directions": read.directions, **language_model.adjustment(read, kind)}
        if tokens == "generated":
            of_tokens = Capture(scores={"resid_post": [at]}, **asked)
        else:
            of_prompt = Capture(pooled={"resid_post": [at]}, tokens=tokens, sinks=False, **asked)
            for p, (text, turns) in enumerate(zip(texts, tokens_lib.turns_of(batch), strict=True)):
                tokens_lib.spans(tokens, len(text), 0, turns, p)
    elif layer is not None or tokens != "generated" or kind != "projection":
        raise ValueError("layer, kind and tokens say what to read, but there is nothing to read: give read=")
    if isinstance(words, str):
        raise TypeError(f"words={words!r}: expected several texts, each one a choice")
    first = {word: lm.tokenizer.encode(word)[len(lm.tokenizer.prefix) :][:1] for word in words}
    for word, ids in first.items():
        if not ids:
            raise ValueError(f"words: {word!r} has no tokens")
        if same := [other for other, others in first.items() if other != word and others == ids]:
            raise ValueError(
                f"words: {word!r} and {same[0]!r} begin with the same token, {lm.tokenizer.token(ids[0])!r}"
            )
    stops, stop_texts = lm.stops(stop)
    language_model.sampling_of(1, *how, seed)  # refuses what makes no sense

    def draw(keys):
        return language_model.sampling_of(len(keys), *how, keys)

    def key(text, s):
        return int.from_bytes(hashlib.sha256(repr((seed, list(text), s)).encode()).digest()[:4], "little")

    specs = conditions.values()
    jobs = [batching.Job(text, spec, key(text, s)) for spec in specs for text in texts for s in range(samples)]
    wanted = batching.Wanted(
        int(most), draw, stops, stop_texts, of_prompt, of_tokens, [ids[0] for ids in first.values()]
    )
    settings = {
        "weights": params.fingerprint(lm.params)[:16],
        "dtype": str(lm.params["embed"].dtype),
        "prompts": _digest([list(map(int, text)) for text in texts]),
        "conditions": {name: _digest(spec) for name, spec in conditions.items()},
        "samples": samples,
        "max_new_tokens": int(most),
        "sampling": [float(x) for x in how],
        "seed": seed,
        "stop": [int(i) for i in stops] + list(stop_texts),
        "read": read and [list(read.names), _digest(read.directions), int(at), kind, repr(tokens)],
        "words": list(first),
    }
    return json.loads(json.dumps(settings)), jobs, wanted


def _digest(thing) -> str:
    """Tells steerings, arrays and lists of token ids from others."""
    digest = hashlib.sha256()
    if isinstance(thing, Steering):
        digest.update(repr((thing.keep_norm, thing.made_for)).encode())
        for term in thing.terms:
            digest.update(repr((term.kind, term.tokens)).encode())
            for array in (term.directions, term.value, term.active):
                digest.update(np.ascontiguousarray(array).tobytes())
    elif hasattr(thing, "shape"):
        digest.update(np.ascontiguousarray(thing).tobytes())
    else:
        digest.update(repr(thing).encode())
    return digest.hexdigest()[:16]


def _record(lm, wanted, key, result, of_generated: bool) -> dict[str, Any]:
    tokens, n = result.tokens, len(result.tokens)
    text, ended = "", n < wanted.most
    if lm.has_tokenizer:
        text, n = lm.cut(tokens, wanted.stop_texts)
        ended |= n < len(tokens)
    scores = result.pooled
    if of_generated and result.scores is not None:
        scores = result.scores[:n].mean(0, dtype=np.float64) if n else np.zeros(result.scores.shape[1])
    name, p, s = key
    record = {"condition": name, "prompt": p, "sample": s, "text": text, "tokens": tokens[:n].tolist(),
              "logprobs": _numbers(result.logprobs[:n]), "ended": bool(ended)}  # fmt: skip
    if scores is not None:
        record["scores"] = _numbers(scores)
    if result.words is not None:
        record["words"] = _numbers(result.words)
    return record


def _numbers(array) -> list[float]:
    """As short as they can be written and still be the same float32."""
    return [float(str(x)) for x in np.asarray(array, np.float32)]


def _done(file, out, store, settings, place) -> dict[int, dict]:
    """What a run before this one has done; the store is begun where there is none."""
    found = files.records(file, store, "a sweep", (HEADER, ROW))
    if not found:
        if out == store or not out.exists():
            files.append(file, [{"sweep": settings}])
            return {}
        found = _table(out)
    if "sweep" not in found[0]:
        raise ValueError(f"{str(out)!r} is no store of a sweep; write elsewhere")
    if found[0]["sweep"] != settings:
        before = found[0]["sweep"]
        other = next(name for name in settings if before.get(name) != settings[name])
        raise ValueError(f"{str(out)!r} was written with other {other}; write elsewhere")
    done: dict[int, dict] = {}
    for record in found[1:]:
        key = record.get("condition"), record.get("prompt"), record.get("sample")
        if key not in place or place[key] in done:
            raise ValueError(f"{str(out)!r} holds a text {key} that is not of this sweep, or holds it twice")
        done[place[key]] = record
    return done


def _table(out) -> list[dict]:
    """The lines of a store that is done and has become a Parquet file."""
    try:
        table = pq.read_table(out)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{str(out)!r} is no store of a sweep; write elsewhere") from error
    made = json.loads((table.schema.metadata or {}).get(b"sweep", b"null"))
    return [{"sweep": made}, *table.to_pylist()] if made else [{}]


def _finish(out, store, settings, records) -> None:
    """The texts in order, in the file that was asked for."""
    if out == store:
        lines = [{"sweep": settings}, *records]
        files.write_atomically(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        return
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records).replace_schema_metadata({"sweep": json.dumps(settings)}), sink)
    files.write_atomically(out, sink.getvalue())
    store.unlink()


def _grid(conditions, P, S, N, settings, records, fresh, seconds) -> Grid:
    shape = len(conditions), P, S
    tokens, logprobs = np.zeros((len(records), N), np.int32), np.zeros((len(records), N), np.float32)
    for i, record in enumerate(records):
        n = len(record["tokens"])
        tokens[i, :n], logprobs[i, :n] = record["tokens"], record["logprobs"]

    def column(name, dtype):
        array = np.array([record[name] for record in records], dtype)
        return array.reshape(*shape, *array.shape[1:])

    return Grid(
        conditions,
        column("text", object),
        tokens.reshape(*shape, N),
        np.array([len(record["tokens"]) for record in records], np.int32).reshape(shape),
        logprobs.reshape(*shape, N),
        column("ended", bool),
        tuple(settings["read"][0]) if settings["read"] else (),
        column("scores", np.float32) if settings["read"] else None,
        column("words", np.float32) if settings["words"] else None,
        settings,
        fresh,
        seconds,
    )
