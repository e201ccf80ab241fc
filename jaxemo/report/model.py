"""A model's report: every test of its directions, what may be concluded from each by fixed rules, and the page of it all."""

import dataclasses
import datetime
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy.stats

import jaxemo
from jaxemo import files, params
from jaxemo.emotions import (
    EmotionVectors,
    classification,
    corpus,
    geometry,
    lens,
    prompts,
    speakers,
    statistics,
    steering_test,
)
from jaxemo.emotions.classification import AVERAGED, Classification
from jaxemo.emotions.validation import Validation
from jaxemo.language_model import LanguageModel
from jaxemo.report import figures, page
from jaxemo.report.figures import percent, signed

LEARNT = {
    "bag of words": "a bag of words",
    "embedding table": "the embedding table",
}  # baselines, as a sentence has them
STABLE = 0.9  # a median bootstrap self-cosine from which directions count as stable


@dataclasses.dataclass(frozen=True)
class Material:
    """What tests are made with: the stories that `vectors` were made from (None where they are not at hand), stories held out, and
    stories that the model wrote itself, if any."""

    lm: LanguageModel
    vectors: EmotionVectors
    training: corpus.Corpus | None
    heldout: corpus.Corpus
    written: corpus.Corpus | None = None
    layer: int = -1
    seed: int = 0
    progress: bool = True


@dataclasses.dataclass(frozen=True)
class Report:
    """`found` holds the result of each test by its name, `missing` why another could not be made. `layer` is the one read."""

    model: str
    vectors: EmotionVectors
    layer: int
    found: Mapping[str, Any]
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def summary(self) -> str:
        parts = [f"{self.model}: layer {self.layer}"]
        for result in self.found.values():
            parts += [
                one.summary() for one in (result if isinstance(result, tuple) else (result,)) if hasattr(one, "summary")
            ]
        parts += [f"{name}: not tested: {why}" for name, why in self.missing.items()]
        return "\n\n".join([*parts, "\n".join(f"{v.mark} {v.text}" for v in verdicts(self))])


