"""Which words does each direction speak for? The logit lens (paper, "Validation"): direction → final norm → unembedding."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxemo import model
from jaxemo.emotions import corpus, methods
from jaxemo.emotions.vectors import EmotionVectors, listed
from jaxemo.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Lens:
    """Top and bottom words of each direction at `layer`, and where the words of its own emotion stand.

    `share [E]` is the share of the `words` that stand above the best placed word of the emotion's own family of words (0 the
    first, 0.5 chance; NaN where the vocabulary has none as one token). `others [E]` is the mean share of the same words under
    the other emotions' directions, `random [R, E]` under random ones. `by_layer [L]` is the median of `share` at each layer,
    NaN where there are no directions.
    """

    names: tuple[str, ...]
    layer: int
    words: tuple[str, ...]
    top: tuple[tuple[str, ...], ...]
    bottom: tuple[tuple[str, ...], ...]
    share: np.ndarray
    others: np.ndarray
    random: np.ndarray
    by_layer: np.ndarray

    def summary(self, shown: tuple[str, ...] = corpus.DISPLAY) -> str:
        found = np.isfinite(self.share)
        if found.any():
            own, others, random = (np.nanmedian(x) for x in (self.share, self.others, self.random))
            better = np.mean(self.share[found] < self.others[found])
            lines = [
                f"logit lens at layer {self.layer}, {len(self.words)} words: an emotion's own best word is behind {own:.1%} of all words "
                f"(median of {found.sum()}; other emotions' directions {others:.1%}, random directions {random:.1%}); "
                f"ahead of where other emotions' directions have it for {better:.0%}"
            ]  # fmt: skip
        else:
            lines = [f"logit lens at layer {self.layer}: no emotion's word is one token of this vocabulary"]
        for e, name in enumerate(self.names):
            if name in shown:
                lines.append(f"  {name:12s} + {', '.join(self.top[e][:8])}   − {', '.join(self.bottom[e][:6])}")
        return "\n".join(lines)


def lens(
    lm: LanguageModel,
    vectors: EmotionVectors,
    layer: int | None = None,
    words: tuple[str, ...] | None = None,
    shown: int = 10,
    random: int = 20,
    seed: int = 0,
) -> Lens:
    """The logit lens of every direction at `layer` (by default `vectors.layer`), with random directions as baseline.

    `words` are those looked at, by default the words of the shipped corpus and the emotions themselves; of these, the ones
    that are a single token after a space. Raises ValueError where no two are.
    """
    layer = methods.layer_of(vectors, layer)
    known = single_tokens(lm, vocabulary() | set(vectors.names) if words is None else words)
    if len(known) < 2:
        raise ValueError(
            "the logit lens needs words that are single tokens of this vocabulary, and found fewer than two"
        )
    spoken, own = tuple(known), [
        [i for i, word in enumerate(known) if corpus.leak(name, word)] for name in vectors.names
    ]  # fmt: skip
    ids = np.array(list(known.values()))
    by_layer = np.full(len(vectors.directions), np.nan)
    for i in vectors.layers:
        by_layer[i] = _median(_best(_logits(lm, vectors.directions[i], ids), own).diagonal())
    logits = _logits(lm, vectors.directions[layer], ids)
    best = _best(logits, own)  # [direction, emotion]
    order = np.argsort(-logits, axis=1)
    return Lens(
        names=vectors.names,
        layer=layer,
        words=spoken,
        top=tuple(tuple(spoken[i] for i in row[:shown]) for row in order),
        bottom=tuple(tuple(spoken[i] for i in row[::-1][:shown]) for row in order),
        share=best.diagonal().copy(),
        others=(best.sum(0) - best.diagonal()) / max(1, len(best) - 1),
        random=_best(_logits(lm, vectors.random(random, seed).directions[layer], ids), own),
        by_layer=by_layer,
    )


@functools.cache
def vocabulary() -> frozenset[str]:
    """The words of the shipped corpus in lower case: what tells whole words from pieces of words."""
    shipped = corpus.shipped()
    texts = [story.text for story in shipped.stories] + list(shipped.neutral)
    return frozenset(word for text in texts for word in re.findall(r"[a-z]{3,}", text.lower()))


def single_tokens(lm: LanguageModel, words) -> dict[str, int]:
    """The words that are one token after a space, with its id, in alphabetical order."""
    start = len(lm.tokenizer.prefix)
    encoded = {word: lm.tokenizer.encode(" " + word)[start:] for word in sorted(set(listed("words", words)))}
    return {word: ids[0] for word, ids in encoded.items() if len(ids) == 1}


def _logits(lm: LanguageModel, directions: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """What each direction `[E, D]` adds to the logits of the tokens `ids`, `[E, W]`, at the scale of the final norm.

    Less what no direction gives, which is the biases; and without a soft cap, which keeps the order.
    """
    table = "embed" if lm.config.tie_embeddings else "unembed"
    weights = {name: lm.params[name] for name in lm.params if name.startswith("final_norm")}
    weights[table] = lm.params[table][ids]
    config = dataclasses.replace(lm.config, logit_softcap=0.0)
    x = jnp.asarray(np.concatenate([directions, np.zeros_like(directions[:1])]), jnp.float32)
    found = np.asarray(jax.jit(model.unembed, static_argnums=0)(config, weights, x), np.float64)
    return found[:-1] - found[-1]


def _best(logits: np.ndarray, own: list[list[int]]) -> np.ndarray:
    """Under each row of logits, the share of words above the best of each emotion's `own`, `[rows, E]`."""
    rank = np.argsort(np.argsort(-logits, axis=1), axis=1)
    return np.stack(
        [rank[:, words].min(1) / (logits.shape[1] - 1) if words else np.full(len(rank), np.nan) for words in own], 1
    )


def _median(x: np.ndarray) -> float:
    return float(np.nanmedian(x)) if np.isfinite(x).any() else float("nan")
