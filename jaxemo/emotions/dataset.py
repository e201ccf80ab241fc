"""Whole datasets read in a stream: a file of texts in, a Parquet or safetensors file of scores out, in constant memory.

Beside the output stand its parts until it is whole, `OUT.parts/`: each holds the scores of `CHUNK` texts and the passages
that scored highest among them, and is written whole or not at all. Started again, the work goes on after the last part.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from tqdm import tqdm

from jaxemo import files, params, steering
from jaxemo.capture import Capture, ordinary, resolve
from jaxemo.checkpoints.safetensors import header
from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.kernels.project_pool.reference import selected
from jaxemo.language_model import LanguageModel, adjustment
from jaxemo.tokens import Selection, TokenBatch, bucket, encode, pad, spans

CHUNK = 1024  # texts in a part: what an interruption costs at most, and what is held in memory
AROUND = 16  # tokens of a passage before and after the one that scored
SAMPLE = 1024  # texts whose mean is taken away for centred cosines


class Line(NamedTuple):
    """One text of a dataset. `text` is a string or a chat, None for a blank line; `where` names the line in errors."""

    number: int
    where: str
    raw: bytes
    id: str
    text: Any


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was read: numbers of texts, of tokens, of texts cut at the longest length, and of those that could not be read
    (blank, or chats longer than that); the mean score `[E]` of the texts; seconds of this run, and texts read in it."""

    out: str
    names: tuple[str, ...]
    texts: int
    tokens: int
    cut: int
    unread: int
    mean: np.ndarray
    seconds: float
    fresh: int

    def __str__(self) -> str:
        order = np.argsort(-self.mean)
        most = "  ".join(f"{self.names[e]} {self.mean[e]:+.2f}" for e in order[:5])
        least = "  ".join(f"{self.names[e]} {self.mean[e]:+.2f}" for e in order[-3:])
        also = f", {self.cut:,} cut to the longest length" * bool(self.cut) + f", {self.unread:,} not read" * bool(
            self.unread
        )
        return (f"{self.texts:,} texts, {self.tokens:,} tokens{also}; {self.fresh:,} of them in {self.seconds:.0f} s\n"
                f"mean score: {most}  ...  {least}\nwritten to {self.out} and {passages_path(self.out)}")  # fmt: skip


