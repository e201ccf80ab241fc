"""Everything that says whether directions mean what their names say, on one model, each number beside its baselines.

The layer is chosen on held-out stories; what is then read at it (words, human ratings, speakers) had no say in it. Numbers are
read where implicit prompts are told best, since both are read before an answer.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxemo.emotions import classification, corpus, extraction, geometry, lens, prompts, speakers
from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Validation:
    """The results of every test on one model, read at `layer` where a test chooses none. `stories` are classifications, by corpus."""

    model: str
    layer: int
    stories: tuple[classification.Classification, ...]
    implicit: prompts.Implicit
    numbers: prompts.Numbers
    lens: lens.Lens
    affect: geometry.Affect
    clusters: geometry.Clusters
    similarity: geometry.Similarity
    speakers: speakers.Speakers
    self_cosine: np.ndarray | None

    def summary(self) -> str:
        parts = [f"{self.model}: layer {self.layer}, chosen on {self.stories[0].corpus}"]
        if self.self_cosine is not None:
            low, middle = np.quantile(self.self_cosine, [0.05, 0.5])
            parts.append(
                f"bootstrap self-cosine of {len(self.self_cosine)} directions: median {middle:.3f}, 5 % below {low:.3f}"
            )
        parts += [one.summary() for one in self.stories]
        for result in (
            self.implicit,
            self.numbers,
            self.lens,
            self.affect,
            self.clusters,
            self.similarity,
            self.speakers,
        ):
            parts.append(result.summary())
        return "\n\n".join(parts)


def validate(
    lm: LanguageModel,
    vectors: EmotionVectors,
    training: corpus.Corpus | None = None,
    heldout: corpus.Corpus | None = None,
    written: corpus.Corpus | None = None,
    others: Mapping[str, EmotionVectors] | None = None,
    *,
    skip: int = extraction.SKIP,
    seed: int = 0,
    progress: bool = True,
) -> Validation:
    """Run every test. `training` is what `vectors` were made from and `heldout` what they are tested on (the shipped corpora), `written`
    stories of the model's own to test on as well, and `others` further vectors for the same tables (see `classify`).

    Emotions without a direction are left out. Raises ValueError where a test finds too little to go by.
    """
    training, heldout = training or corpus.shipped(), heldout or corpus.heldout()
    compared = dict(others or {})
    if vectors.raw is not None:
        compared = {"not denoised": vectors.raw, **compared}

    def known(of: corpus.Corpus) -> corpus.Corpus:
        return dataclasses.replace(of, stories=tuple(s for s in of.stories if s.emotion in vectors.names))

    asked = [known(heldout)] + ([known(written)] if written is not None else [])
    found = [
        classification.classify(lm, vectors, one, training, others=compared, skip=skip, seed=seed, progress=progress)
        for one in asked
    ]
    layer = found[0].layer
    told = [record for record in corpus.records("implicit.jsonl") if record["emotion"] in vectors.names]
    implied = prompts.implicit(lm, vectors, training, told, seed=seed, progress=progress)
    return Validation(
        model=lm.source,
        layer=layer,
        stories=tuple(found),
        implicit=implied,
        numbers=prompts.numbers(lm, vectors, implied.guesses.layer, seed=seed, progress=progress),
        lens=lens.lens(lm, vectors, layer, seed=seed),
        affect=geometry.affect(vectors, layer, seed=seed),
        clusters=geometry.clusters(vectors, layer, classification.families_of(vectors.names), seed=seed),
        similarity=geometry.similarity(vectors, seed),
        speakers=speakers.speakers(lm, vectors=vectors, layer=layer, seed=seed, progress=progress),
        self_cosine=vectors.measured.get("self_cosine"),
    )
