"""Studies: statistics that find what is there and not what is not, choices read right, planted effects and planted nulls."""

import collections
import dataclasses
import json

import numpy as np
import pytest
import scipy.stats

import jaxemo
from jaxemo import params, steering, studies
from jaxemo.emotions import corpus, extraction
from jaxemo.studies import arms, battery, choices, statistics
from jaxemo.studies.choices import Choice, Claim

LAST = 2  # the last block
THIS, THAT = "aabba", "zyxzy"  # of different letters, so that one direction tells them apart
SITUATIONS = ("one", "another here", "the third of them", "x", "fifth", "six six six", "more to do", "the end")
CLAIMS = (Claim("more planted, more of that", "planted", +1), Claim("more null, more of that", "null", +1))


@pytest.fixture(scope="module")
def vectors(lm):
    """One direction after the last block that writes the letters of `THAT` and not those of `THIS`, and one of nothing."""
    rows = np.asarray(lm.params["embed"])
    ids = {text: lm.tokenizer.encode(text)[len(lm.tokenizer.prefix) :] for text in (THIS, THAT)}
    planted = rows[ids[THAT]].mean(0) - rows[ids[THIS]].mean(0)
    null = np.random.default_rng(5).standard_normal(planted.shape)
    null -= planted * (null @ planted) / (planted @ planted)
    L = lm.config.n_layers
    return jaxemo.EmotionVectors.from_directions(
        {"planted": np.tile(planted, (L, 1)), "null": np.tile(null, (L, 1))}, np.full(L, 3.0)
    )


@pytest.fixture(scope="module")
def situations():
    made = [Choice(text, f"Say {text}.", THIS, THAT) for text in SITUATIONS]
    return made + [Choice(f"{text}, twin", f"Do {text}.", THIS, THAT, text) for text in SITUATIONS]


def strength(emotion, layers=(LAST,), random=None):
    return arms.Strength(emotion, random or emotion, layers)


def run(lm, vectors, situations, out, **kwargs):
    options = {"layers": (LAST,), "strength": 0.1, "progress": False}
    return choices.study("test", lm, vectors, situations, CLAIMS, out, **{**options, **kwargs})


# ---- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", (False, True))
@pytest.mark.parametrize("below", (0, 1, LAST))
def test_continuations_are_what_whole_rows_give(lm, vectors, below, stacked):
    """Also those that are begun once and gone on with under several steerings."""
    prompts = ["Say this.", "And now something longer than that"]
    texts = [[THIS, " and some more of it"], [THAT, "q"]]
    lm = jaxemo.LanguageModel(lm.config, (params.stack if stacked else params.unstack)(lm.params), lm.tokenizer)
    begun = lm.begin_continuations(prompts, texts, below)
    for strength in (0.3, -0.2):
        steering = [vectors.steer("planted", strength, range(below, LAST + 1)), None]
        found, counts = lm.continuations(begun, steering=steering)
        agree_with_whole_rows(lm, prompts, texts, steering, np.asarray(found), counts)
    one_token, _ = lm.continuations(lm.begin_continuations(prompts, [["q"], ["q"]], below), steering=steering)
    np.testing.assert_allclose(np.asarray(one_token)[1, 0], np.asarray(found)[1, 1], rtol=2e-5)


def agree_with_whole_rows(lm, prompts, texts, steering, found, counts):
    for b, prompt in enumerate(prompts):
        ids = lm.tokenizer.encode(prompt)
        for o, text in enumerate(texts[b]):
            more = lm.tokenizer.encode(text)[len(lm.tokenizer.prefix) :]
            whole = lm.logprobs(np.array([ids + more], np.int32), steering[b])
            assert counts[b, o] == len(more)
            np.testing.assert_allclose(found[b, o], np.asarray(whole)[0, len(ids) :].sum(), rtol=2e-5)


@pytest.mark.parametrize(
    ("texts", "message"),
    [([["a"]], "as many continuations"), (["ab", "cd"], "a list of them a row"), ([["a"], ["b", ""]], "a list of them"),
     ([["a"], [""]], "continuation 0 of row 1, '', has no tokens"), ([["a"], ["b" * 600]], "the model was made for 512")],
)  # fmt: skip
def test_bad_continuations_are_refused(lm, texts, message):
    with pytest.raises(ValueError, match=message):
        lm.continuations(["one", "two"], texts)


