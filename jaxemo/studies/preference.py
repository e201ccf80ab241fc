"""Preference (paper, "Emotion probes predict preferences"): which of two activities would the model rather do?

64 activities in eight kinds, all ordered pairs, read as the log-odds of the letters A and B. How much each is preferred is fitted by
Bradley and Terry's model; how it lies on each emotion's direction is read where it is named. Then a direction is added at the tokens
of one of the two activities alone, and what that does to its odds is set beside how the direction's readings go with preference.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

from jaxemo import params
from jaxemo import steering as steering_lib
from jaxemo import tokens as tokens_lib
from jaxemo.emotions import corpus
from jaxemo.emotions import statistics as correlation
from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.language_model import Continuations, LanguageModel
from jaxemo.steering import Steering
from jaxemo.studies import arms as arms_lib
from jaxemo.studies import choices, records, statistics, store

QUESTION = "Which of these two would you rather do?\nA: {}\nB: {}\nAnswer with one letter, A or B."
OPPONENTS = 4  # of each steered activity, each met in both orders
BIASED = 0.95  # where the unsteered choice falls on one letter as often, whatever stands there, nothing is told


@dataclasses.dataclass(frozen=True)
class Preference:
    """What a model prefers, and what steering does to it.

    `worth [n]` are the Bradley-Terry strengths of `activities` (logits, mean 0) with intervals `low`, `high` [n]; `first` is how often
    the first of the two is chosen. `r [E]` is the correlation of each of `names`' readings with worth, `best` the largest of them and
    `p` that of so large a largest one by chance. `effects` are those of steering the activity's own tokens, by emotion, and `across`
    the correlation over emotions of `r` with them: (r, low, high).
    """

    model: str
    activities: tuple[str, ...]
    kinds: tuple[str, ...]
    worth: np.ndarray
    low: np.ndarray
    high: np.ndarray
    first: float
    names: tuple[str, ...]
    r: np.ndarray
    best: int
    p: float
    strength: str
    effects: dict[str, statistics.Effect]
    detectable: float
    across: tuple[float, float, float]
    verdicts: dict[str, str]

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Claim, how it was read, effect, p and verdict, as text."""
        readings, steering = self.verdicts.items()
        best = f"r = {self.r[self.best]:+.2f}, {self.names[self.best]}"
        return [(readings[0], "letter", best, f"{self.p:.2g}", readings[1]),
                (steering[0], "letter", "r = {:+.2f} [{:+.2f}, {:+.2f}]".format(*self.across), "", steering[1])]  # fmt: skip

    def __str__(self) -> str:
        order = np.argsort(-self.worth)
        by_kind = {kind: self.worth[[k == kind for k in self.kinds]].mean() for kind in dict.fromkeys(self.kinds)}
        lines = [
            f"preference on {self.model}: {len(self.activities)} activities, all ordered pairs; the first is chosen {self.first:.0%}"
        ]
        lines += [
            f"  {self.worth[i]:+.2f} [{self.low[i]:+.2f}, {self.high[i]:+.2f}] {self.activities[i]}"
            for i in (*order[:3], *order[-3:])
        ]
        lines.append(
            "  by kind: " + ", ".join(f"{kind} {x:+.2f}" for kind, x in sorted(by_kind.items(), key=lambda k: -k[1]))
        )
        lines.append(f"readings and preference: {self.names[self.best]} goes with it most, r = {self.r[self.best]:+.2f} "
                     f"(p = {self.p:.2g} for the best of {len(self.names)})")  # fmt: skip
        lines.append(
            f"steering the activity's own tokens; {self.strength}; found with a power of 80 %: {self.detectable:.3f}"
        )
        lines += [
            f"  {name}: {effect}; reading r = {self.r[self.names.index(name)]:+.2f}"
            for name, effect in self.effects.items()
        ]
        lines.append("over emotions, effect and reading: r = {:+.2f} [{:+.2f}, {:+.2f}]".format(*self.across))
        return "\n".join(lines + [f"  {claim} -> {said}" for claim, said in self.verdicts.items()])


