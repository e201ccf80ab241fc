"""A model's report, from made-up results: whole, escaped, self-contained, and every number that of the result."""

import dataclasses
import json
import re

import numpy as np
import pytest
import scipy.stats
from conftest import make_model
from test_report import Page, check_loads_nothing, check_whole

from jaxemo import cli, params
from jaxemo.emotions import (
    EmotionVectors,
    classification,
    corpus,
    extraction,
    geometry,
    lens,
    prompts,
    speakers,
    steering_test,
)
from jaxemo.emotions.validation import TESTS, Material, Validation, validate
from jaxemo.report import figures, model, page, verdicts
from jaxemo.report.figures import percent, signed

HOSTILE = "<script>alert(1)</script>"
WORDS = tuple(row["emotion"] for row in corpus.table("glasgow_norms.csv"))


def made_up(names=WORDS[:40], families=None, L=5, D=24, seed=0):
    """A Validation of made-up vectors; nothing was measured on a model."""
    rng, E = np.random.default_rng(seed), len(names)
    families = families or classification.families_of(names)
    axis = rng.standard_normal(D)
    base = rng.standard_normal((E, D)) + np.nan_to_num(geometry.human_norms(names, "valence") - 5)[:, None] * axis
    walk = base + np.cumsum(0.3 * rng.standard_normal((L, E, D)), axis=0)
    vectors = EmotionVectors.from_directions({n: walk[:, e] for e, n in enumerate(names)}, np.full(L, 10.0), PROVENANCE)
    vectors = dataclasses.replace(vectors, measured={"self_cosine": rng.uniform(0.8, 1, E)})

    def told(of, n, names, families, random):
        labels = np.repeat(np.arange(len(names)), n)
        scores = {
            name: rng.standard_normal((k, len(labels), len(names))) + s * np.eye(len(names))[labels]
            for name, k, s in (("directions", L, 2), ("bag of words", 1, 1), ("embedding table", 1, 0.5))
        }
        drawn = rng.standard_normal((random, L, len(labels), len(names)))
        folds = ("shop", "water", "shop")[:n] * len(names)
        return classification.compare(of, names, families, labels, folds, scores, drawn, range(L), L)

    shown = [n for n in names if n in corpus.DISPLAY] or list(names[:3])
    n, R, S = 5, 30, len(shown)
    implied = told("implicit prompts", 2, shown, ("",) * S, 3)
    found = dict(
        stories=(told("held & out", 2, names, families, 20), told("written", 3, names, families, 20)),
        implicit=prompts.Implicit(
            "before_answer",
            tuple(shown),
            rng.standard_normal((S, S)) + 2 * np.eye(S),
            S - 1,
            rng.integers(0, 3, R),
            0.0012,
            implied,
        ),
        numbers=prompts.Numbers(
            2,
            "before_answer",
            tuple(f"template {i}" for i in range(n)),
            tuple((names * n)[:n]),
            np.array([1, -1, 1, -1, 1]),
            *rng.standard_normal((4, n)),
            rng.standard_normal((R, n)),
            rng.standard_normal((R, n)),
            {},
        ),
        lens=lens.Lens(
            tuple(names),
            3,
            ("a", "b", HOSTILE),
            *(tuple(("word", HOSTILE, f"{e}") for e in range(E)) for _ in "tb"),
            rng.uniform(0, 0.2, E),
            rng.uniform(0, 1, E),
            rng.uniform(0, 1, (7, E)),
            rng.uniform(0, 1, L),
        ),
        affect=geometry.affect(vectors, 3) if np.isfinite(geometry.human_norms(names, "valence")).sum() > 9 else None,
        clusters=geometry.clusters(vectors, 3, families, k=min(10, E), draws=50),
        similarity=geometry.similarity(vectors) if E > 2 else None,
        speakers=speakers.Speakers(
            tuple(names[:4]),
            3,
            *rng.standard_normal((2, L, 4, D)),
            *[rng.uniform(-1, 1, (L, 4))],
            rng.uniform(-1, 1, L),
            rng.uniform(-1, 1, (L, 2, 4)),
            rng.random((2, 50)) < [[0.6], [0.3]],
            np.ones((2, 3), int),
            np.array([0.25, 0.26]),
            rng.uniform(0.2, 0.3, (2, 9)),
        ),
        **{"self-cosine": vectors.measured["self_cosine"], "cosines": geometry.cosines(vectors, 3)},
    )
    known = {name: result for name, result in found.items() if result is not None}
    return Validation("tiny & <i>odd</i>", vectors, 3, "asked for", known)