def read_dataset(
    lm: LanguageModel,
    source: str | os.PathLike,
    vectors: EmotionVectors,
    out: str | os.PathLike,
    *,
    layer: int | None = None,
    kind: str = "z",
    tokens: Selection = "all",
    top: int = 10,
    longest: int = 512,
    max_tokens: int = 1024,
    progress: bool = True,
) -> Summary:
    """Score every text of `source` on `vectors` and write one row for each to `out`, in order.

    Args:
      source: a .txt file with one text a line, or a .jsonl file with "text" or "messages" (a chat) and, if you like, "id".
      out: a .parquet file with columns row, id, tokens, cut and one for each direction, or a .safetensors file with arrays
        scores [n, E], tokens [n] and cut [n]. `OUT.passages.jsonl` gets, for each direction, the `top` passages round the tokens
        that scored highest, at most one a text.
      layer, kind, tokens: as in `LanguageModel.read`; the score of a text is the mean over its selected tokens. A "centred"
        cosine is centred on the mean of the first 1024 texts.
      longest: tokens of a text that are read at most; a chat that is longer is not read.
      max_tokens: tokens in a batch, padding included. Batches of texts of one length bucket have one shape, however many texts
        there are, so what is compiled, most of the memory beside the weights, is at most 20 programs for texts of up to 512
        tokens.

    A text that is not read has NaN scores. Raises ValueError naming the line that is no text, parts of other work, or an input
    that has changed since they were made. What was read before an error or an interruption is kept.
    """
    source, out = pathlib.Path(source), pathlib.Path(out)
    if source.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{str(source)!r}: expected a .txt file, one text a line, or a .jsonl file")
    if out.suffix not in (".parquet", ".safetensors"):
        raise ValueError(f"{str(out)!r}: expected the name of a .parquet or a .safetensors file")
    if not source.is_file() or not source.stat().st_size:
        raise FileNotFoundError(f"{str(source)!r} is no file with texts in it")
    if isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 0:
        raise ValueError(f"top={top!r}: expected a whole number of passages")
    for path in (out, passages_path(out)):
        files.check_writable(path)
    lm.check_directions(vectors)
    (layer,) = steering.resolve_layers([vectors.layer if layer is None else layer], lm.config.n_layers)
    lm.check_directions(vectors, [layer])
    adjust = adjustment(vectors, kind)
    longest = min(longest, lm.config.max_positions)
    read_on = (vectors.directions, vectors.neutral_mean, vectors.neutral_std)
    settings = {
        "source": source.name,
        "model": lm.config.outline,
        "weights": params.fingerprint(lm.params),
        "dtype": str(lm.params["embed"].dtype),
        "vectors": hashlib.sha256(b"".join(array[layer].tobytes() for array in read_on)).hexdigest(),
        "layer": layer,
        "kind": kind,
        "tokens": repr(tokens),
        "top": int(top),
        "longest": longest,
        "max_tokens": max_tokens,
    }
    parts, finished = pathlib.Path(f"{out}.parts"), pathlib.Path(f"{out}.parts.finished")
    shutil.rmtree(finished, ignore_errors=True)  # an earlier run was killed while it removed them
    done = _taken_up(parts, settings)
    begin, fresh = time.monotonic(), 0
    capture = Capture(
        pooled={"resid_post": [layer]}, scores={"resid_post": [layer]}, norm={"resid_post": [layer]},
        directions=vectors.directions, tokens=tokens, sinks=False, **adjust,
    )  # fmt: skip
    with tqdm(total=source.stat().st_size, unit="B", unit_scale=True, desc="read", disable=not progress) as bar:
        for number, lines in enumerate(_chunks(_lines(source))):
            digest, path = _digest(lines), _part(parts, number)
            if number < done:
                _check_same(source, digest, path)
            else:
                if kind == "centred" and capture.centre is None:
                    capture = dataclasses.replace(
                        capture, centre=_centre(lm, source, layer, tokens, longest, max_tokens, parts)
                    )
                part = _read_part(lm, lines, vectors.names, capture, top, longest, max_tokens)
                files.write_atomically(path, safetensors.numpy.save(part.arrays, {**part.metadata, "sha256": digest}))
                fresh += len(lines)
            bar.update(sum(len(line.raw) for line in lines))
            bar.set_postfix_str(f"{lines[-1].number + 1:,} texts, {fresh / (time.monotonic() - begin):.1f}/s")
    paths = [_part(parts, number) for number in range(1 + (lines[-1].number // CHUNK))]
    summary = _merge(paths, vectors.names, settings, out, top)
    parts.rename(finished)  # at once, so that no half of them is ever taken up
    shutil.rmtree(finished)
    return dataclasses.replace(summary, seconds=time.monotonic() - begin, fresh=fresh)


class _Part(NamedTuple):
    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]


def _read_part(lm, lines, names, capture, top, longest, max_tokens) -> _Part:
    """Scores, token counts and best passages of some lines."""
    n, E = len(lines), len(names)
    arrays = {
        "scores": np.full((n, E), np.nan, np.float32),
        "tokens": np.zeros(n, np.int32),
        "cut": np.zeros(n, np.bool_),
    }
    rows, cut = _encoded(lm, lines, capture.tokens, longest)
    arrays["tokens"][list(rows)] = [len(row) for row in rows.values()]
    arrays["cut"][cut] = True
    best, position = np.full((n, E), -np.inf, np.float32), np.zeros((n, E), np.int32)
    for of, batch in _batches(rows, max_tokens):
        captured = lm.forward(batch, capture=capture, logits=None).captured
        highest, where = _peaks(captured, resolve(lm.config, capture, batch).spans, batch.lengths)
        arrays["scores"][of] = np.asarray(captured.pooled["resid_post"])[0, : len(of)]
        best[of], position[of] = np.asarray(highest)[: len(of)], np.asarray(where)[: len(of)]
    passages = []
    for e, name in enumerate(names):
        for i in np.argsort(-best[:, e], kind="stable")[:top].tolist():
            if best[i, e] > -np.inf:
                about = {"row": lines[i].number, **({"id": lines[i].id} if lines[i].id else {})}
                passage = _passage(lm, rows[i], int(position[i, e]))
                passages.append({"emotion": name, "score": float(best[i, e]), **about, **passage})
    ids = json.dumps([line.id for line in lines]) if any(line.id for line in lines) else ""
    return _Part(arrays, {"ids": ids, "passages": json.dumps(passages)})


def _encoded(lm, lines, tokens, longest):
    """The token ids of each line that can be read, by its place in `lines`, and the places of those that were cut.

    Raises ValueError naming the line that cannot be encoded or has none of the selected `tokens`.
    """
    rows, cut = {}, []
    for i, line in enumerate(lines):
        if line.text is None:
            continue
        try:
            (row,) = encode(lm.tokenizer, [line.text])
            if len(row) > longest and isinstance(line.text, str):
                row = row[:longest]
                cut.append(i)
            if 0 < len(row) <= longest:
                spans(tokens, len(row), turns=getattr(row, "turns", ()))
                rows[i] = row
        except (TypeError, ValueError) as error:
            raise ValueError(f"{line.where}: {error}") from error
    return rows, cut


def _batches(rows: dict[int, list[int]], max_tokens: int) -> Iterator[tuple[list[int], TokenBatch]]:
    """Rows of one length bucket at a time, in batches whose shape depends on the bucket alone, with the rows' keys.

    Keys name none of the copies that fill a batch up.
    """
    by_bucket: dict[int, list[int]] = {}
    for i, row in rows.items():
        by_bucket.setdefault(bucket(len(row)), []).append(i)
    for length, members in sorted(by_bucket.items()):
        size = max(1, max_tokens // length)
        for start in range(0, len(members), size):
            of = members[start : start + size]
            yield of, pad([rows[i] for i in of + of[:1] * (size - len(of))], length)


@jax.jit
def _peaks(captured, spans: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's highest finite score on each direction (-inf without one), and its position, both `[B, E]`, among the tokens
    of `spans [B, P, 2]` that are no attention sinks."""
    scores, norm = captured.scores["resid_post"][0], captured.norm["resid_post"][0]
    spans = ordinary(jnp.minimum(spans, lengths[:, None, None]), norm, lengths)
    here = selected(spans, jnp.broadcast_to(jnp.arange(norm.shape[1]), norm.shape))[..., None]
    scores = jnp.where(here & jnp.isfinite(scores), scores, -jnp.inf)
    return scores.max(1), scores.argmax(1)


def _passage(lm, row, position: int) -> dict[str, Any]:
    start = max(0, position - AROUND)
    before, after = row[start:position], row[position + 1 : position + 1 + AROUND]
    decode = lm.tokenizer.decode
    return {
        "position": position,
        "before": decode(before, skip_special=False),
        "token": decode([row[position]], skip_special=False),
        "after": decode(after, skip_special=False),
    }


def _centre(lm, source, layer, tokens, longest, max_tokens, parts) -> np.ndarray:
    """The mean activation `[L, D]` (at one layer, else 0) of the first texts, each as much as another; kept beside the parts."""
    path = parts / "centre.safetensors"
    lines = list(itertools.islice(_lines(source), SAMPLE))
    digest = _digest(lines)
    if not path.exists():
        rows, _ = _encoded(lm, lines, tokens, longest)
        wanted = Capture(mean={"resid_post": [layer]}, tokens=tokens, sinks=False)
        total, count = np.zeros(lm.config.d_model), 0
        for of, batch in _batches(rows, max_tokens):
            mean = np.asarray(lm.forward(batch, capture=wanted, logits=None).captured.mean["resid_post"])
            total += mean[0, : len(of)].sum(0, dtype=np.float64)
            count += len(of)
        centre = np.zeros((lm.config.n_layers, lm.config.d_model), np.float32)
        centre[layer] = total / max(count, 1)
        files.write_atomically(path, safetensors.numpy.save({"centre": centre}, {"sha256": digest}))
    _check_same(source, digest, path)
    return safetensors.numpy.load_file(path)["centre"]


def _lines(source: pathlib.Path) -> Iterator[Line]:
    with source.open("rb") as file:
        for number, raw in enumerate(file):
            where = f"{source.name}, line {number + 1}"
            try:
                written = raw.decode("utf-8").strip("\r\n" if source.suffix == ".txt" else " \t\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: this is not UTF-8 ({error.reason} at byte {error.start})") from None
            if not written.strip():
                yield Line(number, where, raw, "", None)
                continue
            if source.suffix == ".txt":
                yield Line(number, where, raw, "", written)
                continue
            try:
                record = json.loads(written)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: this is not JSON ({error})") from None
            text = record.get("text", record.get("messages")) if isinstance(record, dict) else None
            if not isinstance(text, str | list) or (isinstance(text, list) and not text):
                raise ValueError(f'{where}: expected {{"text": ...}} or {{"messages": [...]}}')
            yield Line(number, where, raw, str(record.get("id", "")), text or None)


def texts_of(source: str | os.PathLike) -> list:
    """The texts and chats of a .txt or .jsonl file, as `read_dataset` takes them. Raises ValueError naming a faulty line."""
    path = pathlib.Path(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{str(path)!r}: expected a .txt file, one text a line, or a .jsonl file")
    found = [line.text for line in _lines(path) if line.text]
    if not found:
        raise ValueError(f"{str(path)!r} has no texts")
    return found


def _chunks(lines: Iterable[Line]) -> Iterator[list[Line]]:
    part: list[Line] = []
    for line in lines:
        part.append(line)
        if len(part) == CHUNK:
            yield part
            part = []
    if part:
        yield part


def passages_path(out: str | os.PathLike) -> pathlib.Path:
    return pathlib.Path(f"{os.fspath(out)}.passages.jsonl")


def _part(parts: pathlib.Path, number: int) -> pathlib.Path:
    return parts / f"{number:06d}.safetensors"


def _metadata(path: pathlib.Path) -> dict[str, str]:
    with safetensors.safe_open(path, "numpy") as file:
        return file.metadata()


def _digest(lines: list[Line]) -> str:
    return hashlib.sha256(b"".join(line.raw for line in lines)).hexdigest()


def _check_same(source: pathlib.Path, digest: str, path: pathlib.Path) -> None:
    """Raise ValueError unless what `path` was made from is still what `source` holds."""
    if _metadata(path)["sha256"] != digest:
        raise ValueError(
            f"{str(source)!r} has changed since {str(path)!r} was read from it: remove {str(path.parent)!r} to begin again"
        )


def _taken_up(parts: pathlib.Path, settings: dict) -> int:
    """How many parts are done. Raises ValueError where they are of other work."""
    about = parts / "settings.json"
    if not parts.exists():
        parts.mkdir()
    if not about.exists():
        if any(path.suffix != ".part" for path in parts.iterdir()):  # such a one is what a killed write leaves
            raise ValueError(f"{str(parts)!r} holds something else; remove it or write elsewhere")
        files.write_atomically(about, json.dumps(settings, indent=1).encode())
    kept = json.loads(about.read_text())
    differ = [name for name in settings if settings[name] != kept.get(name)]
    if differ:
        raise ValueError(
            f"{str(parts)!r} was begun with a different {', '.join(differ)}; remove it to begin again, or write elsewhere"
        )
    number = 0
    while _part(parts, number).exists():
        number += 1
    return number


def _merge(paths: list[pathlib.Path], names, settings: dict, out: pathlib.Path, top: int) -> Summary:
    """The parts as one output and one file of passages, a part at a time."""
    passages: dict[str, list[dict]] = {name: [] for name in names}
    sums, read, counts = np.zeros(len(names)), 0, np.zeros(4, np.int64)
    for path in paths:
        part = safetensors.numpy.load_file(path)
        there = np.isfinite(part["scores"]).all(1)
        sums += part["scores"][there].sum(0, dtype=np.float64)
        read += int(there.sum())
        counts += len(there), part["tokens"].sum(), part["cut"].sum(), (~there).sum()
        for passage in json.loads(_metadata(path)["passages"]):
            passages[passage["emotion"]].append(passage)
        for name, found in passages.items():
            passages[name] = sorted(found, key=lambda passage: -passage["score"])[:top]
    # Made among the parts, so that what a kill leaves of them is removed with these.
    scores, best = paths[0].with_name("scores"), paths[0].with_name("passages")
    if out.suffix == ".parquet":
        _to_parquet(paths, names, settings, scores)
    else:
        _to_safetensors(paths, names, settings, scores, int(counts[0]))
    lines = [json.dumps(passage, ensure_ascii=False) + "\n" for name in names for passage in passages[name]]
    files.write_atomically(best, "".join(lines).encode())
    os.replace(best, passages_path(out))
    os.replace(scores, out)
    texts, tokens, cut, unread = map(int, counts)
    return Summary(str(out), tuple(names), texts, tokens, cut, unread, sums / max(read, 1), 0.0, 0)


def _to_parquet(paths, names, settings, out) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [("row", pa.int64()), ("id", pa.string()), ("tokens", pa.int32()), ("cut", pa.bool_())]
    fields += [(name, pa.float32()) for name in names]
    schema = pa.schema(fields, {"jaxemo": json.dumps(settings)})
    row = 0
    with pq.ParquetWriter(out, schema) as writer:
        for path in paths:
            part, ids = safetensors.numpy.load_file(path), _metadata(path)["ids"]
            rows = len(part["tokens"])
            columns = [
                np.arange(row, row + rows),
                json.loads(ids) if ids else [None] * rows,
                part["tokens"],
                part["cut"],
            ]
            columns += list(part["scores"].T)
            writer.write_table(
                pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
            )
            row += rows


def _to_safetensors(paths, names, settings, out, n) -> None:
    kinds = {"scores": ("f4", (n, len(names))), "tokens": ("i4", (n,)), "cut": ("?", (n,))}
    tensors = {name: (np.dtype(kind), shape) for name, (kind, shape) in kinds.items()}
    with open(out, "wb") as file:
        file.write(header(tensors, {"names": json.dumps(names), "settings": json.dumps(settings)}))
        for name in tensors:
            for path in paths:
                file.write(safetensors.numpy.load_file(path)[name].tobytes())
