"""From stories to EmotionVectors (paper, "Extracting emotion vectors").

The residual stream after each block is averaged over each story's tokens from the 50th on, then over the stories of an
emotion; the mean over emotions is taken away, the main components of neutral texts are projected out, and what is left
is scaled to unit length. Texts are read in a stream: what is kept of them are float64 sums, whatever their number.
"""

import dataclasses
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from tqdm import tqdm

from jaxemo import files, params
from jaxemo.capture import Capture
from jaxemo.emotions import corpus as corpus_lib
from jaxemo.emotions.vectors import EmotionVectors, listed, reading_layer
from jaxemo.language_model import LanguageModel
from jaxemo.steering import resolve_layers
from jaxemo.tokens import length_batches

SKIP = 50  # tokens at the start of a story that are not counted: the emotion is not there yet
LONGEST = 160  # tokens of a text that are read: few lengths to compile for, and texts weigh alike
REPLICATES = 50  # of the bootstrap
CHUNK = 4096  # texts that are tokenised, and sorted by length, at a time
EVERY = 20.0  # seconds between checkpoints


def extract(
    lm: LanguageModel,
    corpus: corpus_lib.Corpus | None = None,
    *,
    layers="all",
    denoise: float = 0.5,
    skip: int = SKIP,
    longest: int = LONGEST,
    max_tokens: int = 2048,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> EmotionVectors:
    """One direction an emotion and layer, from `corpus` (by default the shipped one).

    Args:
      layers: those to extract at; the vectors know no others.
      denoise: principal components of the neutral texts holding this share of their variance are projected out; 0 for none.
        The directions before that are kept as `raw`.
      skip: tokens at the start of each text that are left out, at least one: the first is an attention sink. Other sinks
        are left out wherever they are (see `capture.ordinary`).
      longest: tokens of each text that are read at most.
      max_tokens: tokens in a batch, padding included; the memory to spend.
      checkpoint: a file that the sums are kept in while the work goes on. Where it exists, work is taken up from it, and the
        result is the same to the bit. It is left there: remove it once the vectors are saved.

    `measured` holds, for the directions before denoising, the `length [L, E]` of each emotion's mean from the mean over emotions
    and the `spread [L, E]` of its stories (root mean square distance from their mean); and at `vectors.layer` two cosines, NaN
    for emotions on fewer than two topics. `half_cosine [E]` is that of the directions from two halves of the topics: about 0
    for labels without meaning. `self_cosine [E]` is the mean cosine of a direction with itself extracted from a bootstrap
    sample of the topics, as the paper reports it; the sample shares stories with the whole, so that labels without meaning
    reach about 0.7.

    Raises ValueError for fewer than two emotions, texts of no more than `skip` tokens, no neutral texts to denoise with, or
    a checkpoint of another extraction.
    """
    corpus = corpus or corpus_lib.shipped()
    if not isinstance(corpus, corpus_lib.Corpus):
        raise TypeError(
            f"corpus is {type(corpus).__name__}, not a Corpus; `jaxemo.emotions.corpus.load(path)` reads one"
        )
    names = corpus.emotions
    if len(names) < 2:
        raise ValueError(
            f"{corpus.name}: at least two emotions are needed, found {list(names)}; their mean is the baseline"
        )
    if isinstance(skip, bool) or not isinstance(skip, int | np.integer) or skip < 1:
        raise ValueError(f"skip={skip!r}: at least the first token of each text, an attention sink, must be left out")
    if not 0 <= denoise < 1:
        raise ValueError(f"denoise={denoise!r}: expected a share of the variance, from 0 to less than 1")
    if denoise and len(corpus.neutral) < 2:
        raise ValueError(f"{corpus.name}: no neutral texts to denoise with; add some or use denoise=0")
    at = sorted(resolve_layers(layers, lm.config.n_layers))
    denoise, skip, max_tokens = float(denoise), int(skip), int(max_tokens)
    longest = min(int(longest), lm.config.max_positions)
    provenance: dict[str, Any] = {
        "model": lm.source,
        "made_for": lm.config.outline,
        "model_config": repr(lm.config),
        "model_sha256": params.fingerprint(lm.params),
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "stories": len(corpus.stories),
        "neutral_texts": len(corpus.neutral),
        "layers": at,
        "skip": skip,
        "longest": longest,
        "max_tokens": max_tokens,
        "denoise": denoise,
        "dtype": str(lm.params["embed"].dtype),
        "versions": {name: importlib.metadata.version(name) for name in ("jaxemo", "jax")},
    }
    state = _sums(lm, corpus, at, skip, longest, max_tokens, checkpoint, provenance, progress)

    D, count = lm.config.d_model, state["count"]
    means = np.moveaxis(state["sum"] / count[:, None, None], 0, 1)  # [n, E, D]
    raw = means - means.mean(1, keepdims=True)
    scatter = np.moveaxis(state["square"], 0, 1) - count * np.sum(means**2, -1)
    spread = np.sqrt(np.maximum(scatter, 0) / np.where(count > 1, count - 1, np.nan))
    bases = (
        [main_components(triangle, denoise) for triangle in state["neutral"]]
        if denoise
        else [np.zeros((0, D))] * len(at)
    )
    clean = np.stack([_without(v, basis) for v, basis in zip(raw, bases, strict=True)])
    reading = at.index(reading_layer(at, lm.config.n_layers))
    provenance["components_removed"] = [len(basis) for basis in bases]

    def everywhere(array):  # at all layers of the model, 0 at those not extracted
        full = np.zeros((lm.config.n_layers, *array.shape[1:]))
        full[at] = array
        return full

    def vectors(directions, **also):
        of = {name: everywhere(directions[:, e]) for e, name in enumerate(names)}
        made = EmotionVectors.from_directions(of, everywhere(state["norm"] / len(corpus.stories)), provenance)
        return dataclasses.replace(made, **also)

    self_cosine, half_cosine = _stability(state, clean[reading], bases[reading])
    measured = {
        "self_cosine": self_cosine.astype(np.float32),
        "half_cosine": half_cosine.astype(np.float32),
        "length": everywhere(np.linalg.norm(raw, axis=-1)).astype(np.float32),
        "spread": everywhere(spread).astype(np.float32),
    }
    found = vectors(clean, raw=vectors(raw) if denoise else None, measured=measured)
    if corpus.neutral:
        found = calibrate(lm, found, corpus.neutral, skip, max_tokens, progress, longest)
    return found


def _sums(lm, corpus, at, skip, longest, max_tokens, checkpoint, provenance, progress) -> dict[str, np.ndarray]:
    """One pass over stories and neutral texts: the sums that everything else follows from.

    `sum [E, n, D]`, `count [E]`, `square [E, n]` of squared lengths, `norm [n]` of stories' mean residual norms; `neutral
    [n, r, 1 + D]`, whose product with itself is that of the rows (1, mean of a neutral text); `boot [R + 2, E,
    D]` and `boot_count [R + 2, E]`, sums at the reading layer in which every topic counts as often as it was drawn (`_draws`).
    """
    n, D, E = len(at), lm.config.d_model, len(corpus.emotions)
    index = {name: e for e, name in enumerate(corpus.emotions)}
    drawn = _draws(corpus.stories)
    reading = at.index(reading_layer(at, lm.config.n_layers))
    state = {
        "done": np.zeros(2, np.int64),  # texts in whole chunks, and batches after them
        "sum": np.zeros((E, n, D)),
        "count": np.zeros(E),
        "square": np.zeros((E, n)),
        "norm": np.zeros(n),
        "neutral": np.zeros((n, 0, 1 + D)),
        "boot": np.zeros((REPLICATES + 2, E, D)),
        "boot_count": np.zeros((REPLICATES + 2, E)),
    }
    if checkpoint is not None:
        state = _restored(checkpoint, provenance, state)
    texts = [story.text for story in corpus.stories] + list(corpus.neutral)
    _long_enough(texts, (len(lm.tokenizer.encode(text)) for text in texts), min(skip, longest - 1))
    saved = time.monotonic()
    chunk, skipped = int(state["done"][0]), int(state["done"][1])
    with tqdm(total=len(texts), initial=chunk, unit="text", desc="stories", disable=not progress) as bar:
        for start in range(chunk, len(texts), CHUNK):
            part = texts[start : start + CHUNK]
            for batch, (indices, mean, norm) in enumerate(
                _means(lm, part, at, skip, longest, max_tokens, skipped), skipped
            ):
                neutral = []
                for j, i in enumerate(start + i for i in indices):
                    x = mean[:, j].astype(np.float64)
                    if i >= len(corpus.stories):
                        neutral.append(np.concatenate([np.ones((n, 1)), x], axis=1))
                        continue
                    e = index[corpus.stories[i].emotion]
                    state["sum"][e] += x
                    state["count"][e] += 1
                    state["square"][e] += np.sum(x**2, axis=1)
                    state["norm"] += norm[:, j]
                    state["boot"][:, e] += drawn[:, i, None] * x[reading]
                    state["boot_count"][:, e] += drawn[:, i]
                if neutral:
                    state["neutral"] = _compressed(
                        np.concatenate([state["neutral"], np.stack(neutral, axis=1)], axis=1)
                    )
                state["done"] = np.array([start, batch + 1])
                bar.update(len(indices))
                if checkpoint is not None and time.monotonic() - saved > EVERY:
                    _save(checkpoint, provenance, state)
                    saved = time.monotonic()
            state["done"], skipped = np.array([start + len(part), 0]), 0
    if checkpoint is not None:
        _save(checkpoint, provenance, state)
    return state


def _means(lm, texts, at, skip, longest, max_tokens, skipped=0) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Batches of texts as (indices, mean residual stream `[n, b, D]`, mean residual norm `[n, b]`), the first `skipped` left out."""
    rows: list[Any] = [np.array(lm.tokenizer.encode(text)[:longest], np.int32) for text in texts]
    _long_enough(texts, map(len, rows), skip)
    wanted = {"resid_post": at}
    capture = Capture(mean=wanted, mean_norm=wanted, tokens=slice(skip, None), sinks=False)
    for indices, batch in length_batches(rows, max_tokens)[skipped:]:
        captured = lm.forward(batch, capture=capture, logits=None).captured
        yield indices, np.asarray(captured.mean["resid_post"]), np.asarray(captured.mean_norm["resid_post"])


def _long_enough(texts, lengths, skip: int) -> None:
    short = [(text, n) for text, n in zip(texts, lengths, strict=True) if n <= skip]
    if short:
        text, n = short[0]
        others = f", and {len(short) - 1} others" if len(short) > 1 else ""
        raise ValueError(f"a text has {n} tokens, more than {skip} are needed: {text[:60]!r}{others}")


def pooled(
    lm: LanguageModel, texts: Sequence[str], skip: int = SKIP, max_tokens: int = 2048, progress: bool = False,
    longest: int = LONGEST, layers="all",
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Each text's mean residual stream `[n, L, D]` and mean residual norm `[n, L]`, float32, of tokens `skip` to `longest`."""
    texts, at = listed("texts", texts), list(resolve_layers(layers, lm.config.n_layers))
    means = np.zeros((len(texts), len(at), lm.config.d_model), np.float32)
    norms = np.zeros((len(texts), len(at)), np.float32)
    with tqdm(total=len(texts), unit="text", desc="activations", disable=not progress) as bar:
        for indices, mean, norm in _means(lm, texts, at, skip, longest, max_tokens):
            for j, i in enumerate(indices):
                means[i], norms[i] = mean[:, j], norm[:, j]
            bar.update(len(indices))
    return means, norms


def _draws(stories) -> np.ndarray:
    """How often each replicate of the bootstrap draws each story, and after them each half, `[R + 2, stories]`.

    Drawn are topics (the first stories of an emotion on a topic, the second ones, ...): the same for all emotions, so that a
    topic cancels in a replicate as it does in the whole.
    """
    seen: dict[tuple[str, str], int] = {}
    drawn: dict[tuple[str, int], int] = {}
    of = np.empty(len(stories), np.int64)
    for i, story in enumerate(stories):
        nth = seen[story.emotion, story.topic] = seen.get((story.emotion, story.topic), -1) + 1
        of[i] = drawn.setdefault((story.topic, nth), len(drawn))
    again = np.random.default_rng(0).multinomial(len(drawn), np.full(len(drawn), 1 / len(drawn)), REPLICATES)
    half = np.arange(len(drawn)) % 2
    return np.concatenate([again, [half, 1 - half]])[:, of]


def _stability(state, directions: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean cosine `[E]` of `directions [E, D]` with those of the bootstrap's replicates, and that of the halves' directions.

    A replicate that drew no story of an emotion counts as 0.
    """
    drawn = state["boot_count"][..., None]
    there = drawn > 0
    means = np.divide(state["boot"], drawn, out=np.zeros(state["boot"].shape), where=there)
    baseline = means.sum(1, keepdims=True) / np.maximum(there.sum(1, keepdims=True), 1)
    again = _without(np.where(there, means - baseline, 0), basis)
    again /= np.maximum(np.linalg.norm(again, axis=-1, keepdims=True), 1e-300)
    unit = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    two = there[-2:].all((0, 2))  # stories in both halves: on two topics at least
    own, halves = np.mean(np.sum(again[:-2] * unit, -1), 0), np.sum(again[-2] * again[-1], -1)
    return np.where(two, own, np.nan), np.where(two, halves, np.nan)


def _compressed(rows: np.ndarray) -> np.ndarray:
    """`rows [n, r, 1 + D]` as a triangle with the same products, once there are more than twice as many as columns."""
    return _triangle(rows) if rows.shape[1] > 2 * rows.shape[2] else rows


def _triangle(rows: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.qr(rows, mode="r"))


def _without(v: np.ndarray, basis: np.ndarray) -> np.ndarray:
    return v - v @ basis.T @ basis


def main_components(rows: np.ndarray, share: float) -> np.ndarray:
    """The fewest principal components `[n, D]`, orthonormal, that hold `share` of the variance of x, from `rows` (1, x).

    The triangle of a QR decomposition of (1, x) holds the mean in its first row, and below it a square root of x's scatter
    about that mean.
    """
    _, size, basis = np.linalg.svd(_triangle(rows)[1:, 1:], full_matrices=False)
    held = np.cumsum(size**2) / np.sum(size**2)
    return basis[: int(np.searchsorted(held, share)) + 1]


def calibrate(
    lm: LanguageModel, vectors: EmotionVectors, neutral, skip: int, max_tokens: int, progress: bool, longest: int
) -> EmotionVectors:
    """The same vectors with mean and standard deviation of their scores over the tokens of neutral texts."""
    both = [vectors] if vectors.raw is None else [vectors, vectors.raw]
    directions = np.concatenate([v.directions for v in both], axis=1)
    at = list(vectors.layers)
    rows = [lm.tokenizer.encode(text)[:longest] for text in neutral]
    wanted = Capture(scores={"resid_post": at}, directions=directions)
    sums, count = np.zeros((2, len(at), directions.shape[1])), 0
    with tqdm(total=len(rows), unit="text", desc="neutral scores", disable=not progress) as bar:
        for indices, batch in length_batches(rows, max_tokens):
            captured = lm.forward(batch, capture=wanted, logits=None).captured
            found = np.asarray(captured.scores["resid_post"])
            for j, i in enumerate(indices):
                scores = found[:, j, skip : len(rows[i])].astype(np.float64)
                sums += scores.sum(1), np.square(scores).sum(1)
                count += scores.shape[1]
            bar.update(len(indices))
    mean = sums[0] / count
    std = np.sqrt(np.maximum(sums[1] / count - mean**2, 0))

    def full(array, fill):
        out = np.full(directions.shape[:2], fill, np.float32)
        out[at] = array
        return np.split(out, len(both), axis=1)

    calibrated = [
        dataclasses.replace(v, neutral_mean=m, neutral_std=s)
        for v, m, s in zip(both, full(mean, 0), full(np.maximum(std, 1e-12), 1), strict=True)
    ]
    return dataclasses.replace(calibrated[0], raw=calibrated[1] if len(both) > 1 else None)


def _save(path, provenance, state) -> None:
    files.write_atomically(path, safetensors.numpy.save(state, {"provenance": json.dumps(provenance)}))


def _restored(path, provenance, state) -> dict[str, np.ndarray]:
    """The state kept in `path`, or the one given where there is none. Raises ValueError where it is of other work."""
    if not os.path.exists(path):
        files.check_writable(path)
        return state
    try:
        with safetensors.safe_open(path, "numpy") as file:
            kept = json.loads((file.metadata() or {})["provenance"])
            found = {name: file.get_tensor(name) for name in state}
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not the checkpoint of an extraction; remove it") from error
    compared = set(provenance) - {"model"}  # however its path is spelled
    differ = [
        name for name in provenance if name in compared and json.dumps(provenance[name]) != json.dumps(kept.get(name))
    ]
    if differ:
        raise ValueError(
            f"{os.fspath(path)!r} is the checkpoint of another extraction, with a different {', '.join(differ)}; remove it or "
            "write elsewhere"
        )
    return found