PROVENANCE = {
    "model": "tiny",
    "made_for": "3 layers",
    "model_sha256": "ab" * 32,
    "corpus": "made & up",
    "corpus_sha256": "cd" * 32,
    "stories": 480,
    "neutral_texts": 7,
    "skip": 50,
    "longest": 160,
    "denoise": 0.5,
    "components_removed": [3, 4, 9, 3, 3],
    "dtype": "float32",
    "versions": {"jaxemo": "0.1", "jax": "9.9"},
}


def steering(names=corpus.DISPLAY, seed=0):
    rng, S, R, E = np.random.default_rng(seed), 3, 5, len(names)
    return steering_test.TextTest(
        tuple(names),
        3,
        (0.1, 0.25, 0.5),
        *(rng.normal(size=shape) for shape in ((S, E), (S, E), (S, R, E))),
        -0.1 * rng.uniform(size=(S, E)),
        rng.normal(size=(S, R)),
        rng.uniform(size=(S, E)),
    )


def but(tested, **found):
    return dataclasses.replace(tested, found={**tested.found, **found})


@pytest.fixture(scope="module")
def report():
    return but(made_up(), steering=steering())


@pytest.fixture(scope="module")
def text(report):
    return model.render(report, model.of_vectors(report.vectors))


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


def section(parsed, name):
    (found,) = (e for e in parsed.all("section") if e.get("id") == name)
    return re.sub(r"[ \n]+", " ", found["text"])


def test_the_report_is_well_formed_and_loads_nothing(parsed, text):
    check_whole(parsed, text)
    check_loads_nothing(parsed, text)
    assert {e["id"] for e in parsed.all("section")} == {*TESTS, "conclusions", "methods"}
    assert len(text) < 1e6


def test_hostile_names_stay_text(report):
    names = (HOSTILE, '"&quot;', *WORDS[:12])
    tested = but(made_up(names, tuple(f"</script>{i % 3}" for i in range(14))), steering=steering(names))
    text = model.render(dataclasses.replace(tested, missing={"numbers": HOSTILE}), {HOSTILE: HOSTILE})
    parsed = Page(text)
    assert "<script>alert" not in text and "alert(1)" in text
    scripts = parsed.all("script")
    assert {e.get("type") for e in scripts} == {None, "application/json"}
    for e in scripts[:-1]:
        assert not (
            {"<", ">"} & set(text[text.index("application/json") :].split("</script>")[0].split(">", 1)[1])
        ) and json.loads(e["text"])
    matrix = next(e for e in parsed.all("svg", "chart") if e["aria-label"].startswith("Cosine"))
    assert HOSTILE in matrix["text"] and '"&quot;' in matrix["text"]


def test_every_number_of_the_tables_is_the_results(parsed, report):
    found = report.found
    for c in found["stories"]:
        said = section(parsed, "stories")
        assert f"n = {len(c.labels)}" in said
        for name in c.guesses:
            row = " ".join(f"{percent(r, 1)} [{percent(a, 1)}, {percent(b, 1)}]" for r, a, b in c.rates(name))
            assert f"{name}{row}".replace(" ", "").replace("\u202f", "") in said.replace(" ", "").replace("\u202f", "")
    i, said = found["implicit"], section(parsed, "implicit")
    for e, name in enumerate(i.names):
        assert name + "".join(signed(v) for v in i.z[e]) in said
    assert f"{i.hits} of {len(i.names)} rows" in said and "p = 0.0012" in said and "before the answer" in said
    n, said = found["numbers"], section(parsed, "numbers")
    for k in range(len(n.rho)):
        row = f"{n.templates[k]}{n.emotions[k]}{'rise' if n.expected[k] > 0 else 'fall'}"
        assert row + "".join(signed(v[k]) for v in (n.slope, n.control_slope, n.rho, n.control_rho)) in said
    assert f"excess {signed((n.slope - n.control_slope).mean())}" in said and f"p = {n.p:.3f}" in said
    v, said = found["lens"], section(parsed, "lens")
    assert all(
        f"{name}word, {HOSTILE}, {e}" in said and percent(v.share[e], 1) in said for e, name in enumerate(v.names)
    )
    a, said = found["affect"], section(parsed, "affect")
    for k in range(2):
        assert (
            f"r = {signed(a.r[k])}, 95 % bootstrap interval {signed(a.interval[k, 0])} to {signed(a.interval[k, 1])}, n = {a.rated} words"
            in said
        )
        assert f"r = {signed(a.decoded[k, 0])} [{signed(a.decoded[k, 1])}, {signed(a.decoded[k, 2])}]" in said
    c, said = found["clusters"], section(parsed, "clusters")
    assert f"Adjusted Rand index {c.rand:.2f}" in said and f"p = {c.p:.4f}" in said
    for k in range(10):
        assert ", ".join(name for name, of in zip(c.names, c.labels, strict=True) if of == k) in said
    s, said = found["speakers"], section(parsed, "speakers")
    for hits, chance in zip(s.hits, s.chance, strict=True):
        wilson = scipy.stats.binomtest(int(hits.sum()), 50).proportion_ci(method="wilson")
        assert (
            f"{percent(hits.mean(), 1)} [{percent(wilson.low, 1)}, {percent(wilson.high, 1)}], always guessing the commonest {percent(chance, 1)}"
            in said
        )
    assert f"{np.median(found['self-cosine']):.3f}" in section(parsed, "self-cosine")
    for row in page.test_table(found["steering"]):
        assert f"{signed(row['own'])}{signed(row['random'][0])} ± {row['random'][1]:.2f}" in section(parsed, "steering")


