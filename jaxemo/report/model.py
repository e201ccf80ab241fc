"""A model's report: the page of every test of its directions, and of how they were made."""

import datetime
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy.stats

import jaxemo
from jaxemo import files, params
from jaxemo.emotions import EmotionVectors, classification, corpus, extraction, geometry, statistics, steering_test
from jaxemo.emotions.classification import Classification
from jaxemo.emotions.validation import TESTS, Material, Validation, validate
from jaxemo.language_model import LanguageModel
from jaxemo.report import figures, page
from jaxemo.report.figures import percent
from jaxemo.report.verdicts import p_of, verdicts

# ---- how it was made ----------------------------------------------------------------------------------------------------


def methods(m: Material, tested: Validation) -> dict[str, str]:
    """What a reader needs to know to make the same: from the vectors' provenance, and of this run."""
    about = of_vectors(m.vectors) | {
        "layer read": f"{tested.layer} of 0 to {m.lm.config.n_layers - 1}, {tested.how}",
        "held-out texts": f"{m.heldout.name}, {len(m.heldout.stories)} stories, sha256 {m.heldout.sha256[:16]}",
    }
    if m.written is not None:
        about["model-written texts"] = (
            f"{m.written.name}, {len(m.written.stories)} stories, sha256 {m.written.sha256[:16]}"
        )
    known = m.vectors.provenance.get("corpus_sha256")
    if m.training is not None and known and known != m.training.sha256:
        about["caution"] = (
            f"{m.training.name}, which the baselines learn from, is no longer what the vectors were made from"
        )
    return about | {
        "random seed": str(m.seed),
        "tested with": f"jaxemo {jaxemo.__version__}, jax {jax.__version__}, numpy {np.__version__}, scipy {scipy.__version__}",
        "machine": f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}, Python {platform.python_version()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": ", ".join(f"{name} {value:.0f}" for name, value in tested.seconds.items()),
    }


def of_vectors(vectors: EmotionVectors) -> dict[str, str]:
    """What the vectors' provenance says, as sentences; what it does not say is left out."""
    p, removed = vectors.provenance, vectors.provenance.get("components_removed")
    said = {
        "model": (
            p.get("model"),
            p.get("made_for"),
            p.get("dtype"),
            p.get("model_sha256") and f"sha256 {p['model_sha256'][:16]}",
        ),
        "corpus": (
            p.get("corpus"),
            p.get("stories") and f"{p['stories']} stories",
            p.get("neutral_texts") and f"{p['neutral_texts']} neutral texts",
            p.get("corpus_sha256") and f"sha256 {p['corpus_sha256'][:16]}",
        ),
        "tokens averaged": ("skip" in p and f"token {p['skip'] + 1} of a story to token {p.get('longest', 'last')}",),
        "directions": (
            f"{len(vectors.names)} emotions at {len(vectors.layers)} of {len(vectors.directions)} layers",
            p.get("method", "mean over an emotion's stories less the mean over emotions"),
            "unit length",
        ),
        "denoising": (
            "denoise" in p
            and (f"{percent(p['denoise'])} of the neutral texts' variance taken out" if p["denoise"] else "none"),
            removed and max(removed) and f"{min(removed)} to {max(removed)} components a layer",
        ),
        "extracted with": tuple(f"{name} {version}" for name, version in p.get("versions", {}).items()),
    }
    return {name: ", ".join(str(part) for part in parts if part) for name, parts in said.items() if any(parts)}


# ---- the page -----------------------------------------------------------------------------------------------------------


def summary(tested: Validation) -> str:
    """Every result, and what may be concluded."""
    return "\n\n".join([tested.summary(), "\n".join(f"{v.mark} {v.text}" for v in verdicts(tested))])


