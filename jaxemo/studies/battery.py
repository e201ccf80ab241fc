"""All the studies of a model, one after another, and one table of what came of their claims."""

import os
import pathlib
from collections.abc import Sequence

from jaxemo import files
from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.language_model import LanguageModel
from jaxemo.studies import arms, choices, dilemma, forced_choice, sycophancy
from jaxemo.studies.choices import Result

STUDIES = {  # the name, what makes its choices, and its claims
    "forced-choice": (forced_choice.choices, forced_choice.CLAIMS),
    "dilemma": (dilemma.choices, dilemma.CLAIMS),
    "sycophancy": (sycophancy.choices, sycophancy.CLAIMS),
    "harshness": (sycophancy.harsh_choices, sycophancy.HARSH_CLAIMS),
}


def run(
    lm: LanguageModel,
    vectors: EmotionVectors,
    out: str | os.PathLike,
    names: Sequence[str] = tuple(STUDIES),
    layers: Sequence[int] | None = None,
    strength: float | None = None,
    progress: bool = True,
) -> list[Result]:
    """Run the studies `names`; measurements and results are kept in the directory `out`, where a killed run is taken up again.

    The irrelevant directions are made first, from the starter corpus, and kept there too. Raises ValueError for an unknown study.
    """
    if unknown := [name for name in names if name not in STUDIES]:
        raise ValueError(f"unknown study {unknown[0]!r}; there are {', '.join(STUDIES)}")
    place = pathlib.Path(out)
    place.mkdir(parents=True, exist_ok=True)
    layers = arms.band(lm.config.n_layers) if layers is None else tuple(layers)
    path = place / "irrelevant.safetensors"
    if path.exists():
        irrelevant = EmotionVectors.load(path)
        if irrelevant.made_for != vectors.made_for or not set(layers) <= set(irrelevant.layers):
            raise ValueError(f"{str(path)!r} is of another model or other layers; write elsewhere")
    else:
        irrelevant = arms.irrelevant(lm, layers=layers, progress=progress)
        irrelevant.save(path)
    results = []
    for name in names:
        make, claims = STUDIES[name]
        results.append(
            choices.study(name, lm, vectors, make(), claims, out, irrelevant, layers, strength, progress=progress)
        )
    files.write_atomically(place / "summary.txt", f"{summary(results)}\n".encode())
    return results


def summary(results: Sequence[Result]) -> str:
    """A line for each claim and reading: effect, interval, p against random directions, verdict."""
    lines = ["claim".ljust(36) + "read by".ljust(14) + "effect [95 %]".ljust(28) + "p".ljust(9) + "verdict"]
    for result in results:
        lines.append(f"{result.name}: {result.items} situations, {result.strength}")
        for row in result.rows:
            effect, p = "not measured", ""
            if row.effect is not None:
                effect = f"{row.effect.mean:+.3f} [{row.effect.low:+.3f}, {row.effect.high:+.3f}]"
                p = f"{row.effect.p:.2g}"
            lines.append(
                f"  {row.claim.text}".ljust(36) + row.reading.ljust(14) + effect.ljust(28) + p.ljust(9) + row.verdict
            )
    return "\n".join(lines)