def test_what_is_pointed_at_is_the_result(parsed, report):
    """The data behind the matrices, and the titles of the dots."""
    held = [json.loads(e["text"]) for e in parsed.all("script") if e.get("type")]
    confusion, cosines = (
        next(d for d in held if d["says"].startswith(start)) for start in ("{r} taken for", "{r} and {c}")
    )
    c, names = report.found["stories"][0], report.vectors.names
    emotions = next(d for d in held if len(d["rows"]) == len(names) and "taken" in d["says"])
    order = [names.index(name) for name in emotions["rows"]]
    assert emotions["columns"] is None and np.array_equal(
        np.reshape(emotions["values"], (len(names),) * 2), c.confusion[np.ix_(order, order)]
    )
    assert [c.families[e] for e in order] == sorted(c.families)
    known, counts = figures.family_confusion(c)
    assert confusion["rows"] == known and counts.sum() == len(c.labels)
    assert np.array_equal(
        np.reshape(confusion["values"], counts.shape), np.round(100 * counts / counts.sum(1, keepdims=True))
    )
    order = [names.index(name) for name in cosines["rows"]]
    want = report.found["cosines"][np.ix_(order, order)]
    for got, value, same in zip(cosines["values"], want.ravel(), np.eye(len(names), dtype=bool).ravel(), strict=True):
        assert got is None if same else abs(got / 100 - value) < 0.0051
    said = [e["text"] for e in parsed.all("title")]
    for i, row in enumerate(c.by_layer):
        assert all(f"layer {i}: {percent(v, 1)}" in said for v in row)
    n = report.found["numbers"]
    assert all(
        f"{n.templates[k]} · {n.emotions[k]}: the harmless count {signed(n.control_slope[k])}" in said for k in range(5)
    )


def test_dots_stand_where_their_numbers_are(report):
    parts = geometry.components(report.vectors, 3, 5)
    names = report.vectors.names
    human = geometry.human_norms(names, "valence")
    drawn = [e for e in Page(figures.rating(parts, 0, names, human, "valence")).all("g") if "data-x" in e]
    at = {e["text"].split(":")[0]: (float(e["data-x"]), float(e["data-y"])) for e in drawn}
    at = {
        name: place for name in names for said, place in at.items() if said.removeprefix(name) == name or said == name
    }
    x, y = np.array([at[name] for name in names]).T
    assert (
        scipy.stats.pearsonr(x, human).statistic > 0.9999
        and scipy.stats.pearsonr(y, parts.coordinates[:, 0]).statistic < -0.9999
    )


def verdict(tested, test):
    return [v for v in verdicts.verdicts(tested) if v.test == test]