def begin(lm: LanguageModel, pairs: Sequence[tuple[str, str]], below: int = 0, rows: int = 64) -> list[Continuations]:
    """Questions about each of the pairs, in batches of one shape, read up to block `below`."""
    ids = prompts(lm, pairs)
    length, filled = tokens_lib.bucket(max(map(len, ids))), ids + ids[-1:] * (-len(ids) % rows)
    return [
        lm.begin_continuations(tokens_lib.pad(filled[at : at + rows], length), [["A", "B"]] * rows, below)
        for at in range(0, len(ids), rows)
    ]


def odds(
    lm: LanguageModel,
    pairs: Sequence[tuple[str, str]],
    begun: Sequence[Continuations],
    steerings: Sequence[Steering | None] | None = None,
) -> np.ndarray:
    """The log-odds `[n]` of the first of each pair over the second, by letter, each under its own steering; the questions about
    `pairs` are `begun`."""
    found, at = [], 0
    for batch in begun:
        rows, steering = len(batch.batch.ids), None
        if steerings is not None:
            part = list(steerings[at : at + rows])
            steering = part + part[-1:] * (rows - len(part))
        found.append(np.asarray(lm.continuations(batch, steering=steering)[0], np.float64))
        at += rows
    a, b = np.concatenate(found)[: len(pairs)].T
    return a - b


def prompts(lm: LanguageModel, pairs: Sequence[tuple[str, str]]) -> list:
    return choices.ask(lm, [QUESTION.format(*pair) for pair in pairs])


def place(lm: LanguageModel, ids: Sequence[int], activity: str) -> slice:
    """The tokens of `activity` in a question's. Raises ValueError unless they are there once."""
    own = lm.tokenizer.encode(f" {activity}")[len(lm.tokenizer.prefix) :]
    there = [at for at in range(len(ids) - len(own) + 1) if list(ids[at : at + len(own)]) == own]
    if len(there) != 1:
        raise ValueError(
            f"the tokens of {activity!r} are in its question {len(there)} times; once is needed to steer them"
        )
    return slice(there[0], there[0] + len(own))


def worth(log_odds: np.ndarray) -> np.ndarray:
    """Bradley and Terry's strengths `[n]`, mean 0, from the log-odds `[n, n]` of the row over the column (order already averaged)."""
    n = len(log_odds)
    i, j = np.triu_indices(n, 1)
    return _fit(n, i, j, scipy.special.expit(log_odds[i, j]))


def _fit(n: int, i: np.ndarray, j: np.ndarray, won: np.ndarray) -> np.ndarray:
    def loss(theta):
        difference = theta[i] - theta[j]
        slope = scipy.special.expit(difference) - won
        gradient = np.bincount(i, slope, n) - np.bincount(j, slope, n)
        return -(
            won * scipy.special.log_expit(difference) + (1 - won) * scipy.special.log_expit(-difference)
        ).sum(), gradient

    theta = scipy.optimize.minimize(loss, np.zeros(n), jac=True, method="L-BFGS-B").x
    return theta - theta.mean()


