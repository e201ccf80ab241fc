"""All the studies of a model, one after another, and one table of what came of their claims."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxemo import files, params
from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.language_model import LanguageModel
from jaxemo.studies import (
    arms,
    choices,
    dilemma,
    forced_choice,
    impossible_code,
    post_training,
    prediction,
    preference,
    store,
    sycophancy,
    text,
)

CHOICES = {  # the name, what makes its choices, and its claims
    "forced-choice": (forced_choice.choices, forced_choice.CLAIMS),
    "dilemma": (dilemma.choices, dilemma.CLAIMS),
    "sycophancy": (sycophancy.choices, sycophancy.CLAIMS),
    "harshness": (sycophancy.harsh_choices, sycophancy.HARSH_CLAIMS),
}
STUDIES = (*CHOICES, "preference", "prediction", "text", "post-training", "impossible-code")
STEERED = {*CHOICES, "preference", "text", "impossible-code"}


def run(
    lm: LanguageModel,
    vectors: EmotionVectors,
    out: str | os.PathLike,
    names: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    strength: float | None = None,
    base: LanguageModel | None = None,
    base_vectors: EmotionVectors | None = None,
    samples: int = impossible_code.SAMPLES,
    progress: bool = True,
) -> list[Any]:
    """Run the studies `names`, by default all that fit: prediction needs a chat template, post-training the `base` model that `lm` was
    made from, and impossible-code, which is by far the longest, is to be named; `samples` are its rollouts of each task under each arm.

    Measurements and results are kept in the directory `out`, where a killed run is taken up again; the strength, found once for all
    studies, and the irrelevant directions, made from the starter corpus, too. Raises ValueError for an unknown study, for
    post-training without a base, and for an `out` of another model.
    """
    if names is None:
        fits = {
            "prediction": bool(lm.tokenizer.chat_template),
            "post-training": base is not None,
            "impossible-code": False,
        }
        names = [name for name in STUDIES if fits.get(name, True)]
    if unknown := [name for name in names if name not in STUDIES]:
        raise ValueError(f"unknown study {unknown[0]!r}; there are {', '.join(STUDIES)}")
    if "post-training" in names and base is None:
        raise ValueError("post-training compares two models: give the base that this one was made from")
    place = pathlib.Path(out)
    place.mkdir(parents=True, exist_ok=True)
    layers = arms.band(lm.config.n_layers) if layers is None else tuple(layers)
    chosen = (
        _strength(lm, vectors, place / "strength.json", layers, strength, progress) if set(names) & STEERED else None
    )
    irrelevant = (
        _irrelevant(lm, place / "irrelevant.safetensors", layers, progress) if set(names) & set(CHOICES) else None
    )
    results: list[Any] = []
    for name in names:
        if name in CHOICES:
            make, claims = CHOICES[name]
            results.append(
                choices.study(name, lm, vectors, make(), claims, out, irrelevant, strength=chosen, progress=progress)
            )
        elif name == "preference":
            results.append(preference.study(lm, vectors, out, strength=chosen, progress=progress))
        elif name == "prediction":
            results.append(prediction.study(lm, vectors, out, progress=progress))
        elif name == "text":
            results.append(text.study(lm, vectors, out, strength=chosen, progress=progress))
        elif name == "impossible-code":
            results.append(impossible_code.study(lm, vectors, out, strength=chosen, samples=samples, progress=progress))
        elif base is not None:
            results.append(post_training.study(base, lm, vectors, out, base_vectors, progress=progress))
        files.write_atomically(place / "summary.txt", f"{summary(results)}\n".encode())
    return results


def _strength(lm, vectors, path, layers, strength, progress=True) -> arms.Strength:
    """The one given, or else the one found before, or else found now: the same for all studies."""
    if strength is not None:
        return arms.chosen(lm, vectors, (), layers, strength)
    digest = hashlib.sha256(np.ascontiguousarray(vectors.directions).tobytes()).hexdigest()[:16]
    by = {"weights": params.fingerprint(lm.params)[:16], "directions": digest, "layers": list(layers)}
    if not path.exists():
        known = [name for name in text.EMOTIONS if name in vectors.names] or vectors.names
        found = dataclasses.asdict(arms.chosen(lm, vectors, known, layers, None, progress))
        files.write_atomically(path, json.dumps({"of": by, "strength": store.plain(found)}, indent=1).encode())
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["of"] != by:
        raise ValueError(f"{str(path)!r} is of other weights, directions or layers; write elsewhere")
    listed: dict[str, Any] = {name: tuple(math.nan if x is None else x for x in value) if isinstance(value, list) else value
              for name, value in found["strength"].items()}  # fmt: skip
    return arms.Strength(**listed)


def _irrelevant(lm, path, layers, progress) -> EmotionVectors:
    if not path.exists():
        arms.irrelevant(lm, layers=layers, progress=progress).save(path)
    found = EmotionVectors.load(path)
    if found.made_for != lm.config.outline or not set(layers) <= set(found.layers):
        raise ValueError(f"{str(path)!r} is of another model or other layers; write elsewhere")
    return found


def summary(results: Sequence[Any]) -> str:
    """A line for each claim and how it was read: effect, p against chance, verdict."""
    lines = []
    for result in results:
        heading, _, _ = str(result).partition("\n")
        lines.append(heading)
        for claim, read_by, effect, p, verdict in result.table():
            lines.append(f"  {claim}: {verdict}\n    by {read_by}: {effect}" + f", p = {p}" * bool(p))
    return "\n".join(lines)
