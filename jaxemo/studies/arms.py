"""What a study does to a model: emotions turned up and down, beside controls that push as hard.

The controls are random directions: of the same length, and of the length that costs a neutral text as much (on Gemma 3 270M a random
one of the same length costs far more); and directions that are as much at home in the model but of no emotion: the topics of the same
stories, and labels that were dealt out to them by chance.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxemo.emotions import corpus, extraction
from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.language_model import LanguageModel
from jaxemo.steering import Steering

DOSES = (-1.0, -0.5, 0.5, 1.0)
RANDOM = 20
OTHER = 6  # directions of topics, and as many of shuffled labels
GRID = tuple(round(10 ** (k / 10 - 2.5), 4) for k in range(22))  # strengths tried: ten steps from 0.01 to 0.1
BUDGET = 0.1  # nats of a neutral text's token
ALIKE = 1.5  # strengths that differ less are as costly as need be


@dataclasses.dataclass(frozen=True)
class Arm:
    """One steering of a study: `dose` times the study's strength in a direction. `kind` is "none", "emotion", "random" (as long),
    "matched" (as costly) or "irrelevant"."""

    kind: str
    direction: str
    dose: float
    steering: Steering | None

    @property
    def name(self) -> str:
        return f"{self.direction} {self.dose:+g}" if self.steering else "none"


@dataclasses.dataclass(frozen=True)
class Strength:
    """The largest strengths of the `grid` at which a text stays within the budget: `emotion` for emotions, `random` for random
    directions. `cost` and `random_cost`, of the grid, are the rise of a neutral token's surprise in nats (NaN where it was not tried)."""

    emotion: float
    random: float
    layers: tuple[int, ...]
    grid: tuple[float, ...] = ()
    cost: tuple[float, ...] = ()
    random_cost: tuple[float, ...] = ()

    def __str__(self) -> str:
        where = f"layer {self.layers[0]}" if len(self.layers) == 1 else f"layers {self.layers[0]} to {self.layers[-1]}"
        if not self.grid:
            return f"strength {self.emotion:g} at {where}, given"
        at, there = self.grid.index(self.emotion), self.grid.index(self.random)
        return (
            f"strength {self.emotion:g} at {where}: a neutral text's token costs {self.cost[at]:+.3f} nats more under emotions, and "
            f"{self.random_cost[there]:+.3f} under random directions at strength {self.random:g}"
        )


# What a study may be told: a number is for emotions and random directions alike, None to calibrate.
Given = Strength | float | None


def band(n_layers: int) -> tuple[int, ...]:
    """The layers that are steered by default: a band from the middle to where the last words are chosen (the paper steers one too)."""
    return tuple(range(round(0.5 * n_layers), max(round(0.85 * n_layers), round(0.5 * n_layers) + 1)))


def make(
    vectors: EmotionVectors,
    emotions: Sequence[str],
    strength: Strength,
    irrelevant: EmotionVectors | None = None,
    doses: Sequence[float] = DOSES,
    random: int = RANDOM,
    seed: int = 0,
) -> list[Arm]:
    """No steering; every emotion at every dose; random and irrelevant directions at the largest, up and down, random ones also at the
    strength that costs as much where that is another."""
    ends, controls = (min(doses), max(doses)), vectors.random(random, seed)
    groups: list[tuple[Any, ...]] = [
        ("emotion", "", vectors, tuple(emotions), doses, strength.emotion),
        ("random", "", controls, controls.names, ends, strength.emotion),
    ]
    weaker, stronger = sorted((strength.emotion, strength.random))
    if stronger > ALIKE * weaker:
        groups.append(("matched", ", matched", controls, controls.names, ends, strength.random))
    if irrelevant is not None:
        groups.append(("irrelevant", "", irrelevant, irrelevant.names, ends, strength.emotion))
    arms = [Arm("none", "", 0.0, None)]
    for kind, mark, of, names, amounts, s in groups:
        arms += [Arm(kind, name + mark, d, of.steer(name, d * s, strength.layers)) for name in names for d in amounts]
    return arms


