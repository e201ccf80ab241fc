"""Free text under steering: does it take on the emotion that is turned up, more than random directions make it, while it stays whole?

24 calm openers and questions are gone on with under every arm. How a text sounds is judged by something that never saw the model: words,
as they go with emotions in the stories of the starter corpus. Those never name their emotion, so texts that name it are counted beside.
Arms whose texts fall apart are dropped openly: texts that the unsteered model finds far less likely than its own, that repeat
themselves, or that are hardly there. Nobody reads the texts, and nothing is said of what the model would do.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from tqdm import tqdm

from jaxemo import grid
from jaxemo.emotions import classification, corpus
from jaxemo.emotions import statistics as rates
from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.language_model import LanguageModel
from jaxemo.studies import arms as arms_lib
from jaxemo.studies import records, statistics, store
from jaxemo.studies.arms import Arm
from jaxemo.studies.choices import Claim

EMOTIONS = ("happy", "loving", "calm", "desperate", "angry", "sad")
GO_ON = "Go on with this text for a few sentences."  # asked of a model with a chat template, of what is no question
NEW_TOKENS = 32
TEMPERATURE = 0.7  # small models loop where they are greedy; an opener has the same draws under every arm
RANDOM = arms_lib.RANDOM + 4  # some may fall apart, and at least arms_lib.RANDOM have to be left
COHERENT = 0.5  # nats that a token of the texts may be less likely, unsteered, than one of the unsteered texts
REPEATED = 0.1  # by how much the share of 3-grams that were there before may be larger
SHORT = 0.5  # of the length of unsteered texts
AT_ONCE = 64  # arms whose texts are read again together


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of one claim: the `effect` on the tone (its p after Holm's correction), without what the texts' lengths explain
    (`adjusted`); what the same dose does to their length in tokens (`longer`) and to the share of texts that name the emotion
    (`named`), each as mean and 95 % interval; the root mean square effect on this tone of "random" and "matched" directions
    (`chance`), and the effect found with a power of 80 % (`detectable`). None where nothing was left to measure."""

    claim: Claim
    effect: statistics.Effect | None
    adjusted: float | None
    longer: tuple[float, float, float] | None
    named: tuple[float, float, float] | None
    chance: dict[str, float]
    detectable: float | None
    verdict: str


@dataclasses.dataclass(frozen=True)
class Texts:
    """What steering does to the text of one model. `length` and `repeated` are those of unsteered texts, in tokens and as a share of
    3-grams; `told` is the share of held-out stories whose emotion, of 12, the words tell (with its 95 % interval). `dropped` holds, for
    each arm whose texts fall apart, how many nats a token they are less likely, how much more they repeat and how long they are;
    `examples` are (opener, arm, text)."""

    model: str
    openers: int
    strength: str
    length: float
    repeated: float
    told: tuple[float, float, float]
    rows: tuple[Row, ...]
    dropped: dict[str, tuple[float, float, float]]
    examples: tuple[tuple[str, str, str], ...]

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Claim, how it was read, effect, p and verdict, as text."""
        return [
            (row.claim.text, "words of the text", row.effect.interval if row.effect else "not measured",
             f"{row.effect.p:.2g}" if row.effect else "", row.verdict)
            for row in self.rows
        ]  # fmt: skip

    def __str__(self) -> str:
        lines = [
            f"text on {self.model}: {self.openers} openers, {self.length:.0f} tokens each unsteered, {self.repeated:.0%} of 3-grams "
            f"repeated; {self.strength}",
            "the words tell the emotion, of {}, of {:.0%} [{:.0%}, {:.0%}] of held-out stories".format(
                len(corpus.DISPLAY), *self.told
            ),
        ]
        for row in self.rows:
            more = f"; less what lengths explain {row.adjusted:+.3f}" if row.adjusted is not None else ""
            more += "; tokens more {:+.1f} [{:+.1f}, {:+.1f}]".format(*row.longer) if row.longer else ""
            more += "; texts that name it {:+.3f} [{:+.3f}, {:+.3f}]".format(*row.named) if row.named else ""
            if row.detectable is not None:
                chance = ", ".join(f"{kind} {rms:.3f}" for kind, rms in row.chance.items())
                more += f"; root mean square effect of {chance}; found with a power of 80 %: {row.detectable:.3f}"
            lines.append(f"  {row.claim.text}: {row.effect or 'not measured'}{more} -> {row.verdict}")
        if self.dropped:
            lines.append("dropped, the text falls apart (nats a token, repeated, tokens):")
            lines += [
                f"  {name}: {nats:+.2f}, {repeated:+.2f}, {length:.0f}"
                for name, (nats, repeated, length) in self.dropped.items()
            ]
        opener = None
        for asked, arm, text in self.examples:
            lines += [f"{asked}"] * (asked != opener) + [f"  {arm}: {' '.join(text.split())}"]
            opener = asked
        return "\n".join(lines)


def claims(emotions: Sequence[str] = EMOTIONS) -> tuple[Claim, ...]:
    return tuple(Claim(f"more {name}, more of the words that go with it", name, +1) for name in emotions)


def prompts(lm: LanguageModel, items: Sequence[Mapping]) -> list:
    """What is gone on with: a chat, in which an opener is given with a request; for a model without a chat template, the opener
    itself, and what comes after a question."""
    if lm.tokenizer.chat_template:
        asked = [item["text"] if item["kind"] == "question" else f"{GO_ON}\n\n{item['text']}" for item in items]
        return [[{"role": "user", "content": text}] for text in asked]
    return [f"{item['text']}\n\n" if item["kind"] == "question" else item["text"] for item in items]


def tones(texts: Sequence[str]) -> np.ndarray:
    """The log-probability `[n, 12]` of each of `corpus.DISPLAY`, from a text's words alone."""
    stories = [story for story in corpus.starter().stories if story.emotion in corpus.DISPLAY]
    taught = np.array([corpus.DISPLAY.index(story.emotion) for story in stories])
    return classification.word_scores([story.text for story in stories], taught, texts, len(corpus.DISPLAY))