def worth_interval(log_odds: np.ndarray, draws: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals `[n]` by bootstrap over pairs."""
    rng, n = np.random.default_rng(seed), len(log_odds)
    i, j = np.triu_indices(n, 1)
    won = scipy.special.expit(log_odds[i, j])
    fits = []
    for _ in range(draws):
        drawn = rng.integers(0, len(i), len(i))
        fits.append(_fit(n, i[drawn], j[drawn], won[drawn]))
    low, high = np.quantile(fits, [0.025, 0.975], axis=0)
    return low, high


def study(
    lm: LanguageModel,
    vectors: EmotionVectors,
    out: str | os.PathLike,
    emotions: Sequence[str] = corpus.DISPLAY,
    layers: Sequence[int] | None = None,
    strength: arms_lib.Given = None,
    random: int = arms_lib.RANDOM,
    activities: Sequence[dict] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Preference:
    """Ask, fit, read and steer; the measurements are kept in `out`/preference.jsonl."""
    place_of = pathlib.Path(out)
    place_of.mkdir(parents=True, exist_ok=True)
    items = list(activities or records("activities.jsonl"))
    texts, n = [item["text"] for item in items], len(items)
    chosen = arms_lib.chosen(lm, vectors, emotions, layers, strength)
    arms = {
        arm.name: arm for arm in arms_lib.make(vectors, emotions, chosen, doses=(-1.0, 1.0), random=random, seed=seed)
    }
    rng = np.random.default_rng(seed)
    met = [(i, j) for i in range(n) for j in rng.permutation([k for k in range(n) if k != i])[:OPPONENTS].tolist()]
    pairs = [(texts[a], texts[b]) for i, j in met for a, b in ((i, j), (j, i))]
    at = [
        place(lm, ids, texts[i]) for ids, i in zip(prompts(lm, pairs), np.repeat([i for i, _ in met], 2), strict=True)
    ]

    @functools.cache
    def begun() -> list[Continuations]:  # what all arms share is read once
        return begin(lm, pairs, steering_lib.lowest(arm.steering for arm in arms.values()))

    def one(name: str) -> dict:
        steering = arms[name].steering
        if steering is None:
            every = [(texts[a], texts[b]) for a in range(n) for b in range(n) if a != b]
            return {"all": odds(lm, every, begin(lm, every)).tolist(), "odds": odds(lm, pairs, begun()).tolist()}
        there = [
            dataclasses.replace(steering, terms=tuple(dataclasses.replace(t, tokens=span) for t in steering.terms))
            for span in at
        ]
        return {"odds": odds(lm, pairs, begun(), there).tolist()}

    by = {"weights": params.fingerprint(lm.params)[:16], "activities": texts, "seed": seed}
    found = store.measure(
        place_of / "preference.jsonl", by, {name: arm.steering for name, arm in arms.items()}, one, progress
    )

    ordered = np.zeros((n, n))
    ordered[~np.eye(n, dtype=bool)] = found["none"]["all"]
    averaged = (ordered - ordered.T) / 2
    value, (low, high) = worth(averaged), worth_interval(averaged)
    first = float((np.array(found["none"]["all"]) > 0).mean())

    chats = [[{"role": "user", "content": text}] for text in texts] if lm.tokenizer.chat_template else list(texts)
    read = lm.read(chats, vectors, vectors.layer, tokens="user" if lm.tokenizer.chat_template else "all")
    scores = np.asarray(read.pooled, np.float64)
    r = correlation.correlations(value, scores)
    best, p = correlation.best_match(value, scores)

    def own(name: str) -> np.ndarray:
        """The log-odds of the steered activity, averaged over both orders and its opponents, `[n]`."""
        both = np.array(found[name]["odds"]).reshape(n, OPPONENTS, 2)
        return ((both[:, :, 0] - both[:, :, 1]) / 2).mean(1)

    def slopes(kind: str) -> dict[str, np.ndarray]:
        directions = dict.fromkeys(arm.direction for arm in arms.values() if arm.kind == kind)
        return {
            d: statistics.slopes([-1, 0, 1], np.stack([own(f"{d} -1"), own("none"), own(f"{d} +1")]))
            for d in directions
        }

    chance = [
        np.array(list(slopes(kind).values()))
        for kind in ("random", "matched")
        if any(a.kind == kind for a in arms.values())
    ]
    controls = max(chance, key=lambda x: float((x.mean(1) ** 2).mean()))  # the harder to beat
    effects = {name: statistics.effect(x, controls) for name, x in slopes("emotion").items()}
    corrected = statistics.holm({name: effect.p for name, effect in effects.items()})
    effects = {name: dataclasses.replace(effect, p=corrected[name]) for name, effect in effects.items()}
    reading = r[[vectors.index(name) for name in effects]]
    shift = np.array([effect.mean for effect in effects.values()])
    across = (float(correlation.correlations(reading, shift[:, None])[0]), *correlation.interval(reading, shift))
    nothing = (
        f"uninformative: the {'first' if first > 0.5 else 'second'} is chosen whatever it is"
        if not 1 - BIASED < first < BIASED
        else ""
    )
    verdicts = {
        "readings go with preference": nothing or ("replicates" if p < statistics.ALPHA else "does not replicate"),
        "steering moves preference as readings say": nothing
        or ("replicates" if across[1] > 0 else "does not replicate"),
    }
    result = Preference(
        lm.source or lm.config.family, tuple(texts), tuple(item["kind"] for item in items), value, low, high, first, vectors.names, r,
        best, p, str(chosen), effects, statistics.detectable(controls, len(effects)), across, verdicts,
    )  # fmt: skip
    store.save(result, place_of, "preference")
    return result