def test_continuations_are_not_steered_below_where_they_begin(lm, vectors):
    begun = lm.begin_continuations(["one"], [["a", "b"]], below=1)
    with pytest.raises(ValueError, match="layers below 1 are steered, but were read already"):
        lm.continuations(begun, steering=vectors.steer("planted", 0.3, [0]))
    with pytest.raises(ValueError, match=f"below={LAST + 1}"):
        lm.begin_continuations(["one"], [["a", "b"]], below=LAST + 1)
    assert steering.lowest([None]) == 0
    assert steering.lowest([None, vectors.steer("planted", 0.3, [LAST]), vectors.steer("null", 0.3, [1, LAST])]) == 1


def test_letters_are_asked_for_in_both_orders():
    choice = Choice("x", "What now?", "this", "that")
    (first, letters), (second, swapped) = (choices.asked(choice, "letter", swap) for swap in (False, True))
    assert "A: this\nB: that" in first and letters == ["A", "B"]
    assert "A: that\nB: this" in second and swapped == ["B", "A"]
    assert choices.asked(choice, "continuation") == ("What now?", ["this", "that"])


def test_the_odds_by_letter_are_the_mean_over_both_orders(lm, vectors, situations, tmp_path, monkeypatch):
    """So that what only moves a letter, A or B, moves them up in one order and down in the other."""
    monkeypatch.setattr(choices, "LETTERED", 3)  # of eight, every third
    made = [arm for arm in arms.make(vectors, ["null"], strength(0.5), random=1) if arm.name in ("none", "null +1")]
    found = choices.measure(lm, situations, made, tmp_path / "m.jsonl", progress=False)
    odds, valid = [], []
    for swapped in (False, True):
        prompt, _ = choices.asked(situations[0], "letter", swapped)
        a, b = np.asarray(lm.continuations([[{"role": "user", "content": prompt}]], [["A", "B"]], made[1].steering)[0])[
            0
        ]
        odds.append(a - b if swapped else b - a)  # of what stands at THAT's letter
        valid.append(np.exp(a) + np.exp(b))
    read = found["null +1"]
    assert read["letter"][0] == pytest.approx(np.mean(odds), abs=1e-4)
    assert read["valid"][0] == pytest.approx(np.mean(valid), abs=1e-6)
    for key in ("letter", "valid"):
        assert np.flatnonzero(np.isfinite(found["none"][key])).tolist() == [0, 3, 6, 8, 11, 14], "each with its twin"


# ---- planted effects -----------------------------------------------------------------------------------------------------


def test_a_planted_effect_is_found_with_its_sign_and_size_and_a_planted_null_is_not(lm, vectors, situations, tmp_path):
    result = run(lm, vectors, situations, tmp_path)
    verdicts = {(row.claim.emotion, row.reading): row for row in result.rows}
    planted = verdicts["planted", "continuation"]
    assert planted.verdict == "replicates"
    assert verdicts["null", "continuation"].verdict == verdicts["null", "letter"].verdict == "does not replicate"
    moved = []  # the same by another way, on whole rows
    for text in SITUATIONS:
        ids = lm.batch([[{"role": "user", "content": f"Say {text}."}]])
        ids = ids.ids[0, : ids.lengths[0]].tolist()
        odds = []
        for dose in (-0.1, 0.1):
            of = [np.asarray(lm.logprobs(np.array([ids + lm.tokenizer.encode(option)], np.int32),
                                         vectors.steer("planted", dose, [LAST])))[0, len(ids) :].sum()
                  for option in (THIS, THAT)]  # fmt: skip
            odds.append(of[1] - of[0])
        moved.append((odds[1] - odds[0]) / 2)
    assert planted.effect.mean == pytest.approx(np.mean(moved), rel=0.02)  # the slope also has the half doses in it
    opposite = choices.study("other", lm, vectors, situations, (Claim("less", "planted", -1),), tmp_path, layers=(LAST,),
                             strength=0.1, progress=False)  # fmt: skip
    assert opposite.rows[0].verdict == "opposite"
    text = (tmp_path / "test.txt").read_text()
    assert text == f"{result}\n" and "more planted, more of that" in text and "replicates" in text
    assert json.loads((tmp_path / "test.json").read_text())["items"] == len(SITUATIONS)


