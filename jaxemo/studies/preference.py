"""Preference (paper, "Emotion probes predict preferences"): which of two activities would the model rather do?

64 activities in eight kinds, all ordered pairs, read as the log-odds of the letters A and B. How much each is preferred is fitted by
Bradley and Terry's model; how it lies on each emotion's direction is read where it is named. Then a direction is added at the tokens
of one of the two activities alone, and what that does to its odds is set beside how the direction's readings go with preference. A
direction that makes letters an unlikely answer is dropped, openly.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

from jaxemo import grid
from jaxemo import tokens as tokens_lib
from jaxemo.emotions import corpus
from jaxemo.emotions import statistics as correlation
from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.language_model import LanguageModel
from jaxemo.steering import Steering
from jaxemo.studies import arms as arms_lib
from jaxemo.studies import choices, records, statistics, store
from jaxemo.studies.arms import Arm

QUESTION = "Which of these two would you rather do?\nA: {}\nB: {}\nAnswer with one letter, A or B."
LETTERS = ("A", "B")
STEERED = "activity"  # what the tokens of the activity that is steered are called in its question
ROWS = 256  # a quarter of them are read at once
OPPONENTS = 2  # of each steered activity, each met in both orders
FEWEST = 3  # emotions that a correlation over them is made of
BIASED = 0.95  # where the unsteered choice falls on one letter as often, whatever stands there, nothing is told


@dataclasses.dataclass(frozen=True)
class Preference:
    """What a model prefers, and what steering does to it.

    `worth [n]` are the Bradley-Terry strengths of `activities` (logits, mean 0) with intervals `low`, `high` [n]; `first` is how often
    the first of the two is chosen, and `valid` the probability that the answer is a letter. `r [E]` is the correlation of each of `names`'
    readings with worth, `best` the largest of them and `p` that of so large a largest one by chance; `length_r` is how worth goes with
    the activities' lengths in tokens, and `adjusted` is the best one's r with these taken out of both. `effects` are those of steering
    the activity's own tokens, by emotion, `chance` the root mean square effects of "random" and "matched" directions, and `across` the
    correlation over emotions of `r` with the effects: (r, low, high). `dropped` are the arms in which letters are no longer an answer.
    """

    model: str
    activities: tuple[str, ...]
    kinds: tuple[str, ...]
    worth: np.ndarray
    low: np.ndarray
    high: np.ndarray
    first: float
    valid: float
    names: tuple[str, ...]
    r: np.ndarray
    best: int
    p: float
    length_r: float
    adjusted: float
    strength: str
    effects: dict[str, statistics.Effect]
    chance: dict[str, float]
    dropped: tuple[str, ...]
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
            f"preference on {self.model}: {len(self.activities)} activities, all ordered pairs; the first is chosen {self.first:.0%}, and "
            f"an answer is a letter with a probability of {self.valid:.0%}"
        ]
        lines += [
            f"  {self.worth[i]:+.2f} [{self.low[i]:+.2f}, {self.high[i]:+.2f}] {self.activities[i]}"
            for i in (*order[:3], *order[-3:])
        ]
        lines.append(
            "  by kind: " + ", ".join(f"{kind} {x:+.2f}" for kind, x in sorted(by_kind.items(), key=lambda k: -k[1]))
        )
        lines.append(f"readings and preference: {self.names[self.best]} goes with it most, r = {self.r[self.best]:+.2f} "
                     f"(p = {self.p:.2g} for the best of {len(self.names)}); r = {self.length_r:+.2f} of worth with the number of tokens, "
                     f"without which the best is {self.adjusted:+.2f}")  # fmt: skip
        chance = ", ".join(f"{kind} {rms:.3f}" for kind, rms in self.chance.items())
        lines.append(
            f"steering the activity's own tokens; {self.strength}; root mean square effect of directions that mean nothing here: {chance}; "
            f"found with a power of 80 %: {self.detectable:.3f}"
        )
        lines += [
            f"  {name}: {effect}; reading r = {self.r[self.names.index(name)]:+.2f}"
            for name, effect in self.effects.items()
        ]
        if self.dropped:
            lines.append(f"dropped, letters are no longer an answer: {', '.join(self.dropped)}")
        lines.append("over emotions, effect and reading: r = {:+.2f} [{:+.2f}, {:+.2f}]".format(*self.across))
        return "\n".join(lines + [f"  {claim} -> {said}" for claim, said in self.verdicts.items()])


def odds(
    lm: LanguageModel,
    pairs: Sequence[tuple[str, str]],
    conditions: Mapping[str, Steering | None],
    out: str | os.PathLike,
    steered: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Under each of the `conditions`, the log-odds of the first of each pair over the second, by letter, and the probability that the
    answer is a letter, `[2, n]`. A condition acts at the tokens of the `steered` activity of each pair alone.

    `out` is the store of a sweep; the same call goes on where a killed one was.
    """
    questions = prompts(lm, pairs)
    if steered:
        questions = [_marked(ids, place(lm, ids, activity)) for ids, activity in zip(questions, steered, strict=True)]
        conditions = {name: of and _at(of, STEERED) for name, of in conditions.items()}
    made = grid.sweep(
        lm,
        tokens_lib.pad(questions),
        conditions,
        max_new_tokens=0,
        words=LETTERS,
        rows=ROWS,
        out=out,
        progress=progress,
    )
    assert made.words is not None
    a, b = np.moveaxis(made.words[:, :, 0].astype(np.float64), -1, 0)
    return dict(zip(made.conditions, np.stack([a - b, np.exp(a) + np.exp(b)], 1), strict=True))


