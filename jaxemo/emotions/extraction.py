"""From stories to EmotionVectors (paper, "Extracting emotion vectors").

The residual stream after each block is averaged over each story's tokens from the 50th on, then over the stories of an
emotion; the mean over emotions is taken away, the main components of neutral texts are projected out, and what is left
is scaled to unit length.
"""

import dataclasses
import importlib.metadata

import numpy as np
from tqdm import tqdm

from jaxemo.capture import Capture, ordinary
from jaxemo.emotions import corpus as corpus_lib
from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.language_model import LanguageModel
from jaxemo.tokens import length_batches

SKIP = 50  # tokens at the start of a story that are not counted: the emotion is not there yet
LONGEST = 160  # tokens of a text that are read: few lengths to compile for, and texts weigh alike


def extract(
    lm: LanguageModel,
    corpus: corpus_lib.Corpus | None = None,
    *,
    denoise: float = 0.5,
    skip: int = SKIP,
    longest: int = LONGEST,
    max_tokens: int = 2048,
    progress: bool = True,
) -> EmotionVectors:
    """One direction an emotion and layer, from `corpus` (by default the shipped one).

    Args:
      denoise: principal components of the neutral texts holding this share of their variance are projected out; 0 for none.
      skip: tokens at the start of each text that are left out, at least one: the first is an attention sink.
      longest: tokens of each text that are read at most.
      max_tokens: tokens in a batch, padding included; the memory to spend.

    Raises ValueError for fewer than two emotions, a text of no more than `skip` tokens, or no neutral texts to denoise with.
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
    texts = [story.text for story in corpus.stories] + list(corpus.neutral)
    means, norms = pooled(lm, texts, skip, max_tokens, progress, longest)
    count = len(corpus.stories)
    emotion = np.array([names.index(story.emotion) for story in corpus.stories])
    by_emotion = np.stack([means[:count][emotion == e].mean(0) for e in range(len(names))], axis=1)  # [L, E, D]
    centred = by_emotion - by_emotion.mean(1, keepdims=True)
    removed = [0] * lm.config.n_layers
    if denoise:
        for layer in range(lm.config.n_layers):
            basis = main_components(means[count:, layer], denoise)
            centred[layer] -= centred[layer] @ basis.T @ basis
            removed[layer] = len(basis)
    provenance = {
        "model": lm.source,
        "made_for": lm.config.outline,
        "model_config": repr(lm.config),
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "stories": count,
        "neutral_texts": len(corpus.neutral),
        "skip": skip,
        "longest": longest,
        "denoise": denoise,
        "components_removed": removed,
        "dtype": str(lm.params["embed"].dtype),
        "versions": {name: importlib.metadata.version(name) for name in ("jaxemo", "jax")},
    }
    directions = {name: centred[:, e] for e, name in enumerate(names)}
    vectors = EmotionVectors.from_directions(directions, norms[:count].mean(0), provenance)
    return calibrate(lm, vectors, corpus.neutral, skip, max_tokens, progress, longest) if corpus.neutral else vectors


def pooled(
    lm: LanguageModel, texts, skip: int, max_tokens: int, progress: bool, longest: int = LONGEST
) -> tuple[np.ndarray, np.ndarray]:
    """Each text's mean residual stream `[n, L, D]` and mean residual norm `[n, L]`, float64, of tokens `skip` to `longest`."""
    rows = [lm.tokenizer.encode(text)[:longest] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) <= skip:
            raise ValueError(f"a text has {len(row)} tokens, more than {skip} are needed: {text[:60]!r}")
    L, D = lm.config.n_layers, lm.config.d_model
    means, norms = np.zeros((len(rows), L, D)), np.zeros((len(rows), L))
    wanted = Capture(mean={"resid_post": "all"}, norm={"resid_post": "all"}, tokens=slice(skip, None))
    with tqdm(total=sum(map(len, rows)), unit="tok", desc="stories", disable=not progress) as bar:
        for indices, batch in length_batches(rows, max_tokens):
            captured = lm.forward(batch, capture=wanted, logits=None).captured
            mean, norm = np.asarray(captured.mean["resid_post"]), np.asarray(captured.norm["resid_post"])
            for at, i in enumerate(indices):
                of_tokens = norm[:, at, skip : len(rows[i])].astype(np.float64)
                means[i] = mean[:, at]
                norms[i] = of_tokens.mean(
                    1, where=ordinary(of_tokens[:, None], np.ones_like(of_tokens[:1], bool))[:, 0]
                )
            bar.update(sum(len(rows[i]) for i in indices))
    return means, norms


def main_components(x: np.ndarray, share: float) -> np.ndarray:
    """The fewest principal components `[n, D]` of rows `x` that hold `share` of their variance, orthonormal."""
    _, size, basis = np.linalg.svd(x - x.mean(0), full_matrices=False)
    held = np.cumsum(size**2) / np.sum(size**2)
    return basis[: int(np.searchsorted(held, share)) + 1]


def calibrate(
    lm: LanguageModel, vectors: EmotionVectors, neutral, skip: int, max_tokens: int, progress: bool, longest: int
) -> EmotionVectors:
    """The same vectors with mean and standard deviation of their scores over the tokens of neutral texts."""
    rows = [lm.tokenizer.encode(text)[:longest] for text in neutral]
    wanted = Capture(scores={"resid_post": "all"}, directions=vectors.directions)
    scores = []
    with tqdm(total=sum(map(len, rows)), unit="tok", desc="neutral scores", disable=not progress) as bar:
        for indices, batch in length_batches(rows, max_tokens):
            captured = lm.forward(batch, capture=wanted, logits=None).captured
            found = np.asarray(captured.scores["resid_post"])
            scores += [found[:, at, skip : len(rows[i])] for at, i in enumerate(indices)]
            bar.update(sum(len(rows[i]) for i in indices))
    together = np.concatenate(scores, axis=1).astype(np.float64)  # [L, tokens, E]
    return dataclasses.replace(
        vectors,
        neutral_mean=together.mean(1).astype(np.float32),
        neutral_std=np.maximum(together.std(1), 1e-12).astype(np.float32),
    )
