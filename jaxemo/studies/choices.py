"""Studies that read a choice between two ways to go on as a log-odds, under every arm, with no text generated.

Each choice is read as a *continuation*: the log-probability of the one answer less that of the other, in the assistant's own turn. And
some also by *letter*: both are listed in the question, in both orders, and the letters' log-odds are averaged, so that neither place
nor letter counts; matched and irrelevant directions are spared it. Both options are read under the same steering, or the difference
would be the push itself.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from jaxemo import params, steering
from jaxemo import tokens as tokens_lib
from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.language_model import Continuations, LanguageModel
from jaxemo.studies import arms as arms_lib
from jaxemo.studies import statistics, store
from jaxemo.studies.arms import Arm

READINGS = ("continuation", "letter")
LETTERED = 20  # situations, at most and spread evenly, that are also read by letter: two longer questions each
COHERENT = 0.5  # nats that a token of the options may cost more than unsteered; a dose that costs more is dropped
VALID = 0.5  # of the probability that the two letters have unsteered; a dose that leaves less is dropped
SATURATED = 0.95  # where as many unsteered choices fall on one side, there is no room for a rate to move


@dataclasses.dataclass(frozen=True)
class Choice:
    """One situation and two ways to go on; what is measured are the log-odds of `that` over `this`. `twin` names the control whose
    facts are the same without what should matter ("" where this is the situation itself)."""

    id: str
    question: str
    this: str
    that: str
    twin: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
    """That more of `emotion` gives more (+1) or less (-1) of what is measured."""

    text: str
    emotion: str
    sign: int


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of one claim by one reading: the `effect` (its p after Holm's correction over all rows), without what the options'
    lengths explain (`adjusted`), and in the `twin`s (mean and 95 % interval). None where nothing was left to measure."""

    claim: Claim
    reading: str
    effect: statistics.Effect | None
    adjusted: float | None
    twin: tuple[float, float, float] | None
    verdict: str


