"""Everything that says whether directions mean what their names say, on one model, each number beside its baselines.

The layer is chosen on held-out stories; what is then read at it (words, human ratings, speakers) had no say in it. Numbers are
read where implicit prompts are told best, since both are read before an answer.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxemo.emotions import classification, corpus, extraction, geometry, lens, prompts, speakers, steering_test
from jaxemo.emotions.vectors import EmotionVectors, listed
from jaxemo.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Material:
    """What tests are made with: the stories that `vectors` were made from (None where they are not at hand), stories held out, stories
    that the model wrote itself, if any, and further vectors for the same tables (see `classify`). A negative `layer` is to be chosen.
    """

    lm: LanguageModel
    vectors: EmotionVectors
    training: corpus.Corpus | None
    heldout: corpus.Corpus
    written: corpus.Corpus | None = None
    others: Mapping[str, EmotionVectors] = dataclasses.field(default_factory=dict)
    layer: int = -1
    seed: int = 0
    progress: bool = True


@dataclasses.dataclass(frozen=True)
class Validation:
    """`found` holds the result of each test by its name, `missing` why another could not be made, `seconds` how long each took. `layer`
    is the one read, and `how` says how it was come by."""

    model: str
    vectors: EmotionVectors
    layer: int
    how: str
    found: Mapping[str, Any]
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def summary(self) -> str:
        parts = [f"{self.model}: layer {self.layer}, {self.how}"]
        for name, result in self.found.items():
            if name == "self-cosine":
                low, middle = np.quantile(result, [0.05, 0.5])
                parts.append(
                    f"bootstrap self-cosine of {len(result)} directions: median {middle:.3f}, 5 % below {low:.3f}"
                )
            parts += [
                one.summary() for one in (result if isinstance(result, tuple) else (result,)) if hasattr(one, "summary")
            ]
        return "\n\n".join([*parts, *(f"{name}: not tested: {why}" for name, why in self.missing.items())])


def _stories(m: Material) -> tuple[classification.Classification, ...]:
    if m.training is None:
        raise ValueError("the baselines learn from the stories that the vectors were made from, which are not at hand")
    skip = m.vectors.provenance.get("skip", extraction.SKIP)
    raw = {"not denoised": m.vectors.raw} if m.vectors.raw is not None else {}
    known = [dataclasses.replace(c, stories=tuple(s for s in c.stories if s.emotion in m.vectors.names))
             for c in (m.heldout, m.written) if c is not None]  # fmt: skip
    return tuple(
        classification.classify(
            m.lm, m.vectors, c, m.training, others={**raw, **m.others}, skip=skip, seed=m.seed, progress=m.progress
        )
        for c in known
    )


def _implicit(m: Material) -> prompts.Implicit:
    told = [record for record in corpus.records("implicit.jsonl") if record["emotion"] in m.vectors.names]
    return prompts.implicit(m.lm, m.vectors, m.training, told, seed=m.seed, progress=m.progress)


def _self_cosine(m: Material) -> np.ndarray:
    if "self_cosine" not in m.vectors.measured:
        raise ValueError("these vectors were not extracted with a bootstrap")
    return m.vectors.measured["self_cosine"]


def _steering(m: Material) -> steering_test.TextTest:
    known = [name for name in corpus.DISPLAY if name in m.vectors.names]
    return steering_test.text_test(m.lm, m.vectors.select(known or m.vectors.names[:12]), progress=m.progress)


TESTS: dict[str, tuple[str, Callable[[Material], Any]]] = {
    "self-cosine": ("Stability: the same directions from other stories?", _self_cosine),
    "stories": ("Stories that no extraction saw", _stories),
    "implicit": ("Prompts that imply an emotion, before the answer", _implicit),
    "numbers": ("Numbers that should matter, and harmless counts",
                lambda m: prompts.numbers(m.lm, m.vectors, m.layer, seed=m.seed, progress=m.progress)),
    "lens": ("Logit lens: which words does a direction speak for?", lambda m: lens.lens(m.lm, m.vectors, m.layer, seed=m.seed)),
    "steering": ("Steering: does a direction raise its own word?", _steering),
    "cosines": ("Cosines of the directions", lambda m: geometry.cosines(m.vectors, m.layer)),
    "clusters": ("Clusters against families of words", lambda m: geometry.clusters(
        m.vectors, m.layer, classification.families_of(m.vectors.names), seed=m.seed)),
    "affect": ("Main components against human ratings", lambda m: geometry.affect(m.vectors, m.layer, seed=m.seed)),
    "similarity": ("Layers against layers", lambda m: geometry.similarity(m.vectors, m.seed)),
    "speakers": ("Whose emotion is it? The speaker's and the other's", lambda m: speakers.speakers(
        m.lm, vectors=m.vectors, layer=m.layer, seed=m.seed, progress=m.progress)),
}  # fmt: skip


def check(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is no test's."""
    unknown = sorted(set(listed("names", names)) - set(TESTS))
    if unknown:
        raise ValueError(f"no test named {unknown[0]!r}; there are {', '.join(TESTS)}")


def validate(m: Material, names: Sequence[str] = tuple(TESTS), say: Callable[[str], None] = print) -> Validation:
    """Make the tests named, in the order of `TESTS`. One that finds too little to go by (a ValueError) is left out, with the reason.

    All are read at `m.layer` or, where that is negative, at the layer that tells the emotion of held-out stories best if these are
    tested, else at `vectors.layer`. Numbers are read where implicit prompts are told best, if these are tested.
    """
    check(names)
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    seconds: dict[str, float] = {}
    layer, how = (m.vectors.layer, "nearest to four fifths of the way up") if m.layer < 0 else (m.layer, "asked for")
    for name, (title, test) in TESTS.items():
        if name not in names:
            continue
        say(f"{title} ...")
        begin, at = time.perf_counter(), layer
        if name == "numbers" and "implicit" in found:
            at = found["implicit"].guesses.layer
        try:
            found[name] = test(dataclasses.replace(m, layer=at))
        except (ValueError, FileNotFoundError) as error:
            missing[name] = str(error)
        seconds[name] = time.perf_counter() - begin
        if name == "stories" and name in found and m.layer < 0:
            layer, how = (
                found[name][0].layer,
                f"where top-{classification.TOP} accuracy on {found[name][0].corpus} is highest",
            )
    return Validation(m.lm.source, m.vectors, layer, how, found, missing, seconds)
