"""Does a direction mean what its name says? The text steering test (paper, "Validation by steering").

While a direction is added at every token of "He feels" or "I feel", the log-probability of the emotion's own word as the
next word should rise; it should not under random directions of the same norm, and a question of fact should keep its answer.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from jaxemo.capture import Capture
from jaxemo.emotions.vectors import EmotionVectors, listed
from jaxemo.language_model import LanguageModel
from jaxemo.steering import Steering
from jaxemo.tokens import pad

USABLE = 0.3  # nats
PREFIXES = ("He feels", "I feel")
FACTS = (
    ("The capital of France is", "Paris"),
    ("Water is made of hydrogen and", "oxygen"),
    ("The opposite of up is", "down"),
)


@dataclasses.dataclass(frozen=True)
class TextTest:
    """Changes in log-probability, in nats, against no steering, averaged over prefixes.

    `own [S, E]`: of each emotion's word under its own direction at each strength. `others [S, E]`: the mean change of the
    other emotions' words. `random [S, R, E]`: of each word under random directions. `facts [S, E]` and
    `random_facts [S, R]`: of the right answers to questions of fact. `dose [S, E]`: ‖x' − x‖ / ‖x‖ at the steered layer.
    """

    names: tuple[str, ...]
    layer: int
    strengths: tuple[float, ...]
    own: np.ndarray
    others: np.ndarray
    random: np.ndarray
    facts: np.ndarray
    random_facts: np.ndarray
    dose: np.ndarray

    @property
    def best(self) -> int:
        """The usable strength (its index) at which the own words rise most on average.

        Usable is a strength that costs the questions of fact at most `USABLE` nats; the weakest, if none is.
        """
        usable = [s for s in range(len(self.strengths)) if self.facts[s].mean() > -USABLE] or [0]
        return max(usable, key=lambda s: self.own[s].mean())

    def summary(self) -> str:
        lines = ["strength   own word rises   own mean   other words   random mean ± sd   facts   dose"]
        for s, strength in enumerate(self.strengths):
            lines.append(
                f"{strength:8.2f}   {(self.own[s] > 0).sum():6d} of {len(self.names):<4d}   {self.own[s].mean():+8.2f}"
                f"   {self.others[s].mean():+11.2f}   {self.random[s].mean():+8.2f} ± {self.random[s].mean(-1).std():4.2f}"
                f"   {self.facts[s].mean():+7.2f}   {self.dose[s].mean():.2f}{'   best' if s == self.best else ''}"
            )
        return "\n".join(lines)


def word_logprobs(
    lm: LanguageModel,
    prefixes: Sequence[str],
    words: Sequence[str],
    steerings: Sequence[Steering | None],
    rows: int = 128,
    progress: bool = False,
) -> np.ndarray:
    """Log-probability `[C, P, W]` of each word (all its tokens) right after each prefix under each of C steerings."""
    prefixes, words = listed("prefixes", prefixes), listed("words", words)
    texts: dict[tuple[int, ...], int] = {}  # every token sequence that is followed by a token of a word, once
    paths: list[list] = []  # for [prefix][word]: (sequence, next token) pairs
    for prefix in prefixes:
        start = tuple(lm.tokenizer.encode(prefix))
        paths.append([])
        for word in words:
            tail = lm.tokenizer.encode(" " + word)[len(lm.tokenizer.prefix) :]
            steps = [(start + tuple(tail[:j]), token) for j, token in enumerate(tail)]
            for sequence, _ in steps:
                texts.setdefault(sequence, len(texts))
            paths[-1].append([(texts[sequence], token) for sequence, token in steps])
    jobs = [(c, sequence) for c in range(len(steerings)) for sequence in texts]
    length = max(map(len, texts))  # exactly: these rows are too short to fill a bucket
    steps = sorted({step for path in paths for word in path for step in word})
    found = np.empty((len(steerings), len(steps)))
    for at in tqdm(range(0, len(jobs), rows), unit="batch", desc="next words", disable=not progress):
        part = jobs[at : at + rows]
        filled = part + [part[0]] * (rows - len(part))
        batch = pad([sequence for _, sequence in filled], length)
        logits = np.asarray(lm.forward(batch, [steerings[c] for c, _ in filled], logits="last").logits)
        top = logits.max(-1, keepdims=True)
        logps = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True, dtype=np.float64))
        for (c, sequence), row in zip(part, logps, strict=False):
            for j, (text, token) in enumerate(steps):
                if text == texts[sequence]:
                    found[c, j] = row[token]
    column = {step: j for j, step in enumerate(steps)}
    return np.stack(
        [np.stack([found[:, [column[step] for step in word]].sum(1) for word in path], 1) for path in paths], axis=1
    )


def text_test(
    lm: LanguageModel,
    vectors: EmotionVectors,
    strengths: Sequence[float] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5),
    layer: int | None = None,
    random: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> TextTest:
    """Run the text steering test for every emotion of `vectors` at one layer, with `random` control directions.

    The layer is by default nine tenths of the way up: the test asks for the very next word (chosen on SmolLM2-135M).
    """
    L = len(vectors.directions)
    layer = min(round(0.9 * L), L - 1) if layer is None else layer
    if random < 2:
        raise ValueError(f"random={random}: a steering result needs random directions to be judged by, at least 2")
    controls = vectors.random(random, seed)
    E, R, S = len(vectors.names), random, len(strengths)
    steerings: list[Steering | None] = [None]
    steerings += [vectors.steer(name, s, [layer]) for s in strengths for name in vectors.names]
    steerings += [controls.steer(name, s, [layer]) for s in strengths for name in controls.names]
    logps = word_logprobs(lm, PREFIXES, vectors.names, steerings, progress=progress).mean(1)
    change = logps[1:] - logps[0]
    by_emotion = change[: S * E].reshape(S, E, E)  # [strength, direction, word]
    own = np.einsum("see->se", by_emotion)
    questions, answers = zip(*FACTS, strict=True)
    right = np.einsum("cff->cf", word_logprobs(lm, questions, answers, steerings, progress=progress)).mean(1)
    fact_change = right[1:] - right[0]
    return TextTest(
        names=vectors.names,
        layer=layer,
        strengths=tuple(strengths),
        own=own,
        others=(by_emotion.sum(2) - own) / (E - 1),
        random=change[S * E :].reshape(S, R, E),
        facts=fact_change[: S * E].reshape(S, E),
        random_facts=fact_change[S * E :].reshape(S, R),
        dose=_dose(lm, steerings[1 : 1 + S * E], layer).reshape(S, E),
    )


def _dose(lm: LanguageModel, steerings: Sequence[Steering | None], layer: int) -> np.ndarray:
    """Mean ‖x' − x‖ / ‖x‖ at `layer` over the tokens of the first prefix but its first (often an attention sink)."""
    batch = lm.tokenize([PREFIXES[0]] * len(steerings))
    out = lm.forward(batch, steerings, Capture(dose=True), logits=None)
    return np.asarray(out.captured.dose)[layer, :, 1 : int(batch.lengths[0])].mean(1)