def told() -> tuple[float, float, float]:
    """The share of held-out stories whose emotion, of `corpus.DISPLAY`, `tones` tells, with its 95 % interval: what it is worth."""
    stories = [story for story in corpus.heldout().stories if story.emotion in corpus.DISPLAY]
    guessed = tones([story.text for story in stories]).argmax(1)
    hits = sum(corpus.DISPLAY[guess] == story.emotion for guess, story in zip(guessed, stories, strict=True))
    return (hits / len(stories), *rates.wilson(hits, len(stories)))


def repetition(tokens: Sequence[int]) -> float:
    """The share of 3-grams of a text that were in it before; 0 where there are none."""
    grams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def fluency(lm: LanguageModel, asked: list, texts: np.ndarray, progress: bool = True) -> np.ndarray:
    """The mean log-probability `[A, P]` of a token of `texts [A, P]` after each of P prompts, unsteered; NaN where nothing is written.

    Texts are tokenised by themselves, which need not give the tokens that were drawn.
    """
    batch, (A, P) = lm.batch(asked), texts.shape
    found = np.zeros((A, P))
    for at in tqdm(range(0, A, AT_ONCE), unit="batch", desc="texts read again", disable=not progress):
        part = [min(at + i, A - 1) for i in range(AT_ONCE)]  # one shape for all
        total, counts = lm.continuations(batch, [[text or " " for text in texts[part, p]] for p in range(P)])
        found[part] = (np.asarray(total, np.float64) / counts).T
    return np.where(texts == "", np.nan, found)