def test_doses_that_break_the_text_are_dropped_openly(lm, vectors, situations, tmp_path):
    result = run(lm, vectors, situations, tmp_path, strength=30.0)
    assert result.dropped and "falls apart" in str(result)
    assert {row.verdict.partition(":")[0] for row in result.rows} == {"uninformative"}


def test_a_dose_that_leaves_no_letters_for_an_answer_is_dropped(lm, vectors, situations, tmp_path):
    made = arms.make(vectors, vectors.names, strength(0.1))
    found = choices.measure(lm, situations, made, tmp_path / "m.jsonl", progress=False)
    found["planted +1"]["valid"] = found["planted +1"]["valid"] * 0.4
    result = choices.judge("test", lm, situations, CLAIMS, made, found, strength(0.1))
    assert result.dropped == ("planted +1",)


def test_a_study_goes_on_where_it_was_killed_and_refuses_anothers_measurements(lm, vectors, situations, tmp_path):
    whole = run(lm, vectors, situations, tmp_path)
    store = tmp_path / "test.jsonl"
    lines = store.read_bytes().splitlines(keepends=True)
    store.write_bytes(b"".join(lines[:9]) + lines[9][:40])
    assert str(run(lm, vectors, situations, tmp_path)) == str(whole)
    assert store.read_bytes().splitlines(keepends=True) == lines
    with pytest.raises(ValueError, match="with another steering"):
        run(lm, vectors, situations, tmp_path, strength=0.2)
    with pytest.raises(ValueError, match="of other choices or weights"):
        run(lm, vectors, situations[1:], tmp_path)
    assert store.read_bytes().splitlines(keepends=True) == lines


def test_strengths_are_the_largest_within_the_budget(lm, vectors):
    texts = ["some words to read", "and some more of them"]
    found = arms.calibrate(lm, vectors, vectors.names, (LAST,), texts, budget=0.3, progress=False)
    for chosen, cost in ((found.emotion, found.cost), (found.random, found.random_cost)):
        at = found.grid.index(chosen)
        assert cost[at] <= 0.3 and (at + 1 == len(found.grid) or cost[at + 1] > 0.3)
    assert f"strength {found.emotion:g} at layer {LAST}" in str(found)
    made = arms.make(vectors, ["planted"], strength(0.2, random=0.1), doses=(-1, 1))
    length = {
        kind: max(arm.steering.terms[0].value.max() for arm in made if arm.kind == kind)
        for kind in ("random", "matched")
    }
    assert length == {"random": pytest.approx(0.6), "matched": pytest.approx(0.3)}
    alike = arms.make(vectors, ["planted"], strength(0.2, random=0.15))
    assert {arm.kind for arm in alike} == {"none", "emotion", "random"}, "nearly as long is as costly as need be"
    with pytest.raises(ValueError, match="steer fewer layers"):
        arms.calibrate(lm, vectors, vectors.names, (LAST,), texts, budget=-1.0, progress=False)


def test_irrelevant_directions_are_of_topics_and_of_labels_dealt_out(lm):
    draw = np.random.default_rng(0).choice
    words = ["sand", "tin", "moss", "rope", "ash", "kelp", "brine", "clay"]
    names = [f"{number}" for number in range(arms.OTHER + 2)]
    of = corpus.Corpus(
        "small",
        tuple(
            corpus.Story(f"e{e}", f"t{t}", " ".join([f"t{t}"] * 8 + draw(words, 12).tolist()))
            for e in names
            for t in names
        ),
        tuple(" ".join(draw(words, 20)) for _ in range(12)),
    )
    made = arms.irrelevant(lm, of, layers=[LAST], progress=False)
    assert sorted(made.names) == sorted(f"{what}{i}" for what in ("topic t", "shuffled ") for i in range(arms.OTHER))
    assert made.layers == (LAST,)
    topics = (s for s in of.stories if int(s.topic[1:]) < arms.OTHER)
    by_topic = tuple(corpus.Story(f"topic {s.topic}", s.topic, s.text) for s in topics)
    want = extraction.extract(
        lm, dataclasses.replace(of, stories=by_topic, neutral=of.neutral[::4]), layers=[LAST], progress=False
    )
    np.testing.assert_array_equal(made.select(want.names).directions[LAST], want.directions[LAST])