def chosen(
    lm: LanguageModel,
    vectors: EmotionVectors,
    emotions: Sequence[str],
    layers: Sequence[int] | None,
    strength: Given,
    progress: bool = True,
) -> Strength:
    """The layers, by default `band`'s, and the strength: the one given, for random directions too, or the largest in the budget."""
    if isinstance(strength, Strength):
        if layers is not None and tuple(layers) != strength.layers:
            raise ValueError(f"layers {list(layers)}, but the strength given is of layers {list(strength.layers)}")
        return strength
    layers = band(lm.config.n_layers) if layers is None else tuple(layers)
    if strength is None:
        return calibrate(lm, vectors, emotions, layers, progress=progress)
    return Strength(strength, strength, layers)


def calibrate(
    lm: LanguageModel,
    vectors: EmotionVectors,
    emotions: Sequence[str],
    layers: Sequence[int],
    texts: Sequence[str] | None = None,
    budget: float = BUDGET,
    random: int = 4,
    progress: bool = True,
) -> Strength:
    """How strong steering may be: the mean cost, up and down, stays within `budget`, for emotions and for random directions alike.

    Raises ValueError where the weakest of the grid costs emotions more.
    """
    batch = lm.batch(list(texts or corpus.shipped().neutral[:4]))
    inside = np.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    plain = np.asarray(lm.logprobs(batch))[inside].mean()
    controls = vectors.random(random, seed=1)
    cost, found = np.full((2, len(GRID)), np.nan), []
    most = len(GRID).bit_length() * (len(emotions) + random) * 2
    with tqdm(total=most, unit="reading", desc="strength", disable=not progress) as bar:
        for row, (of, names) in enumerate(((vectors, emotions), (controls, controls.names))):
            fits, too_much = -1, len(GRID)  # between these two lies what is looked for
            while too_much - fits > 1:
                at, spent = (fits + too_much) // 2, []
                for name, sign in itertools.product(names, (-1, 1)):
                    steered = lm.logprobs(batch, of.steer(name, sign * GRID[at], layers))
                    spent.append(plain - np.asarray(steered)[inside].mean())
                    bar.update()
                cost[row, at] = np.mean(spent)
                fits, too_much = (at, too_much) if cost[row, at] <= budget else (fits, at)
            found.append(fits)
    if found[0] < 0:
        raise ValueError(
            f"a strength of {GRID[0]} at layers {list(layers)} already costs {cost[0, 0]:.2f} nats a token, more than "
            f"{budget}; steer fewer layers"
        )
    emotion, by_chance = (GRID[max(at, 0)] for at in found)
    return Strength(emotion, by_chance, tuple(layers), GRID, tuple(cost[0].tolist()), tuple(cost[1].tolist()))


def irrelevant(
    lm: LanguageModel, of: corpus.Corpus | None = None, layers="all", seed: int = 0, progress: bool = True
) -> EmotionVectors:
    """Directions made as the emotions' are, from the same stories, but of their topics and of labels dealt out by chance; `OTHER` of
    each."""
    of = of or corpus.starter()
    known = dict.fromkeys(s.topic for s in of.stories)
    topics = tuple(
        corpus.Story(f"topic {s.topic}", s.topic, s.text) for s in of.stories if s.topic in list(known)[:OTHER]
    )
    dealt = np.random.default_rng(seed).permutation([s.emotion for s in of.stories]).tolist()
    labels = {name: f"shuffled {i}" for i, name in enumerate(of.emotions[:OTHER])}
    shuffled = tuple(
        corpus.Story(labels[name], s.topic, s.text) for name, s in zip(dealt, of.stories, strict=True) if name in labels
    )
    first, second = (
        extraction.extract(
            lm,
            dataclasses.replace(of, name=f"{of.name}, {what}", stories=stories, neutral=of.neutral[::4]),
            layers=layers,
            progress=progress,
        )
        for what, stories in (("by topic", topics), ("shuffled", shuffled))
    )
    joined = (
        np.concatenate([getattr(first, name), getattr(second, name)], 1)
        for name in ("directions", "neutral_mean", "neutral_std")
    )
    directions, mean, std = joined
    return EmotionVectors(
        first.names + second.names, directions, first.residual_norm, mean, std,
        first.provenance | {"kind": "topics and shuffled labels"},
    )  # fmt: skip