def render(tested: Validation, about: Mapping[str, str]) -> str:
    """One HTML page that loads nothing, `about` in its box of methods; the same results give the same text."""
    r, found = tested, tested.found
    shown: dict[str, Any] = {}
    if "stories" in found:
        order = figures.order_of(found["stories"][0], found.get("cosines"))
        shown["stories"] = [
            {
                "c": c,
                "panels": figures.by_layer(c),
                "legend": figures.by_layer_legend(c),
                "metrics": figures.METRICS[: figures.metrics(c)],
                "rates": {name: c.rates(name)[: figures.metrics(c)] for name in c.guesses},
                "confusion": figures.confusion(c, order),
                "largest": int(c.confusion.max()),
                "most": confused(c),
                **_families(c),
            }
            for c in found["stories"]
        ]
    if "implicit" in found:
        shown["implicit"], shown["implicit limit"] = figures.implicit(found["implicit"])
    if "cosines" in found:
        names = r.vectors.names
        shown["cosines"], shown["cosines limit"] = figures.cosines(found["cosines"], names)
        shown["pairs"] = page.extreme_pairs(found["cosines"], names)
    if "affect" in found:
        parts = geometry.components(r.vectors, found["affect"].layer, len(found["affect"].share))
        human = {norm: geometry.human_norms(r.vectors.names, norm) for norm in found["affect"].norms}
        shown["map"] = figures.components(parts, r.vectors.names, human["valence"])
        shown["ratings"] = [figures.rating(parts, k, r.vectors.names, human[norm], norm)
                            for norm, k in zip(found["affect"].norms, found["affect"].expected, strict=True)]  # fmt: skip
    if "clusters" in found:
        c = found["clusters"]
        known, of = np.unique(c.families, return_inverse=True)
        shown["clusters"] = {
            "families": known.tolist(),
            "rows": [
                {
                    "count": [int(((c.labels == k) & (of == f)).sum()) for f in range(len(known))],
                    "names": [n for n, at in zip(c.names, c.labels, strict=True) if at == k],
                }
                for k in range(c.labels.max() + 1)
            ],
        }
    if "similarity" in found:
        shown["similarity"] = figures.similarity(found["similarity"])
    if "self-cosine" in found:
        shown["self-cosine"] = figures.self_cosine(found["self-cosine"], r.vectors.names)
        shown["noisiest"] = sorted(zip(found["self-cosine"].tolist(), r.vectors.names, strict=True))[:5]
    if "numbers" in found:
        shown["numbers"] = figures.numbers(found["numbers"])
    if "lens" in found:
        shown["lens"] = figures.lens_layers(found["lens"])
    if "speakers" in found:
        shown["speakers"] = figures.speakers_told(found["speakers"]), figures.speakers_layers(found["speakers"])
    if "steering" in found:
        shown["steering"] = page.test_plots(found["steering"])
    return (
        page.environment()
        .get_template("model.html")
        .render(
            r=r,
            found=found,
            missing=r.missing,
            shown=shown,
            titles={name: title for name, (title, _) in TESTS.items()},
            verdicts=verdicts(r),
            about=about,
            display=corpus.DISPLAY,
            np=np,
            p_of=p_of,
            wilson=statistics.wilson,
            table=page.test_table(found["steering"]) if "steering" in found else None,
            usable=steering_test.USABLE,
            top=classification.TOP,
        )
    )


def _families(c: Classification) -> dict[str, Any]:
    if figures.metrics(c) < 3:
        return {"families": None}
    known, counts = figures.family_confusion(c)
    return {
        "families": known,
        "counts": counts,
        "family": figures.shares(known, counts, f"Families of emotion guessed, {c.corpus}", "{r} taken for {c}: {v} %"),
    }


def confused(c: Classification, count: int = 10) -> list[tuple[str, str, int]]:
    """The most frequent mistakes that were made more than once: implied, guessed, how often."""
    wrong = c.confusion * (1 - np.eye(len(c.names), dtype=int))
    order = np.argsort(-wrong.ravel(), kind="stable")[:count]
    pairs = [(int(i // len(c.names)), int(i % len(c.names))) for i in order]
    return [(c.names[a], c.names[b], int(wrong[a, b])) for a, b in pairs if wrong[a, b] > 1]


def write(tested: Validation, about: Mapping[str, str], path: str | os.PathLike) -> None:
    """Write the page; a file that is there is replaced whole or not at all."""
    files.write_atomically(path, render(tested, about).encode())


def run(
    lm: LanguageModel, out: str | os.PathLike | None, vectors: str | os.PathLike | None = None, training: str | None = None,
    written: str | os.PathLike | None = None, names: Sequence[str] = tuple(TESTS), say: Callable[[str], None] = print,
) -> Validation:  # fmt: skip
    """Test the directions of a model and write the page to `out`; without `vectors` they are extracted and kept beside it. Without
    `out`, which needs `vectors`, no page is written.

    `training` names the corpus they are made from (see `corpus.named`), `written` a file of stories that the model wrote. Killed at any
    moment of the extraction, the same call goes on from there. Raises OSError at once where `out` cannot be written.
    """
    if out is not None:
        files.check_writable(out)
    own = corpus.load(written) if written is not None else None
    if vectors is not None:
        found = EmotionVectors.load(vectors)
    elif out is not None:
        found = _extracted(
            lm, corpus.named(training or "shipped"), f"{os.path.splitext(os.fspath(out))[0]}.vectors.safetensors", say
        )
    else:
        raise ValueError("directions that are extracted are kept beside the page: give its name, or vectors")
    m = Material(lm, found, made_from(found, training), corpus.heldout(), own)
    tested = validate(m, names, say)
    if out is not None:
        write(tested, methods(m, tested), out)
    return tested


def _extracted(lm: LanguageModel, stories: corpus.Corpus, path: str, say: Callable[[str], None]) -> EmotionVectors:
    """The vectors in `path`, or extracted and written there. Raises ValueError where it holds those of other weights or stories."""
    if os.path.exists(path):
        found = EmotionVectors.load(path)
        same = found.provenance.get("model_sha256"), found.provenance.get("corpus_sha256")
        if same != (params.fingerprint(lm.params), stories.sha256):
            raise ValueError(f"{path} holds vectors of other weights or stories; remove it, or give it as --vectors")
        say(f"Taking the directions in {path} ...")
        return found
    files.check_writable(path)
    say(f"Extracting directions, to be kept in {path} ...")
    found = extraction.extract(lm, stories, checkpoint=f"{path}.part")
    found.save(path)
    return found


def made_from(vectors: EmotionVectors, name: str | None = None) -> corpus.Corpus | None:
    """The corpus called `name`, by default the one shipped with jaxemo that `vectors` say they were made from, if it is one."""
    if name is not None:
        return corpus.named(name)
    return next((c for c in (corpus.shipped(), corpus.starter()) if c.name == vectors.provenance.get("corpus")), None)