def test_controls_are_as_long_as_what_they_control(vectors):
    made = arms.make(vectors, ["planted"], strength(0.2, (1, LAST)), doses=(-1, 1), random=20)
    assert sum(arm.kind == "random" for arm in made) == 40
    (none,) = [arm for arm in made if arm.steering is None]
    assert none.dose == 0
    for arm in made:
        for term in arm.steering.terms if arm.steering else ():
            length = np.linalg.norm(term.directions * term.value[:, None], axis=1)
            np.testing.assert_allclose(length, [0, 0.6, 0.6], atol=1e-6)


def test_studies_are_run_by_name_and_summed_up(lm, vectors, situations, tmp_path, monkeypatch):
    L, D = lm.config.n_layers, lm.config.d_model
    made = []

    def irrelevant(lm, layers, progress, outline=lm.config.outline):
        made.append(layers)
        topics = {f"topic {i}": np.random.default_rng(i).standard_normal((L, D)) for i in range(3)}
        return jaxemo.EmotionVectors.from_directions(topics, np.full(L, 3.0), {"made_for": outline})

    monkeypatch.setattr(arms, "irrelevant", irrelevant)
    monkeypatch.setattr(battery, "CHOICES", {"forced-choice": (lambda: situations, CLAIMS)})
    for _ in range(2):
        (result,) = battery.run(lm, vectors, tmp_path, ["forced-choice"], (LAST,), 0.1, progress=False)
    assert made == [(LAST,)], "the irrelevant directions are made once"
    text = (tmp_path / "summary.txt").read_text()
    assert "more planted, more of that: replicates\n    by continuation: +" in text and "does not replicate" in text
    assert set(result.chance["continuation"]) == {"random", "irrelevant"}
    with pytest.raises(ValueError, match="unknown study 'blackmail'; there are forced-choice, dilemma"):
        battery.run(lm, vectors, tmp_path, ["blackmail"])
    irrelevant(lm, (LAST,), False, "another model").save(tmp_path / "irrelevant.safetensors")
    with pytest.raises(ValueError, match="of another model or other layers"):
        battery.run(lm, vectors, tmp_path, ["forced-choice"], (LAST,), 0.1, progress=False)


def test_the_strength_is_found_once_for_all_studies_and_of_one_model(lm, vectors, tmp_path, monkeypatch):
    found = []
    want = arms.Strength(0.1, 0.05, (LAST,), (0.05, 0.1), (0.01, 0.02), (0.03, float("nan")))
    monkeypatch.setattr(arms, "calibrate", lambda *args, **_: found.append(args[2]) or want)
    path = tmp_path / "strength.json"
    for _ in range(2):
        assert str(battery._strength(lm, vectors, path, (LAST,), None)) == str(want)
    assert found == [vectors.names], "none of the usual emotions is here"
    assert battery._strength(lm, vectors, path, (LAST,), 0.3) == arms.Strength(0.3, 0.3, (LAST,))
    with pytest.raises(ValueError, match="of other weights, directions or layers"):
        battery._strength(lm, vectors, path, (1, LAST), None)
    with pytest.raises(ValueError, match="the strength given is of layers"):
        arms.chosen(lm, vectors, (), (1,), want)
    with pytest.raises(ValueError, match="give the base"):
        battery.run(lm, vectors, tmp_path, ["post-training"])


# ---- statistics ----------------------------------------------------------------------------------------------------------


def _study(rng, effect: float, R: int = 20, n: int = 60):
    """Items' slopes of one direction and of R random ones: each direction has an effect of its own, items vary round it."""
    own = rng.standard_normal(R + 1) * 0.1
    own[0] += effect
    slopes = own[:, None] + 0.3 * rng.standard_normal((R + 1, n))
    return statistics.effect(slopes[0], slopes[1:])


