"""All the studies of a model, one after another, and one table of what came of their claims."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxemo import files
from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.language_model import LanguageModel
from jaxemo.studies import arms, choices, dilemma, forced_choice, prediction, preference, sycophancy

CHOICES = {  # the name, what makes its choices, and its claims
    "forced-choice": (forced_choice.choices, forced_choice.CLAIMS),
    "dilemma": (dilemma.choices, dilemma.CLAIMS),
    "sycophancy": (sycophancy.choices, sycophancy.CLAIMS),
    "harshness": (sycophancy.harsh_choices, sycophancy.HARSH_CLAIMS),
}
STUDIES = (*CHOICES, "preference", "prediction")


def run(
    lm: LanguageModel,
    vectors: EmotionVectors,
    out: str | os.PathLike,
    names: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    strength: float | None = None,
    progress: bool = True,
) -> list[Any]:
    """Run the studies `names`, by default all that fit the model (prediction needs a chat template).

    Measurements and results are kept in the directory `out`, where a killed run is taken up again; the irrelevant directions, made
    first from the starter corpus, too. Raises ValueError for an unknown study.
    """
    if names is None:
        names = [name for name in STUDIES if name != "prediction" or lm.tokenizer.chat_template]
    if unknown := [name for name in names if name not in STUDIES]:
        raise ValueError(f"unknown study {unknown[0]!r}; there are {', '.join(STUDIES)}")
    place = pathlib.Path(out)
    place.mkdir(parents=True, exist_ok=True)
    layers = arms.band(lm.config.n_layers) if layers is None else tuple(layers)
    irrelevant = (
        _irrelevant(lm, place / "irrelevant.safetensors", layers, progress) if set(names) & set(CHOICES) else None
    )
    results: list[Any] = []
    for name in names:
        if name in CHOICES:
            make, claims = CHOICES[name]
            results.append(
                choices.study(name, lm, vectors, make(), claims, out, irrelevant, layers, strength, progress=progress)
            )
        elif name == "preference":
            results.append(preference.study(lm, vectors, out, layers=layers, strength=strength, progress=progress))
        else:
            results.append(prediction.study(lm, vectors, out, progress=progress))
        files.write_atomically(place / "summary.txt", f"{summary(results)}\n".encode())
    return results


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