def test_conclusions_follow_the_numbers():
    tested = made_up()
    strong = dataclasses.replace(tested.found["implicit"], p=0.0002, hits=12, guesses=told_by(0.8, 0.3, 0.1))
    (v,) = verdict(but(tested, implicit=strong), "implicit")
    assert v.holds and f"above every one of {len(strong.random_hits)} random draws" in v.text and v.mark == "✓ holds:"
    own = strong.guesses.guesses["directions"]
    alike = dataclasses.replace(strong.guesses, guesses={**strong.guesses.guesses, "bag of words": own})
    (v,) = verdict(but(tested, implicit=dataclasses.replace(strong, guesses=alike)), "implicit")
    assert v.holds is None and "not told from a bag of words" in v.text, "words alone do as well"
    (v,) = verdict(but(tested, implicit=dataclasses.replace(strong, p=0.03)), "implicit")
    assert v.holds is None and "cannot be told from chance" in v.text, "0.03 is not small among so many"
    (v,) = verdict(but(tested, implicit=dataclasses.replace(strong, p=0.5, hits=0)), "implicit")
    assert v.holds is False and v.mark == "✗ does not hold:"
    assert [v.holds for v in verdict(but(tested, **{"self-cosine": np.full(40, 0.95)}), "self-cosine")] == [True]
    assert [v.holds for v in verdict(but(tested, **{"self-cosine": np.full(40, 0.5)}), "self-cosine")] == [False]
    for random, holds, said in ((0.1, True, "more alike than"), (0.9, False, "above 0 of 20 random draws")):
        alike = geometry.Similarity(np.full((3, 3), 0.8), np.full((20, 3, 3), random))
        (v,) = verdict(but(tested, similarity=alike), "similarity")
        assert v.holds is holds and said in v.text
    for beats, p, holds, said in ((True, 0.001, True, "is in"), (False, 0.4, None, "is not told from chance")):
        affect = dataclasses.replace(
            tested.found["affect"],
            p=np.full(2, p),
            interval=np.array([[0.2, 0.9]] * 2) if beats else np.array([[-0.2, 0.3]] * 2),
        )
        assert {v.holds for v in verdict(but(tested, affect=affect), "affect")} <= {
            holds,
            None if not beats else True,
            False,
        }
        assert all(said in v.text for v in verdict(but(tested, affect=affect), "affect"))


def told_by(directions, words, random, n=200, E=20):
    """A Classification in which each way's top five hold the given share of texts."""

    def guesses(share, R=1):
        rank = np.where(np.arange(n) < share * n, 0.0, 19.0)[None].repeat(R, 0)
        return classification.Guesses(np.zeros((R, n), int), rank, rank == 0)

    return classification.Classification(
        "c",
        tuple(f"e{i}" for i in range(E)),
        ("",) * E,
        np.zeros(n, int),
        ("a",) * n,
        {
            "directions": guesses(directions),
            "bag of words": guesses(words),
            "random directions": guesses(random, 20),
            "majority": guesses(0.05),
        },
        np.zeros((3, 3)),
    )


@pytest.mark.parametrize(
    "directions, words, random, holds, said",
    [
        (0.8, 0.4, 0.3, True, "better than a bag of words"),
        (0.4, 0.8, 0.3, None, "worse than a bag of words"),
        (0.5, 0.5, 0.3, None, "not told from a bag of words"),
        (0.2, 0.1, 0.3, False, "above 0 of 20 random draws"),
        (0.05, 0.02, 0.01, False, "not told from always guessing the commonest"),
    ],
)
def test_stories_are_told_only_beyond_every_baseline(directions, words, random, holds, said):
    v = verdicts._told(told_by(directions, words, random))
    assert v.holds is holds and said in v.text


def test_the_sign_test_is_mcnemars():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 60)) < [[0.7], [0.5]]
    n = int((a ^ b).sum())
    assert np.isclose(
        verdicts.sign_test(a, b), min(1, 2 * scipy.stats.binom.cdf(min((a & ~b).sum(), (b & ~a).sum()), n, 0.5))
    )
    assert verdicts.sign_test(a, a) == 1


def test_what_is_missing_is_said():
    names = ("glad", "low")
    rng = np.random.default_rng(0)
    vectors = EmotionVectors.from_directions({n: rng.standard_normal((3, 8)) for n in names}, np.ones(3))
    training = corpus.Corpus("two", tuple(corpus.Story(n, "t", f"{n} text {i}") for n in names for i in range(3)), ())
    m = Material(Tiny(), vectors, None, training, progress=False)
    report = validate(m, ["self-cosine", "stories", "cosines", "clusters", "affect", "similarity"], say=lambda _: None)
    assert set(report.found) == {"cosines"} and report.layer == vectors.layer
    about = model.methods(m, report)
    parsed = Page(model.render(report, about))
    for name, why in (
        ("self-cosine", "without a bootstrap|with a bootstrap"),
        ("stories", "not at hand"),
        ("affect", "0 of 2 words are rated"),
        ("similarity", "at least three"),
        ("clusters", "k=10"),
    ):
        assert re.search(f"Not tested here: .*({why})", section(parsed, name)), name
        assert name in report.summary()
    assert "denoising" not in about and "sha256" in about["held-out texts"]
    with pytest.raises(ValueError, match="no test named 'astrology'; there are self-cosine, stories"):
        validate(m, ["astrology"])