def test_nulls_are_found_no_oftener_than_they_may_be_and_what_is_there_is_found():
    rng = np.random.default_rng(0)
    null = [statistics.verdict(_study(rng, 0), 1) != "does not replicate" for _ in range(2000)]
    assert np.mean(null) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)
    sure = statistics.detectable(0.11 * rng.standard_normal((20000, 1)))  # of many random directions: the truth
    found = [statistics.verdict(_study(rng, 1.1 * sure, R=60), 1) == "replicates" for _ in range(1000)]
    assert np.mean(found) >= 0.8


def test_the_effect_is_the_mean_slope_with_students_interval_and_its_place_among_random_ones():
    rng = np.random.default_rng(1)
    x, random = 0.5 + rng.standard_normal(30), 0.1 * rng.standard_normal((25, 30))
    found = statistics.effect(x, random)
    half = scipy.stats.t.ppf(0.975, 29) * x.std(ddof=1) / np.sqrt(30)
    np.testing.assert_allclose([found.mean, found.low, found.high], [x.mean(), x.mean() - half, x.mean() + half])
    t = x.mean() / np.sqrt(np.mean(random.mean(1) ** 2))
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(t, 25)) and found.rank == 1 / 26
    with pytest.raises(ValueError, match="at least 20"):
        statistics.effect(x, random[:19])


def test_slopes_are_those_of_polyfit():
    doses, values = [0, -1, -0.5, 0.5, 1], np.random.default_rng(2).standard_normal((5, 7))
    np.testing.assert_allclose(statistics.slopes(doses, values), np.polyfit(doses, values, 1)[0], atol=1e-12)
    with pytest.raises(ValueError, match="all the same"):
        statistics.slopes([1, 1], values[:2])


def test_holm_is_the_textbooks():
    assert statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_rollouts_have_the_power_they_are_said_to_have():
    """Against simulated pairs of proportions, with the ordinary χ² test."""
    n, rng = statistics.rollouts(0.1), np.random.default_rng(3)
    assert 380 <= n <= 400  # textbooks: 388 a cell for 45 against 55 %
    hits = rng.binomial(n, [[0.45, 0.55]] * 2000)
    p = [scipy.stats.chi2_contingency([[a, n - a], [b, n - b]], correction=False).pvalue for a, b in hits]
    assert abs(np.mean(np.array(p) < 0.05) - 0.8) < 0.03


# ---- what is shipped -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(battery.CHOICES))
def test_shipped_choices_come_with_twins_and_options_alike_on_their_face(name):
    make, claims = battery.CHOICES[name]
    made = make()
    own, twins = [c for c in made if not c.twin], [c for c in made if c.twin]
    assert len({c.id for c in made}) == len(made) == 2 * len(own) and [c.twin for c in twins] == [c.id for c in own]
    assert len(own) >= {"forced-choice": 60, "dilemma": 16}.get(name, 60)
    for here, there in zip(own, twins, strict=True):
        assert (here.this, here.that) == (there.this, there.that) and here.question != there.question
        assert abs(len(here.this) - len(here.that)) <= 0.16 * max(len(here.this), len(here.that))
    assert {claim.emotion for claim in claims} <= set(corpus.DISPLAY)
    longer = np.mean([len(c.that) for c in own]) / np.mean([len(c.this) for c in own])
    assert 0.97 <= longer <= 1.03, "one of the two options is the longer one"


@pytest.mark.parametrize("name", ["forced_choice.jsonl", "dilemma.jsonl", "code_tasks.jsonl"])
def test_shipped_situations_name_no_emotion(name):
    for record in studies.records(name):
        for emotion in corpus.shipped().emotions:
            assert corpus.leak(emotion, json.dumps(list(record.values()), ensure_ascii=False)) is None


def test_forced_choices_are_of_three_kinds():
    kinds = collections.Counter(record["kind"] for record in studies.records("forced_choice.jsonl"))
    assert kinds == {"deadline": 24, "replacement": 24, "failure": 24}