@dataclasses.dataclass(frozen=True)
class Result:
    """A study of one model. By reading: `rate`, the share of unsteered situations in which the log-odds are above zero; `pressure`, how
    much higher they are than in the twins (mean and 95 % interval); `chance`, the root mean square effect of "random", "matched" and
    "irrelevant" directions; `detectable`, the effect found with a power of 80 %. `dropped` are the doses that cost the options too much."""

    name: str
    model: str
    items: int
    strength: str
    rows: tuple[Row, ...]
    rate: dict[str, float]
    pressure: dict[str, tuple[float, float, float]]
    chance: dict[str, dict[str, float]]
    detectable: dict[str, float]
    dropped: tuple[str, ...]

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Claim, how it was read, effect, p and verdict, as text."""
        return [
            (row.claim.text, row.reading, row.effect.interval if row.effect else "not measured",
             f"{row.effect.p:.2g}" if row.effect else "", row.verdict)
            for row in self.rows
        ]  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{self.name} on {self.model}: {self.items} situations; {self.strength}"]
        for reading in READINGS:
            over = "{:+.2f} [{:+.2f}, {:+.2f}] over the twins, ".format(*p) if (p := self.pressure.get(reading)) else ""
            chance = ", ".join(f"{kind} {rms:.3f}" for kind, rms in self.chance[reading].items())
            lines.append(
                f"read by {reading}: unsteered, {self.rate[reading]:.0%} above zero, {over}root mean square effect of directions that mean "
                f"nothing here: {chance}; found with a power of 80 %: {self.detectable[reading]:.3f}"
            )
            for row in (row for row in self.rows if row.reading == reading):
                more = f"; less what lengths explain {row.adjusted:+.3f}" if row.adjusted is not None else ""
                more += "; in the twins {:+.3f} [{:+.3f}, {:+.3f}]".format(*row.twin) if row.twin else ""
                lines.append(f"  {row.claim.text}: {row.effect or 'not measured'}{more} -> {row.verdict}")
        if self.dropped:
            lines.append(f"dropped, the text falls apart: {', '.join(self.dropped)}")
        return "\n".join(lines)


def asked(choice: Choice, reading: str, swapped: bool = False) -> tuple[str, list[str]]:
    """The question and the two continuations, `this` first whatever the order shown."""
    if reading == "continuation":
        return choice.question, [choice.this, choice.that]
    first, second = (choice.that, choice.this) if swapped else (choice.this, choice.that)
    question = f"{choice.question}\n\nA: {first}\nB: {second}\n\nAnswer with one letter, A or B."
    return question, ["B", "A"] if swapped else ["A", "B"]


def ask(lm: LanguageModel, questions: Sequence[str]) -> list:
    """Token ids up to where the answer begins; for a model without a chat template, that of a text that goes on after the question."""
    if lm.tokenizer.chat_template:
        return tokens_lib.encode(lm.tokenizer, [[{"role": "user", "content": question}] for question in questions])
    return tokens_lib.encode(lm.tokenizer, [f"{question}\n\n" for question in questions])


def measure(
    lm: LanguageModel,
    choices: Sequence[Choice],
    arms: Iterable[Arm],
    out: str | os.PathLike,
    rows: int = 32,
    progress: bool = True,
) -> dict[str, dict[str, np.ndarray]]:
    """For every arm: the log-odds `[n]` of `that` over `this` by each reading, the mean log-probability `[n]` of a token of the
    options ("fluency"), the probability `[n]` that an answer is one of the letters ("valid"), and the options' lengths `[n, 2]`. NaN is
    what was not read: twins are read under "none" and emotions alone.

    `out` is a JSONL file with a line for each arm; the same call goes on where a killed one was. Raises ValueError for an `out` of
    other choices, weights or steering.
    """
    of = {arm.name: arm for arm in arms}
    batches, below = _batches(lm, choices, rows), steering.lowest(arm.steering for arm in of.values())

    @functools.cache
    def begun(number: int) -> Continuations:  # what all arms share is read once
        _, _, prompts, texts = batches[number]
        return lm.begin_continuations(tokens_lib.pad(prompts), texts, below)

    which = hashlib.sha256(json.dumps([dataclasses.astuple(choice) for choice in choices]).encode()).hexdigest()[:16]
    by = {"weights": params.fingerprint(lm.params)[:16], "choices": which}
    found = store.measure(out, by, {name: arm.steering for name, arm in of.items()},
                          lambda name: _read(lm, choices, batches, begun, of[name]), progress)  # fmt: skip
    return {
        name: {key: np.array(record[key], np.float64) for key in (*READINGS, "fluency", "valid", "lengths")}
        for name, record in found.items()
    }


def _batches(lm: LanguageModel, choices: Sequence[Choice], rows: int) -> list[tuple]:
    """All readings in full batches of about one length, as (reading, [(choice's number, swapped)], prompts' token ids, continuations);
    situations and twins apart, as not all arms read both."""
    own = [choice.id for choice in choices if not choice.twin]
    by_letter = set(own[:: -(-len(own) // LETTERED)])
    readings = [(i, "continuation", False) for i in range(len(choices))]
    readings += [(i, "letter", swapped) for i, choice in enumerate(choices) for swapped in (False, True)
                 if (choice.twin or choice.id) in by_letter]  # fmt: skip
    questions, texts = zip(*(asked(choices[i], reading, swapped) for i, reading, swapped in readings), strict=True)
    prompts = ask(lm, questions)
    kinds: dict[tuple, list[int]] = {}
    for at, (i, reading, _) in enumerate(readings):
        kinds.setdefault((reading, bool(choices[i].twin)), []).append(at)
    batches = []
    for (reading, _), of in kinds.items():
        of.sort(key=lambda at: len(prompts[at]))
        size = -(-len(of) // -(-len(of) // rows))  # of batches that are all about as full
        for first in range(0, len(of), size):
            part = of[first : first + size]
            filled = part + [part[-1]] * (size - len(part))
            where = [(readings[at][0], readings[at][2]) for at in part]
            batches.append((reading, where, [prompts[at] for at in filled], [texts[at] for at in filled]))
    return batches


def _read(lm: LanguageModel, choices: Sequence[Choice], batches: list[tuple], begun, arm: Arm) -> dict[str, list]:
    n = len(choices)
    odds = {reading: np.full((n, 2), np.nan) for reading in READINGS}
    fluency, valid, lengths = np.full(n, np.nan), np.full((n, 2), np.nan), np.zeros((n, 2))
    for number, (reading, where, _, _) in enumerate(batches):
        if arm.kind not in ("none", "emotion") and choices[where[0][0]].twin:
            continue
        if arm.kind not in ("none", "emotion", "random") and reading == "letter":
            continue
        logprobs, counts = lm.continuations(begun(number), steering=arm.steering)
        for (i, swapped), (this, that), count in zip(where, np.asarray(logprobs, np.float64), counts, strict=False):
            odds[reading][i, int(swapped)] = that - this
            if reading == "continuation":
                odds[reading][i, 1] = that - this
                fluency[i], lengths[i] = (this + that) / count.sum(), count
            else:
                valid[i, int(swapped)] = np.exp(this) + np.exp(that)
    found = {reading: store.numbers(odds[reading].mean(1)) for reading in READINGS}
    found |= {"fluency": store.numbers(fluency), "valid": store.numbers(valid.mean(1))}
    return {**found, "lengths": lengths.tolist()}


def judge(
    name: str,
    lm: LanguageModel,
    choices: Sequence[Choice],
    claims: Sequence[Claim],
    arms: Sequence[Arm],
    found: Mapping[str, Mapping[str, np.ndarray]],
    strength: Any,
) -> Result:
    """Claim by claim, what the measurements say."""
    places = {choice.id: i for i, choice in enumerate(choices)}
    own = np.array([i for i, choice in enumerate(choices) if not choice.twin])
    pairs = np.array([(places[choice.twin], i) for i, choice in enumerate(choices) if choice.twin], int).reshape(-1, 2)
    plain = found["none"]
    answered = own[~np.isnan(plain["valid"][own])]

    def whole(of: Mapping[str, np.ndarray]) -> bool:
        nats = np.mean(plain["fluency"][own] - of["fluency"][own])
        lost = of["valid"][answered].mean() < VALID * plain["valid"][answered].mean()  # False where it was not read
        return bool(nats <= COHERENT and not lost)

    dropped = {arm.name for arm in arms if not whole(found[arm.name])}
    longer = plain["lengths"] @ [-1, 1]  # how much longer `that` is

    def slope(direction: str, reading: str, where: np.ndarray) -> np.ndarray | None:
        mine = [arm for arm in arms if arm.direction == direction and arm.name not in dropped]
        doses = [0.0, *(arm.dose for arm in mine)]
        if min(doses) == 0 or max(doses) == 0:  # up and down, or what any push does would count
            return None
        values = np.stack([plain[reading][where]] + [found[arm.name][reading][where] for arm in mine])
        return None if np.isnan(values).any() else statistics.slopes(doses, values)

    rate, pressure, chance, detectable = {}, {}, {}, {}
    effects: dict[tuple[str, str], statistics.Effect] = {}  # by reading and emotion
    about: dict[tuple[str, str], tuple] = {}
    emotions = dict.fromkeys(claim.emotion for claim in claims)
    for reading in READINGS:
        read = ~np.isnan(plain[reading])
        here, twins = own[read[own]], pairs[read[pairs].all(1)]
        rate[reading] = float((plain[reading][here] > 0).mean())
        if len(twins):
            pressure[reading] = statistics.interval(plain[reading][twins[:, 0]] - plain[reading][twins[:, 1]])
        of = {}
        for kind in ("random", "matched", "irrelevant"):
            directions = dict.fromkeys(arm.direction for arm in arms if arm.kind == kind)
            found_of = [slope(direction, reading, here) for direction in directions]
            of[kind] = np.array([x for x in found_of if x is not None])
        chance[reading] = {kind: float(np.sqrt((x.mean(1) ** 2).mean())) for kind, x in of.items() if len(x)}
        enough = [kind for kind in ("random", "matched") if len(of[kind]) >= arms_lib.RANDOM]
        detectable[reading] = float("nan")
        if not enough:
            continue
        random = of[max(enough, key=lambda kind: chance[reading][kind])]  # the harder to beat
        detectable[reading] = statistics.detectable(random, len(emotions) * len(READINGS))
        for emotion in emotions:
            if (slopes := slope(emotion, reading, here)) is None:
                continue
            effects[reading, emotion] = statistics.effect(slopes, random)
            adjusted, there = None, slope(emotion, reading, twins[:, 1]) if len(twins) else None
            if reading == "continuation" and np.ptp(longer[here]):
                adjusted = float(scipy.stats.linregress(longer[here], slopes).intercept)
            about[reading, emotion] = adjusted, None if there is None else statistics.interval(there)
    p = statistics.holm({key: effect.p for key, effect in effects.items()})
    rows = []
    for reading in READINGS:
        for claim in claims:
            key, reason = (reading, claim.emotion), ""
            effect = dataclasses.replace(effects[key], p=p[key]) if key in effects else None
            if effect is None:
                reason = "so much of the text fell apart that too few doses or random directions are left"
            elif reading == "letter" and not 1 - SATURATED < rate[reading] < SATURATED:
                reason = f"unsteered, {rate[reading]:.0%} of the choices are above zero"
            said = f"uninformative: {reason}" if reason or effect is None else statistics.verdict(effect, claim.sign)
            adjusted, twin = about.get(key, (None, None))
            rows.append(Row(claim, reading, effect, adjusted, twin, said))
    return Result(name, lm.source or lm.config.family, len(own), str(strength), tuple(rows), rate, pressure, chance, detectable,
                  tuple(sorted(dropped)))  # fmt: skip


def study(
    name: str,
    lm: LanguageModel,
    vectors: EmotionVectors,
    choices: Sequence[Choice],
    claims: Sequence[Claim],
    out: str | os.PathLike,
    irrelevant: EmotionVectors | None = None,
    layers: Sequence[int] | None = None,
    strength: arms_lib.Given = None,  # of emotions and random directions alike, instead of calibrating
    random: int = arms_lib.RANDOM,
    progress: bool = True,
) -> Result:
    """Calibrate, measure and judge; the measurements are kept in `out`/NAME.jsonl and the result in `out`/NAME.json and .txt."""
    place = pathlib.Path(out)
    place.mkdir(parents=True, exist_ok=True)
    emotions = tuple(dict.fromkeys(claim.emotion for claim in claims))
    chosen = arms_lib.chosen(lm, vectors, emotions, layers, strength, progress)
    arms = arms_lib.make(vectors, emotions, chosen, irrelevant, random=random)
    measured = measure(lm, choices, arms, place / f"{name}.jsonl", progress=progress)
    result = judge(name, lm, choices, claims, arms, measured, chosen)
    store.save(result, place, name)
    return result