class Tiny:
    """As much of a model as those tests look at."""

    source = "tiny"
    config = type("config", (), {"n_layers": 3})


def test_without_families_or_a_bootstrap_the_page_says_so(report):
    names = tuple(f"word {i}" for i in range(12))
    tested = made_up(names, ("",) * 12)
    found = {name: result for name, result in tested.found.items() if name != "self-cosine"}
    missing = {"self-cosine": "not extracted with a bootstrap"}
    text = model.render(dataclasses.replace(tested, found=found, missing=missing), {})
    parsed = Page(text)
    assert (
        "no families to compare with" in section(parsed, "clusters")
        and "By family" not in text
        and "not extracted with a bootstrap" in section(parsed, "self-cosine")
    )
    assert "affect" not in {e["id"] for e in parsed.all("section")} and "nan" not in re.sub(
        r"<script.*?</script>", "", text.lower().replace("covenant", ""), flags=re.DOTALL
    )


def test_methods_come_from_the_provenance(parsed):
    said = section(parsed, "methods")
    for part in (
        "sha256 abababababababab",
        "made & up",
        "480 stories",
        "7 neutral texts",
        "token 51 of a story to token 160",
        "50\u202f% of the neutral",
        "3 to 9 components",
        "jax 9.9",
    ):
        assert part.replace("\u202f", " ") in said.replace("\u202f", " "), part


def test_the_command_line_refuses_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_load", lambda args: pytest.fail("the work was begun"))
    monkeypatch.setattr(cli, "cache_compilations", lambda wanted: None)
    assert (
        cli.main(["validate", "astrology", "--vectors", "x"]) == 2
        and "no test named 'astrology'" in capsys.readouterr().err
    )
    assert (
        cli.main(["report", "-o", str(tmp_path / "no" / "r.html")]) == 2
        and "there is no directory" in capsys.readouterr().err
    )


def test_extracted_vectors_are_kept_beside_the_report_and_taken_again(tmp_path, monkeypatch):
    stories = corpus.Corpus("jaxemo corpus", (corpus.Story("glad", "t", "text"),), ())
    monkeypatch.setattr(corpus, "shipped", lambda: stories)
    lm, made = make_model(), []

    def extract(lm, of, checkpoint):
        made.append(checkpoint)
        about = {"model_sha256": params.fingerprint(lm.params), "corpus_sha256": of.sha256, "corpus": of.name}
        return EmotionVectors.from_directions(
            {n: np.eye(3, 32)[[i, 2, i]] for i, n in enumerate(("glad", "low"))}, np.ones(3), about
        )

    monkeypatch.setattr(extraction, "extract", extract)
    out, kept = tmp_path / "r.html", tmp_path / "r.vectors.safetensors"
    for _ in range(2):
        report = model.run(lm, out, names=("cosines",), say=lambda _: None)
        assert (
            made == [f"{kept}.part"]
            and kept.exists()
            and "Cosines of the directions" in out.read_text()
            and set(report.found) == {"cosines"}
        )
    with pytest.raises(ValueError, match="vectors of other weights or stories"):
        model.run(make_model(seed=1), out, names=("cosines",), say=lambda _: None)
    assert model.run(lm, None, kept, names=("cosines",), say=lambda _: None).found.keys() == {"cosines"}
    with pytest.raises(ValueError, match="give its name, or vectors"):
        model.run(lm, None)


def test_a_report_is_written_whole(report, tmp_path):
    path = tmp_path / "report.html"
    model.write(report, {"model": "tiny"}, path)
    assert path.read_text(encoding="utf-8") == model.render(report, {"model": "tiny"}) and [
        p.name for p in tmp_path.iterdir()
    ] == ["report.html"]
    said = model.summary(report)
    assert "implicit prompts" in said and "✓ holds:" in said and said.count("\n\n") > 8
