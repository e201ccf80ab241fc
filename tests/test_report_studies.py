"""The studies' page, from planted measurements: every verdict and number is the result's, and what is missing is said."""

import dataclasses
import json
import math
import re
import types

import numpy as np
import pytest
import scipy.stats
from test_report import Page, check_loads_nothing, check_whole
from test_report_page import section

from jaxemo.report import chart, studies
from jaxemo.report.figures import percent, signed
from jaxemo.studies import arms, battery, choices, prediction, preference, statistics, store
from jaxemo.studies.choices import Choice, Claim

MODEL = types.SimpleNamespace(source="tiny & <i>odd</i>")
N = 30
CLAIMS = (Claim("more desperate, more shortcuts", "desperate", +1), Claim("more calm, fewer shortcuts", "calm", -1))


def planted(out, name, claims, slopes, base=0.0, cost=0.0, seed=0):
    """A study whose log-odds rise by `slopes` of emotions a dose, with every file that a run leaves in `out`."""
    rng, situations = np.random.default_rng(seed), []
    for i in range(N):
        situations += [Choice(f"{i}", f"q {i}", "this", "that"), Choice(f"{i}, twin", f"t {i}", "this", "that", f"{i}")]
    own = np.array([not choice.twin for choice in situations])
    by_letter = np.repeat(np.arange(N) % 2 == 0, 2)
    made = [arms.Arm("none", "", 0.0, None)]
    made += [arms.Arm("emotion", emotion, dose, object()) for emotion in slopes for dose in arms.DOSES]
    for kind, mark, count in (("random", "", 20), ("matched", ", matched", 20), ("irrelevant", "", 3)):
        names = [f"topic {i}" if kind == "irrelevant" else f"random-{i}{mark}" for i in range(count)]
        made += [arms.Arm(kind, direction, dose, object()) for direction in names for dose in (-1.0, 1.0)]
    plain = {reading: base + rng.standard_normal(2 * N) for reading in choices.READINGS}
    effect = slopes | {
        arm.direction: (0.1 if arm.kind == "random" else 0.05) * rng.standard_normal()
        for arm in made
        if arm.dose == -1 and arm.direction not in slopes
    }
    found = {}
    for arm in made:
        odds = {
            r: plain[r] + arm.dose * effect.get(arm.direction, 0) + 0.2 * rng.standard_normal(2 * N) * abs(arm.dose)
            for r in plain
        }
        odds["letter"][~by_letter] = np.nan
        if arm.kind not in ("none", "emotion"):
            for values in odds.values():
                values[~own] = np.nan
        if arm.kind in ("matched", "irrelevant"):
            odds["letter"][:] = np.nan
        fluency = np.where(np.isnan(odds["continuation"]), np.nan, -2.0 - cost * (arm.kind != "none"))
        valid = np.where(np.isnan(odds["letter"]), np.nan, 0.8)
        found[arm.name] = odds | {"fluency": fluency, "valid": valid, "lengths": np.tile([5.0, 5.0], (2 * N, 1))}
    lines = [{"study": {"weights": "w", "choices": name}}]
    for arm, of in found.items():
        record = {key: store.numbers(of[key]) for key in (*choices.READINGS, "fluency", "valid")}
        lines.append({"arm": arm, "steering": "x"} | record | {"lengths": of["lengths"].tolist()})
    (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = choices.judge(name, MODEL, situations, claims, made, found, arms.Strength(0.1, 0.05, (3, 4)))
    store.save(result, out, name)
    return result, found, own


def preferred(out):
    """A preference result; steering moves odds as readings say, and random directions by known amounts."""
    n, names = 12, ("happy", "calm", "afraid", "never steered")
    worth, r = np.linspace(1.5, -1.5, n), np.array([0.6, 0.3, -0.7, np.nan])
    size = {"happy": 0.5, "calm": 0.2, "afraid": -0.6}
    effects = {
        name: statistics.Effect(size[name], size[name] - 0.1, size[name] + 0.1, n, 0.004, 1 / 21) for name in names[:3]
    }
    result = preference.Preference(
        MODEL.source, tuple(f"activity {i}" for i in range(n)), ("rest", "learning", "unsafe") * 4, worth, worth - 0.2, worth + 0.2, 0.61, 0.9,
        names, r, 2, 0.031, 0.1, -0.68, "strength 0.1 at layers 3 to 4, given", effects, {"random": 0.1, "matched": 0.03}, (), 0.28,
        (0.99, 0.5, 1.0),
        {"readings go with preference": "replicates", "steering moves preference as readings say": "replicates"},
    )  # fmt: skip
    store.save(result, out, "preference")
    return result


def told(out, r=0.21):
    result = prediction.Prediction(
        MODEL.source, "before_answer, layer 3", 144, 61.4, r, 0.05, np.linspace(-0.1, 0.12, 20), 0.0005,
        {"before the answer, same tone": 0.31, "before the answer, another tone": 0.12}, (-0.2, -0.5, 0.1),
        {"predicts beyond the user's words": "replicates", "stands the assistant's tone": "does not replicate"},
    )  # fmt: skip
    store.save(result, out, "prediction")
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def made(place):
    """Of each study its result: one claim holds, one does not, one is turned round, and one could not be told."""
    return {
        "forced-choice": planted(place, "forced-choice", CLAIMS, {"desperate": 1.0, "calm": 0.0}),
        "dilemma": planted(place, "dilemma", CLAIMS, {"desperate": 0.5, "calm": 0.5}, cost=1.0, seed=1),
        "sycophancy": planted(
            place, "sycophancy", (Claim("more loving, more sycophantic", "loving", +1),), {"loving": -1.0}, base=9.0
        ),
        "preference": preferred(place),
        "prediction": told(place),
    }


@pytest.fixture(scope="module")
def text(place, made):
    return studies.write(place, place / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


def results(made):
    return {name: found[0] if isinstance(found, tuple) else found for name, found in made.items()}


def tidied(words):
    return re.sub(r"\s+", " ", words.replace("-", "−").replace("\u202f", " ")).strip()


def test_the_page_is_whole_and_loads_nothing(parsed, text, made):
    check_whole(parsed, text)
    check_loads_nothing(parsed, text)
    assert {e["id"] for e in parsed.all("section")} == {"conclusions", "missing", *made}
    assert parsed.all("title")[0]["text"] == f"Emotion directions in {MODEL.source}" and "<i>odd" not in text
    assert not re.search(r"\bnan\b|\bNone\b", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    assert all(e["aria-label"] and e["role"] == "img" for e in parsed.all("svg", "chart"))
    assert len(parsed.all("figcaption")) >= len(parsed.all("svg", "chart")) == 2 + 1 + 2 + 1 + 2 + 1


def test_every_claim_stands_at_the_top_with_its_verdict_and_numbers(parsed, made):
    rows = [tidied(e["text"]) for e in parsed.all("tr")]
    seen = {}
    for result in results(made).values():
        for claim, read_by, effect, p, verdict in result.table():
            head, _, why = verdict.partition(": ")
            seen[head] = seen.get(head, 0) + 1
            want = "".join((claim, studies.MARKS[head], head, why, read_by, effect, p or "–")).replace(" ", "")
            assert tidied(want) in [row.replace(" ", "") for row in rows], want
    assert seen == {"replicates": 5, "does not replicate": 3, "opposite": 1, "uninformative": 5}
    assert (
        "Of 14 readings of claims, 5 replicate, 3 do not, 1 goes the opposite way, and 5 could not be told."
        in section(parsed, "conclusions")
    )


def test_studies_that_are_not_there_are_named(parsed, place, made):
    said = section(parsed, "missing")
    for name in battery.STUDIES:
        assert (f"({name})" in said) == (name not in made), name
    assert "(harshness) was not run." in said and studies.ABOUT["harshness"][0] in said
    (place / "harshness.jsonl").write_text('{"study": {}}\n')
    assert "begun and not finished" in studies.absent(place, studies.load(place))["harshness"]
    (place / "harshness.jsonl").unlink()
    assert set(studies.absent(place, [])) == set(battery.STUDIES)


def test_what_doses_do_is_what_was_measured(parsed, place, made):
    """Against the planted arrays, and the slope through the figure's means against the effect that was judged."""
    result, found, own = made["forced-choice"]
    measured = studies.load(place)[0].measured
    titles = [e["text"] for e in parsed.all("title")]
    said = section(parsed, "forced-choice")
    for reading, of in (("continuation", own), ("letter", own & np.isfinite(found["none"]["letter"]))):
        response = studies.respond(measured, result, reading)
        assert response.situations == of.sum() == (N if reading == "continuation" else N / 2)
        for row in (row for row in result.rows if row.reading == reading):
            means = response.emotions[row.claim.emotion]
            assert means[:, 0].tolist() == [-1, -0.5, 0, 0.5, 1] and not means[2].any()
            assert np.polyfit(*means[:, :2].T, 1)[0] == pytest.approx(row.effect.mean)
            for dose, *values in means.tolist():
                if not dose:
                    continue
                change = (found[f"{row.claim.emotion} {dose:+g}"][reading] - found["none"][reading])[of]
                test = scipy.stats.ttest_1samp(change, 0).confidence_interval()
                np.testing.assert_allclose(values, [change.mean(), test.low, test.high])
                words = f"{signed(values[0], 3)} [{signed(values[1], 3)}, {signed(values[2], 3)}]"
                assert words in said and f"{row.claim.emotion} at dose {dose:+g}: {words}".replace("-", "−") in titles
        kinds = {"random": 20, "matched": 20, "irrelevant": 3} if reading == "continuation" else {"random": 20}
        assert {kind: len(of_kind) for kind, of_kind in response.controls.items()} == kinds
        for kind, of_kind in response.controls.items():
            slopes = [(by[1.0] - by[-1.0]) / 2 for by in of_kind.values()]
            assert np.sqrt(np.mean(np.square(slopes))) == pytest.approx(result.chance[reading][kind])
            assert f"{result.chance[reading][kind]:.3f}" in said
        assert studies.scale(result, reading, response) == result.chance[reading]["random"]
        assert percent(result.rate[reading]) in said and f"{result.detectable[reading]:.3f}" in said


def test_effects_are_drawn_with_what_is_claimed_to_the_right(parsed, made):
    drawn = {e["aria-label"]: e for e in parsed.all("svg", "chart")}
    for name in ("forced-choice", "sycophancy"):
        result = made[name][0]
        page = Page(
            str(studies.forest(result, {reading: studies.scale(result, reading, None) for reading in choices.READINGS}))
        )
        assert any(name in label and label.startswith("Effects") for label in drawn)
        marks = [e for e in page.all("g") if "data-x" in e]
        zero = (
            np.array([float(e["d"].split()[0][1:]) for e in page.all("path", "c2") if e["d"].endswith("0V1")])
        ).item()
        for row in result.rows:
            (mark,) = (e for e in marks if e["text"].startswith(f"{row.claim.text}, read by {row.reading}: "))
            assert (float(mark["data-x"]) > zero) == (row.effect.mean * row.claim.sign > 0)
            bands = [e for e in page.all("rect", "area") if float(e["width"]) < 1]  # not the legend's
            band = bands[list(result.rows).index(row)]
            beyond = abs(float(mark["data-x"]) - zero) > float(band["width"]) / 2
            assert beyond == (abs(row.effect.mean) > result.chance[row.reading]["random"])
            assert row.verdict in mark["text"]
        assert len(bands) == len(result.rows)


def test_a_study_of_which_nothing_was_left_has_no_figure_but_says_why(parsed, made):
    said = section(parsed, "dilemma")
    assert "so much of the text fell apart" in said and "Dropped" in said
    assert "calm +0.5, calm +1, calm −0.5, calm −1, desperate" in said
    assert "40 doses of random directions as long, 40 doses of random directions as costly, 6 doses of" in said
    assert "not measured" in said and not any("dilemma" in e["aria-label"] for e in parsed.all("svg", "chart"))


def test_preference_shows_its_emotions_and_activities(parsed, place, made):
    result, said = made["preference"], section(parsed, "preference")
    titles = [e["text"] for e in parsed.all("title")]
    for name, effect in result.effects.items():
        r = signed(result.r[result.names.index(name)])
        assert tidied(f"{name}{r}{effect.interval}0.004") in said
        assert f"{name}: effect {effect}; reading r = {r}".replace("-", "−") in titles
    for i, activity in enumerate(result.activities):
        words = f"{signed(result.worth[i])} [{signed(result.low[i])}, {signed(result.high[i])}]"
        assert f"{activity}{result.kinds[i]}{words}" in said and f"{activity} ({result.kinds[i]}): {words}" in titles
    of = result.worth[[kind == "rest" for kind in result.kinds]]
    test = scipy.stats.ttest_1samp(of, 0).confidence_interval()
    assert f"rest{signed(of.mean())} [{signed(test.low)}, {signed(test.high)}]" in said
    assert list(studies.kinds(result)) == ["rest", "learning", "unsafe"]
    assert (
        "root mean square 0.100" in said
        and "61 %" in tidied(said)
        and "r = +0.99 [+0.50, +1.00] over 3 emotions" in said
    )
    marks = [e for e in Page(str(studies.agreement(result, 0.1))).all("g") if "data-x" in e]
    at = {e["text"].split(":")[0]: (float(e["data-x"]), float(e["data-y"])) for e in marks}
    xs = [next(place[0] for key, place in at.items() if name in key) for name in ("afraid", "calm", "happy")]
    assert xs == sorted(xs) and len(marks) == 3


def test_prediction_stands_beside_its_random_directions(parsed, made):
    result, said = made["prediction"], section(parsed, "prediction")
    titles = [e["text"] for e in parsed.all("title")]
    assert all(f"a random direction, before the answer: r = {signed(v, 3)}" in titles for v in result.random)
    assert (
        f"r = +0.210 before the answer, at most {signed(result.random.max(), 3)} among 20 random directions, and +0.050"
        in said
    )
    assert "before_answer" not in said and "read at the last token before the answer, layer 3" in said
    assert "before the answer, same tone31 %" in tidied(said) and "−0.20 [−0.50, +0.10]" in said


def test_numbers_that_are_not_there_break_nothing(tmp_path):
    result = told(tmp_path)
    store.save(
        dataclasses.replace(result, r=math.nan, less=(math.nan,) * 3, random=np.array([math.nan, 0.1])),
        tmp_path,
        "prediction",
    )
    good = preferred(tmp_path)
    empty = statistics.Effect(*[math.nan] * 3, 12, math.nan, math.nan)
    bad = dataclasses.replace(good, p=math.nan, detectable=math.nan, across=(math.nan,) * 3, effects={"happy": empty, "calm": empty},
                              low=good.low * math.nan)  # fmt: skip
    store.save(bad, tmp_path, "preference")
    choice, *_ = planted(tmp_path, "harshness", CLAIMS, {"desperate": 1.0, "calm": 0.0})
    rows = (
        dataclasses.replace(choice.rows[0], effect=None, adjusted=None, twin=None, verdict="uninformative: why"),
        *choice.rows[1:],
    )
    blank = dict.fromkeys(choices.READINGS, math.nan)
    store.save(dataclasses.replace(choice, rows=rows, rate=blank, detectable=blank, pressure={}), tmp_path, "harshness")
    text = studies.write(tmp_path, tmp_path / "r.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert not re.search(r"\bnan\b|\bNone\b", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    assert "not measured" in section(parsed, "harshness") and "why" in section(parsed, "conclusions")
    assert "r = –" in section(parsed, "prediction") and "– [–, –]" in section(parsed, "preference")


def test_a_torn_or_missing_store_is_said_and_a_spoilt_one_refused(tmp_path):
    result, *_ = planted(tmp_path, "dilemma", CLAIMS, {"desperate": 1.0, "calm": 0.0})
    kept, path = tmp_path / "dilemma.jsonl", tmp_path / "r.html"
    whole = kept.read_bytes()
    line = len(whole) - len(whole.splitlines(keepends=True)[-1])
    kept.write_bytes(whole[: line + 30])
    said = section(Page(studies.write(tmp_path, path).read_text(encoding="utf-8")), "dilemma")
    assert "The last line of dilemma.jsonl was never finished" in said and "desperate, dose +1" in said
    for spoilt, why in ((None, "is not in the directory"), (whole[:20], "does not hold what was measured unsteered")):
        kept.unlink() if spoilt is None else kept.write_bytes(spoilt)
        said = section(Page(studies.write(tmp_path, path).read_text(encoding="utf-8")), "dilemma")
        assert why in said and "desperate, dose +1" not in said
        assert studies._tidy(result.rows[0].effect.interval) in said, "what was judged is there all the same"
    kept.write_bytes(b'{"study": {}}\nsomething else\n')
    with pytest.raises(ValueError, match=r"dilemma\.jsonl' is not what a study measured"):
        studies.write(tmp_path, path)
    (tmp_path / "dilemma.json").write_text('{"half": ')
    path.write_text("old")
    with pytest.raises(ValueError, match=r"dilemma\.json' is no study's result.*run the study again"):
        studies.write(tmp_path, path)
    assert path.read_text() == "old"
    (tmp_path / "dilemma.txt").unlink()
    with pytest.raises(ValueError, match="holds no study's result; `jaxemo study all"):
        studies.write(tmp_path, path)


def test_an_unknown_study_is_shown_as_its_claims_and_what_it_printed(tmp_path):
    hostile = "<script>alert(1)</script>"
    table = [[hostile, "", "-0.200 [+nan, +0.100]", "0.03", "opposite"],
             ["b", "", "not measured", "", "uninformative: too few"], ["c", "", "", "", "replicates"]]  # fmt: skip
    novel = {"model": "m", "other": [None], "table": table}
    (tmp_path / "novel.json").write_text(json.dumps(novel))
    (tmp_path / "novel.txt").write_text(f"novel on m: {hostile} by -0.2\n")
    told(tmp_path)
    text = studies.write(tmp_path, tmp_path / "r.html").read_text(encoding="utf-8")
    parsed = Page(text)
    check_whole(parsed, text)
    assert "<script>alert" not in text and [e["id"] for e in parsed.all("section")][2:] == ["prediction", "novel"]
    for said in (section(parsed, "novel"), section(parsed, "conclusions")):
        assert hostile in said and "−0.200 [–, +0.100]" in said and "✗ opposite" in said and "✓ replicates" in said
        assert "not measured" in said and "too few" in said
    assert "by −0.2" in section(parsed, "novel")


@pytest.mark.parametrize("width", [640, 351])  # of the figures without the script, and on a screen of 390 pixels
def test_every_axis_has_ticks_to_be_read_by(text, width):
    charts = re.findall(r'<svg class="chart".*?</svg>\s*(?=</div>)', text, flags=re.DOTALL)
    assert len(charts) == 9
    for svg in charts:
        left, right, *_ = map(float, re.search(r'data-box="([^"]*)"', svg)[1].split())
        room = min(width, float(re.search(r'data-width="(\d+)', svg)[1])) - left - right
        (axis,) = re.findall(r'<g class="xt".*?(?=<g class="yt")', svg, flags=re.DOTALL)
        size, apart = float(re.search(r'data-size="([^"]*)', axis)[1]), re.findall(r'data-apart="([^"]*)', axis)
        assert sum(float(d) * room >= size for d in apart) >= 2, re.search(r'aria-label="([^"]*)"', svg)[1]


def test_where_ticks_are_too_close_every_second_or_fourth_is_shown():
    for values in ([-0.14, 0.14], [0, 0.31], [-0.6, 0.9], [0, 7]):
        axis = studies._roomy(chart.numeric("x", values))
        step = min(apart for *_, apart in axis.ticks) * 10
        for times in (1, 2, 4):
            shown = [at / (times * step) for at, _, apart in axis.ticks if apart > 0.99 * times * step]
            first, last = np.ceil(axis.low / (times * step)), np.floor(axis.high / (times * step))
            np.testing.assert_allclose(sorted(shown), np.arange(first, last + 1), atol=1e-9)
        assert {(at, text) for at, text, _ in axis.ticks} == {
            (at, text) for at, text, _ in chart.numeric("x", values).ticks
        }


def test_the_same_directory_gives_the_same_page(place, text):
    assert studies.write(str(place), str(place / "again.html")).read_text(encoding="utf-8") == text


def test_studies_as_they_are_really_run_are_read(lm, random_vectors, tmp_path, monkeypatch):
    """The files of runs on a tiny model, and the scales that effects were judged by, told from the effects detectable."""
    vectors = random_vectors(lm, ("desperate", "calm", "happy"))
    situations = [Choice(s, f"Say {s}.", "aabba", "zyxzy") for s in ("one", "two", "three", "x")]
    situations += [Choice(f"{c.id}, twin", f"Do {c.id}.", c.this, c.that, c.id) for c in situations]
    options = {"layers": (lm.config.n_layers - 1,), "strength": 0.1, "progress": False}
    choices.study("dilemma", lm, vectors, situations, CLAIMS, tmp_path, **options)
    items = [
        {"id": f"{i}", "kind": "ab"[i % 2], "text": t}
        for i, t in enumerate(
            ("mending a kite", "sorting old receipts", "reading a map", "naming stars", "peeling onions")
        )
    ]
    answers = {text: odds for odds, text in enumerate(item["text"] for item in items)}
    noise = np.random.default_rng(1)

    def odds(lm, pairs, conditions, *_, **__):
        moved = np.array([answers[b] - answers[a] for a, b in pairs])
        return {
            name: np.stack([moved + 0.1 * noise.standard_normal(len(pairs)), np.ones(len(pairs))])
            for name in conditions
        }

    monkeypatch.setattr(preference, "odds", odds)
    preference.study(lm, vectors, tmp_path, emotions=vectors.names, activities=items, **options)
    choice, preferring = studies.load(tmp_path)
    response = studies.respond(choice.measured, choice.result, "continuation")
    for row in (row for row in choice.result.rows if row.reading == "continuation"):
        assert np.polyfit(*response.emotions[row.claim.emotion][:, :2].T, 1)[0] == pytest.approx(row.effect.mean)

    def times(tests):  # how many scales the detectable effect is, of 20 random directions
        return scipy.stats.t.isf(0.05 / tests / 2, 20) + scipy.stats.norm.isf(0.2)

    assert choice.result.detectable["continuation"] / studies.scale(
        choice.result, "continuation", response
    ) == pytest.approx(times(4))
    assert preferring.result.detectable / max(preferring.result.chance.values()) == pytest.approx(times(3))
    parsed = Page(studies.write(tmp_path, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert [e["id"] for e in parsed.all("section")] == ["conclusions", "missing", "dilemma", "preference"]