def _stories(m: Material) -> tuple[Classification, ...]:
    if m.training is None:
        raise ValueError("the baselines learn from the stories that the vectors were made from, which are not at hand")
    raw = {"not denoised": m.vectors.raw} if m.vectors.raw is not None else None
    known = [dataclasses.replace(c, stories=tuple(s for s in c.stories if s.emotion in m.vectors.names))
             for c in (m.heldout, m.written) if c is not None]  # fmt: skip
    return tuple(
        classification.classify(m.lm, m.vectors, c, m.training, others=raw, seed=m.seed, progress=m.progress)
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
    unknown = sorted(set(names) - set(TESTS))
    if unknown:
        raise ValueError(f"no test named {unknown[0]!r}; there are {', '.join(TESTS)}")


def measure(m: Material, names: Sequence[str] = tuple(TESTS), say: Callable[[str], None] = print) -> Report:
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
    return Report(m.lm.source, m.vectors, layer, found, missing, methods(m, layer, how, seconds))


def of_validation(found: Validation, vectors: EmotionVectors, about: Mapping[str, str] | None = None) -> Report:
    """The report of what `validate` found."""
    results = {"self-cosine": found.self_cosine, "cosines": geometry.cosines(vectors, found.layer)}
    results |= {name: getattr(found, name) for name in TESTS if hasattr(found, name)}
    known = {name: results[name] for name in TESTS if results.get(name) is not None}
    missing = {} if "self-cosine" in known else {"self-cosine": "these vectors were not extracted with a bootstrap"}
    return Report(found.model, vectors, found.layer, known, missing, about or {})


# ---- how it was made ----------------------------------------------------------------------------------------------------


def methods(m: Material, layer: int, how: str, seconds: Mapping[str, float]) -> dict[str, str]:
    """What a reader needs to know to make the same: from the vectors' provenance, and of this run."""
    about = of_vectors(m.vectors) | {
        "layer read": f"{layer} of 0 to {m.lm.config.n_layers - 1}, {how}",
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
        "seconds": ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
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


# ---- what may be concluded ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One conclusion: `holds` is True, False, or None for in part; `test` is what it is of."""

    test: str
    holds: bool | None
    text: str

    @property
    def mark(self) -> str:
        return {True: "✓ holds:", False: "✗ does not hold:", None: "~ in part:"}[self.holds]


def verdicts(report: Report) -> list[Verdict]:
    """The page's conclusions, each from the numbers by the rule that its text names.

    A p counts where it is below 0.05 divided by the number of results with a p on the page (Bonferroni).
    """
    found = report.found
    classified = [*found.get("stories", ()), *([found["implicit"].guesses] if "implicit" in found else ())]
    tested = sum(name in c.guesses for c in classified for name in LEARNT) + 2 * ("affect" in found)
    tested += sum(name in found for name in ("implicit", "numbers", "clusters"))
    level = 0.05 / max(1, tested)
    out: list[Verdict] = []
    if "self-cosine" in found:
        middle = float(np.median(found["self-cosine"]))
        out.append(
            Verdict(
                "self-cosine",
                middle >= STABLE,
                f"The directions are {'stable' if middle >= STABLE else 'noisy'}: from a bootstrap "
                f"sample of the topics the median cosine with themselves is {middle:.3f} (stable from {STABLE}).",
            )
        )
    for one in found.get("stories", ()):
        out.append(_told(one, level))
    if "implicit" in found:
        i = found["implicit"]
        most = int(i.random_hits.max())
        beyond = i.p < level, i.hits > most
        learnt, said = _beside(i.guesses, 1, level)
        rate = i.guesses.rates(next(iter(i.guesses.guesses)))[0]
        out.append(
            Verdict(
                "implicit",
                learnt or None if all(beyond) else (None if any(beyond) else False),
                f"Before the answer, {i.hits} of {len(i.names)} emotions are largest on their own prompts ({_than(i.hits, i.random_hits)}); "
                f"own scores {'are' if beyond[0] else 'cannot be told from chance: they are'} above permuted ones at {p_of(i.p)}. "
                f"Single prompts are told for {percent(rate[0], 1)} [{percent(rate[1], 1)}, {percent(rate[2], 1)}]{said}.",
            )
        )
    if "numbers" in found:
        n = found["numbers"]
        beyond = int((n.excess > 0).sum()), n.p < level
        out.append(
            Verdict(
                "numbers",
                bool(beyond[1]),
                f"With a number that should matter, {beyond[0]} of {len(n.rho)} scores move the expected way beyond a "
                f"harmless count; the mean excess of {signed(n.excess.mean())} sd is {'beyond' if beyond[1] else 'not told from'} that of random "
                f"directions ({p_of(n.p)}).",
            )
        )
    if "lens" in found and np.isfinite(found["lens"].share).any():
        v = found["lens"]
        own, other, draws = np.nanmedian(v.share), np.nanmedian(v.others), np.nanmedian(v.random, axis=1)
        better = own < draws.min(), own < other
        out.append(
            Verdict(
                "lens",
                all(better) or (None if any(better) else False),
                f"A direction puts its emotion's own word behind {percent(own, 1)} of the vocabulary (median): "
                f"{'higher than every' if better[0] else 'not higher than every'} one of {len(draws)} random directions "
                f"(median {percent(float(np.median(draws)), 1)}), {'and ' if all(better) else ''}{'higher' if better[1] else 'not higher'} than other "
                f"emotions' directions ({percent(other, 1)}).",
            )
        )
    if "steering" in found:
        t = found["steering"]
        own, draws = t.own[t.best].mean(), t.random[t.best].mean(-1)
        costs = t.facts[t.best].mean()
        beyond = own > max(0.0, draws.max()), costs > -steering_test.USABLE
        out.append(
            Verdict(
                "steering",
                all(beyond) or (None if beyond[0] else False),
                f"At strength {t.strengths[t.best]:g}, adding a direction changes its own word by {signed(own)} nats on average, "
                f"{'more than every' if beyond[0] else 'not more than every'} one of {len(draws)} random directions (at most {signed(draws.max())}); "
                f"facts change by {signed(costs)}.",
            )
        )
    if "affect" in found:
        out += _affect(found["affect"], level)
    if "clusters" in found and len(set(found["clusters"].families)) > 1:
        c = found["clusters"]
        out.append(
            Verdict(
                "clusters",
                c.p < level,
                f"k-means groups the directions {'more' if c.p < level else 'no more'} like the families of words than "
                f"shuffled families: adjusted Rand index {c.rand:.2f}, 95 % of shuffled below {c.shuffled:.2f}, {p_of(c.p)}.",
            )
        )
    if "similarity" in found:
        s = found["similarity"]
        off = ~np.eye(len(s.rho), dtype=bool) & np.isfinite(s.rho)
        if off.any():
            own, random = s.rho[off].mean(), s.random[off].mean()
            out.append(
                Verdict(
                    "similarity",
                    None if own > random else False,
                    f"Layers arrange the emotions {'more' if own > random else 'no more'} alike than random directions "
                    f"that turn as much from layer to layer: mean rho {signed(own)} against {signed(random)} (one draw, so not a test).",
                )
            )
    if "speakers" in found:
        out += _speakers(found["speakers"])
    return out


def p_of(p: float) -> str:
    return f"p = {p:.4f}" if p >= 0.0001 else "p < 0.0001"


def _than(value, draws) -> str:
    above = int((np.asarray(draws) < value).sum())
    return (
        f"above every one of {len(draws)} random draws"
        if above == len(draws)
        else f"above {above} of {len(draws)} random draws"
    )


def _told(found: Classification, level: float = 0.05) -> Verdict:
    """Holds above every random draw, above what is commonest, and better than the baselines that learn; in part without the last."""
    tested, n = next(iter(found.guesses)), len(found.labels)
    rate, low, high = found.rates(tested)[1]
    random, common = (found.guesses[name].rank < classification.TOP for name in ("random directions", "majority"))
    above = rate > random.mean(1).max() and low > common.mean()
    text = (
        f"On {n} texts of {found.corpus}, the emotion is among the first {classification.TOP} of {len(found.names)} for {percent(rate, 1)} "
        f"[{percent(low, 1)}, {percent(high, 1)}]: {_than(rate, random.mean(1))}, "
        f"{'above' if low > common.mean() else 'not told from'} always guessing the commonest ({percent(common.mean(), 1)})"
    )
    better, said = _beside(found, classification.TOP, level)
    text += said
    if figures.metrics(found) == 3:
        ways = {name: found.rates(name)[2] for name in (tested, tested + AVERAGED) if name in found.guesses}
        text += "; the family is right for " + ", ".join(
            f"{percent(r[0], 1)}{' with layers averaged' if name != tested else ''}" for name, r in ways.items()
        )
        text += f" (always guessing the commonest {percent(found.rates('majority')[2][0], 1)})"
    return Verdict("stories", (True if better else None) if above else False, text + ".")


def _beside(found: Classification, top: int, level: float) -> tuple[bool, str]:
    """Whether the tested directions have the right answer among the first `top` for more texts than each baseline that learns, by an
    exact sign test over texts, and the end of a sentence that says so."""
    own = next(iter(found.guesses.values())).rank[0] < top
    better, text = True, ""
    for name in (name for name in LEARNT if name in found.guesses):
        other = found.guesses[name].rank[0] < top
        p, more = sign_test(own, other), bool(own.mean() > other.mean())
        better = better and p < level and more
        than = ("better than" if more else "worse than") if p < level else "not told from"
        text += f", {than} {LEARNT[name]} ({percent(other.mean(), 1)}, {p_of(p)})"
    return better, text


def sign_test(a: np.ndarray, b: np.ndarray) -> float:
    """The exact p that two ways of guessing the same texts, right or not, are equally good (McNemar)."""
    only, both = int((a & ~b).sum()), int((a ^ b).sum())
    return float(scipy.stats.binomtest(only, both).pvalue) if both else 1.0


def _affect(a: geometry.Affect, level: float) -> list[Verdict]:
    out = []
    for i, norm in enumerate(a.norms):
        low, high = a.interval[i]
        there = a.p[i] < level and low * high > 0
        elsewhere = a.best_p[i] < level and a.best[i] != a.expected[i]
        decoded, d_low, d_high = a.decoded[i]
        in_all = d_low > 0 and decoded > a.random_decoded[i]
        out.append(
            Verdict(
                "affect",
                bool(there) or (None if elsewhere or in_all else False),
                f"Human {norm} {'is' if there else 'is not told from chance'} in the component where it is expected: PC{a.expected[i] + 1}, r = {signed(a.r[i])} "
                f"[{signed(low)}, {signed(high)}] over {a.rated} words, {p_of(a.p[i])}"
                + (
                    f"; it is in PC{a.best[i] + 1}, |r| = {abs(a.matrix[i, a.best[i]]):.2f}, {p_of(a.best_p[i])} for the best of {len(a.share)}"
                    if elsewhere
                    else ""
                )
                + f". From the whole directions it can{'' if in_all else 'not'} be decoded: r = {signed(decoded)} [{signed(d_low)}, {signed(d_high)}] "
                f"(random directions {signed(a.random_decoded[i])}).",
            )
        )
    return out


def _speakers(s: speakers.Speakers) -> list[Verdict]:
    out, n = [], s.hits.shape[1]
    for i, kind in enumerate(("present", "other")):
        low, high = statistics.wilson(int(s.hits[i].sum()), n)
        rate = s.hits[i].mean()
        beyond = rate > s.shuffled[i].max(), low > s.chance[i]
        out.append(
            Verdict(
                "speakers",
                all(beyond) or (None if any(beyond) else False),
                f"The emotion of the {kind} speaker is told for {percent(rate, 1)} [{percent(low, 1)}, {percent(high, 1)}] of {n} readings: "
                f"{_than(rate, s.shuffled[i]).replace('random draws', 'draws of permuted emotions')}, {'above' if beyond[1] else 'not told from'} "
                f"always guessing the commonest ({percent(s.chance[i], 1)}).",
            )
        )
    return out


# ---- the page -----------------------------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """The report as one HTML page that loads nothing; the same report gives the same text."""
    r, found = report, report.found
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
    said = verdicts(r)
    return (
        page.environment()
        .get_template("model.html")
        .render(
            r=r,
            found=found,
            missing=r.missing,
            shown=shown,
            titles={name: title for name, (title, _) in TESTS.items()},
            verdicts=said,
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


def write(report: Report, path: str | os.PathLike) -> None:
    """Write the page; a file that is there is replaced whole or not at all."""
    files.write_atomically(path, render(report).encode())


def run(
    lm: LanguageModel, out: str | os.PathLike | None, vectors: str | os.PathLike | None = None, training: str | None = None,
    written: str | os.PathLike | None = None, names: Sequence[str] = tuple(TESTS), say: Callable[[str], None] = print,
) -> Report:  # fmt: skip
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
    report = measure(Material(lm, found, made_from(found, training), corpus.heldout(), own), names, say)
    if out is not None:
        write(report, out)
    return report


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
    found = jaxemo.emotions.extract(lm, stories, checkpoint=f"{path}.part")
    found.save(path)
    return found


def made_from(vectors: EmotionVectors, name: str | None = None) -> corpus.Corpus | None:
    """The corpus called `name`, by default the one shipped with jaxemo that `vectors` say they were made from, if it is one."""
    if name is not None:
        return corpus.named(name)
    return next((c for c in (corpus.shipped(), corpus.starter()) if c.name == vectors.provenance.get("corpus")), None)