def _marked(ids: Sequence[int], where: slice) -> tokens_lib.Ids:
    """The same token ids, of which those of an activity are a turn."""
    marked = tokens_lib.Ids(ids)
    marked.turns = (*getattr(ids, "turns", ()), tokens_lib.Turn(STEERED, where.start, where.stop))
    return marked


def _at(steering: Steering, tokens: tokens_lib.Selection) -> Steering:
    return dataclasses.replace(
        steering, terms=tuple(dataclasses.replace(term, tokens=tokens) for term in steering.terms)
    )


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


def steer(
    arms: Sequence[Arm], found: Mapping[str, np.ndarray], n: int
) -> tuple[dict[str, statistics.Effect], dict[str, float], tuple[str, ...], float]:
    """What steering one of `n` activities does, from every arm's answers: emotions' effects, root mean square effects of random
    directions, the arms that were dropped, and the effect found with a power of 80 %."""
    answered = {name: of[1].mean() for name, of in found.items()}
    dropped = tuple(arm.name for arm in arms if answered[arm.name] < choices.VALID * answered["none"])

    def own(name: str) -> np.ndarray:
        """The log-odds of the steered activity, averaged over both orders and its opponents, `[n]`."""
        both = found[name][0].reshape(n, OPPONENTS, 2)
        return ((both[:, :, 0] - both[:, :, 1]) / 2).mean(1)

    def slopes(kind: str) -> dict[str, np.ndarray]:
        ends = {arm.direction: (f"{arm.direction} -1", f"{arm.direction} +1") for arm in arms if arm.kind == kind}
        return {
            direction: statistics.slopes([-1, 0, 1], np.stack([own(down), own("none"), own(up)]))
            for direction, (down, up) in ends.items()
            if not {down, up} & set(dropped)
        }

    of = {kind: np.array(list(slopes(kind).values())) for kind in ("random", "matched")}
    controls = {kind: x for kind, x in of.items() if len(x) >= arms_lib.RANDOM}
    chance = {kind: float(np.sqrt((x.mean(1) ** 2).mean())) for kind, x in controls.items()}
    if not controls:
        return {}, chance, dropped, float("nan")
    harder = controls[max(chance, key=lambda kind: chance[kind])]  # the harder to beat
    effects = {name: statistics.effect(x, harder) for name, x in slopes("emotion").items()}
    corrected = statistics.holm({name: effect.p for name, effect in effects.items()})
    effects = {name: dataclasses.replace(effect, p=corrected[name]) for name, effect in effects.items()}
    return effects, chance, dropped, statistics.detectable(harder, max(len(effects), 1))


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
    """Ask, fit, read and steer; the answers are kept in `out`/preference.jsonl, those about all pairs in preference-pairs.jsonl."""
    place_of = pathlib.Path(out)
    place_of.mkdir(parents=True, exist_ok=True)
    items = list(activities or records("activities.jsonl"))
    texts, n = [item["text"] for item in items], len(items)
    chosen = arms_lib.chosen(lm, vectors, emotions, layers, strength, progress)
    arms = {
        arm.name: arm for arm in arms_lib.make(vectors, emotions, chosen, doses=(-1.0, 1.0), random=random, seed=seed)
    }
    rng = np.random.default_rng(seed)
    met = [(i, j) for i in range(n) for j in rng.permutation([k for k in range(n) if k != i])[:OPPONENTS].tolist()]
    pairs = [(texts[a], texts[b]) for i, j in met for a, b in ((i, j), (j, i))]
    steered = [texts[i] for i, _ in met for _ in range(2)]

    every = [(texts[a], texts[b]) for a in range(n) for b in range(n) if a != b]
    plain, valid = odds(lm, every, {"none": None}, place_of / "preference-pairs.jsonl", progress=progress)["none"]
    found = odds(
        lm, pairs, {name: arm.steering for name, arm in arms.items()}, place_of / "preference.jsonl", steered, progress
    )

    ordered = np.zeros((n, n))
    ordered[~np.eye(n, dtype=bool)] = plain
    averaged = (ordered - ordered.T) / 2
    value, (low, high) = worth(averaged), worth_interval(averaged)
    first = float((plain > 0).mean())

    chats = [[{"role": "user", "content": text}] for text in texts] if lm.tokenizer.chat_template else list(texts)
    read = lm.read(chats, vectors, vectors.layer, tokens="user" if lm.tokenizer.chat_template else "all")
    scores = np.asarray(read.pooled, np.float64)
    r = correlation.correlations(value, scores)
    best, p = correlation.best_match(value, scores)
    lengths = np.array([[len(lm.tokenizer.encode(f" {text}"))] for text in texts], np.float64)
    length_r = float(correlation.correlations(value, lengths)[0])
    adjusted = statistics.partial(value[:, None], scores[:, [best]], lengths)

    effects, chance, dropped, detectable = steer(list(arms.values()), found, n)
    across = (float("nan"),) * 3
    if len(effects) >= FEWEST:
        reading = r[[vectors.index(name) for name in effects]]
        shift = np.array([effect.mean for effect in effects.values()])
        across = (float(correlation.correlations(reading, shift[:, None])[0]), *correlation.interval(reading, shift))
    nothing = ""
    if not 1 - BIASED < first < BIASED:
        nothing = f"uninformative: the {'first' if first > 0.5 else 'second'} is chosen whatever it is"
    too_few = (
        "" if len(effects) >= FEWEST else "uninformative: so few answers are letters that too few emotions are left"
    )
    verdicts = {
        "readings go with preference": nothing or ("replicates" if p < statistics.ALPHA else "does not replicate"),
        "steering moves preference as readings say": nothing or too_few
        or ("replicates" if across[1] > 0 else "does not replicate"),
    }  # fmt: skip
    result = Preference(
        lm.source or lm.config.family, tuple(texts), tuple(item["kind"] for item in items), value, low, high, first,
        float(valid.mean()), vectors.names, r, best, p, length_r, adjusted, str(chosen), effects, chance, dropped, detectable, across,
        verdicts,
    )  # fmt: skip
    store.save(result, place_of, "preference")
    return result