def measure(
    lm: LanguageModel,
    items: Sequence[Mapping],
    arms: Sequence[Arm],
    out: str | os.PathLike,
    rows: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """The texts `[A, P]` of every arm and opener, and of every arm, by name, what they are like: "tone" and "named" `[P, 12]` (the
    log-probability of each of `corpus.DISPLAY` by words, and whether it is named), "fluency", "repeated" and "lengths" `[P]`.

    `out` is the store of a sweep; the same call goes on where a killed one was. Raises ValueError for an `out` of other openers,
    weights or steering.
    """
    asked = prompts(lm, items)
    made = grid.sweep(lm, asked, {arm.name: arm.steering for arm in arms}, max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE,
                      seed=seed, rows=rows, out=out, progress=progress)  # fmt: skip
    texts, lengths = made.texts[:, :, 0], made.lengths[:, :, 0]
    A, P = texts.shape
    tone = tones(texts.ravel().tolist()).reshape(A, P, -1)
    likely = fluency(lm, asked, texts, progress)
    found = {}
    for a, name in enumerate(made.conditions):
        found[name] = {
            "tone": tone[a],
            "named": np.array([[corpus.leak(e, text) is not None for e in corpus.DISPLAY] for text in texts[a]], float),
            "fluency": likely[a],
            "repeated": np.array([repetition(made.tokens[a, p, 0, : lengths[a, p]].tolist()) for p in range(P)]),
            "lengths": lengths[a].astype(float),
        }
    return texts, found


def cost(plain: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> tuple[float, float, float]:
    """How many nats a token an arm's texts are less likely than the unsteered ones (NaN where nothing is written), how much more they
    repeat, and their length."""

    def likely(of):
        there = of["fluency"][~np.isnan(of["fluency"])]
        return float(there.mean()) if there.size else math.nan

    repeated = float(found["repeated"].mean() - plain["repeated"].mean())
    return likely(plain) - likely(found), repeated, float(found["lengths"].mean())


def whole(plain: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> bool:
    """Whether an arm's texts hold together as the unsteered ones do, within COHERENT, REPEATED and SHORT."""
    nats, repeated, length = cost(plain, found)
    return nats <= COHERENT and repeated <= REPEATED and length >= SHORT * plain["lengths"].mean()


def judge(
    claims: Sequence[Claim], arms: Sequence[Arm], found: Mapping[str, Mapping[str, np.ndarray]]
) -> tuple[tuple[Row, ...], dict[str, tuple[float, float, float]]]:
    """Claim by claim, what the measurements say; and the arms dropped, with what they cost.

    A direction counts where its largest doses up and down are whole: a slope over less would be noisier than those it is set beside.
    """
    plain = found["none"]
    dropped = {arm.name: cost(plain, found[arm.name]) for arm in arms if not whole(plain, found[arm.name])}

    def left(kind: str, direction: str) -> list[Arm]:
        mine = [arm for arm in arms if (arm.kind, arm.direction) == (kind, direction)]
        kept = [arm for arm in mine if arm.name not in dropped and "none" not in dropped]
        ends = {min(arm.dose for arm in mine), max(arm.dose for arm in mine)}
        return kept if ends <= {arm.dose for arm in kept} else []

    def slopes(of: Sequence[Arm], what: str) -> np.ndarray:
        values = np.stack([found[name][what] for name in ("none", *(arm.name for arm in of))])
        by_item = statistics.slopes([0.0, *(arm.dose for arm in of)], values.reshape(len(values), -1))
        return by_item.reshape(values.shape[1:])

    controls = {}
    for kind in ("random", "matched"):
        directions = dict.fromkeys(arm.direction for arm in arms if arm.kind == kind)
        of = [slopes(kept, "tone") for direction in directions if (kept := left(kind, direction))]
        if len(of) >= arms_lib.RANDOM:
            controls[kind] = np.stack(of)  # [R, P, 12]
    effects: dict[str, statistics.Effect] = {}
    about: dict[str, dict[str, Any]] = {}
    for claim in claims:
        e, kept = corpus.DISPLAY.index(claim.emotion), left("emotion", claim.emotion)
        if not kept or not controls:
            continue
        chance = {kind: float(np.sqrt((of[..., e].mean(1) ** 2).mean())) for kind, of in controls.items()}
        random = controls[max(chance, key=lambda kind: chance[kind])][..., e]  # the harder to beat
        tone, named, longer = slopes(kept, "tone")[:, e], slopes(kept, "named")[:, e], slopes(kept, "lengths")
        effects[claim.emotion] = statistics.effect(tone, random)
        about[claim.emotion] = {
            "adjusted": float(scipy.stats.linregress(longer, tone).intercept) if np.ptp(longer) else None,
            "longer": statistics.interval(longer),
            "named": statistics.interval(named),
            "chance": chance,
            "detectable": statistics.detectable(random, len(claims)),
        }
    p = statistics.holm({name: effect.p for name, effect in effects.items()})
    rows = []
    for claim in claims:
        if claim.emotion not in effects:
            said = "uninformative: so much of the text fell apart that too few doses or random directions are left"
            rows.append(Row(claim, None, None, None, None, {}, None, said))
            continue
        effect = dataclasses.replace(effects[claim.emotion], p=p[claim.emotion])
        rows.append(Row(claim, effect, **about[claim.emotion], verdict=statistics.verdict(effect, claim.sign)))
    return tuple(rows), dropped


def study(
    lm: LanguageModel,
    vectors: EmotionVectors,
    out: str | os.PathLike,
    emotions: Sequence[str] = EMOTIONS,
    layers: Sequence[int] | None = None,
    strength: arms_lib.Given = None,  # of emotions and random directions alike, instead of calibrating
    items: Sequence[Mapping] | None = None,
    rows: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Texts:
    """Calibrate, write and judge; the texts are kept in `out`/text.jsonl, the result in `out`/text.json and .txt. `items` are openers
    (by default the shipped ones), as {"kind", "text"}.

    Raises ValueError for an emotion whose tone no stories teach.
    """
    if unknown := [name for name in emotions if name not in corpus.DISPLAY]:
        raise ValueError(
            f"no stories teach the tone of {unknown[0]!r}; the emotions are among {', '.join(corpus.DISPLAY)}"
        )
    place = pathlib.Path(out)
    place.mkdir(parents=True, exist_ok=True)
    items = list(items or records("openers.jsonl"))
    chosen = arms_lib.chosen(lm, vectors, emotions, layers, strength, progress)
    arms = arms_lib.make(vectors, emotions, chosen, random=RANDOM, seed=seed)
    texts, found = measure(lm, items, arms, place / "text.jsonl", rows, seed, progress)
    judged, dropped = judge(claims(emotions), arms, found)
    shown = [
        a for a, arm in enumerate(arms) if arm.kind in ("none", "emotion") and arm.dose in (0, max(arms_lib.DOSES))
    ]
    examples = tuple(
        (items[p]["text"], arms[a].name, str(texts[a, p])) for p in sorted({0, len(items) - 1}) for a in shown
    )
    plain = found["none"]
    result = Texts(
        lm.source or lm.config.family, len(items), str(chosen), float(plain["lengths"].mean()), float(plain["repeated"].mean()),
        told(), judged, dropped, examples,
    )  # fmt: skip
    store.save(result, place, "text")
    return result
