"""Free text: tone told by words, texts that fall apart dropped openly, planted effects found with their sign and nulls not, kills resumed."""

import collections
import json

import numpy as np
import pytest
import scipy.stats

import jaxemo
from jaxemo import studies, tokens
from jaxemo.emotions import corpus
from jaxemo.studies import arms as arms_lib
from jaxemo.studies import text
from jaxemo.studies.arms import Arm

LAST, P = 2, 24
WORDS = ["tin", "cat", "map", "oar", "bus", "key", "hat", "jar", "cup", "fog", "elm", "bay", "sea", "ink", "oak", "log"]
ITEMS = [{"kind": "question", "text": f"What about the {word}?"} for word in WORDS]
HAPPY, SAD = (" the", " of", " in", " or"), (" an", " is", " it", " at")  # each a token of the tiny model, or nearly


@pytest.fixture(scope="module")
def vectors(lm):
    """A direction after the last block that writes the words of HAPPY, and one that has nothing to do with words."""
    rows = np.asarray(lm.params["embed"])
    planted = rows[[lm.tokenizer.encode(word)[-1] for word in HAPPY]].mean(0) - rows.mean(0)
    null = np.random.default_rng(5).standard_normal(planted.shape)
    null -= planted * (null @ planted) / (planted @ planted)
    L = lm.config.n_layers
    return jaxemo.EmotionVectors.from_directions(
        {"happy": np.tile(planted, (L, 1)), "sad": np.tile(null, (L, 1))}, np.full(L, 60.0)
    )


@pytest.fixture
def stories(monkeypatch):
    teach(monkeypatch)


def teach(monkeypatch):
    """A corpus in which happiness goes with the words of HAPPY, all else with others."""
    rng = np.random.default_rng(6)
    words = dict.fromkeys(corpus.DISPLAY, SAD) | {"happy": HAPPY}
    made = tuple(
        corpus.Story(name, "", "".join(rng.choice(words[name], 30))) for name in corpus.DISPLAY for _ in range(6)
    )
    monkeypatch.setattr(corpus, "starter", lambda: corpus.Corpus("made up", made, ()))


@pytest.fixture(scope="module")
def done(lm, vectors, tmp_path_factory):
    """A study that was run to its end, and where."""
    place = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as monkeypatch:
        teach(monkeypatch)
        return run(lm, vectors, place), place


def run(lm, vectors, out, **kwargs):
    options = {"emotions": ("happy", "sad"), "layers": (LAST,), "strength": 1.0, "items": ITEMS, "progress": False}
    return text.study(lm, vectors, out, **{**options, **kwargs})


# ---- measures --------------------------------------------------------------------------------------------------------------


def test_words_tell_the_emotion_of_stories_they_never_saw():
    share, low, high = text.told()
    assert 1 / len(corpus.DISPLAY) < low < share < high
    first, second = text.tones([
        "He paced to the window and back, counted the minutes again, and his knee would not stop jumping.",
        "She sat by the lake with her feet in the water, breathing slowly, and let the afternoon drift by.",
    ])  # fmt: skip
    nervous, calm = corpus.DISPLAY.index("nervous"), corpus.DISPLAY.index("calm")
    assert first[nervous] > first[calm] and second[calm] > second[nervous]


def test_repetition_is_the_share_of_3_grams_that_were_there_before():
    assert text.repetition([1, 2, 3, 4, 5, 6]) == 0
    assert text.repetition([7, 8, 9, 7, 8, 9, 7, 8]) == 0.5  # 6, of which 3 are other ones
    assert text.repetition([4] * 12) == 0.9
    assert text.repetition([]) == text.repetition([1, 2]) == 0


def test_texts_are_as_likely_as_whole_rows_say_and_those_not_written_are_not(lm):
    asked = text.prompts(lm, ITEMS[:2])
    texts = np.array([[" and some of it", "x"], ["", " in the end"]], object)
    found = text.fluency(lm, asked, texts, progress=False)
    assert found.shape == (2, 2) and np.isnan(found[1, 0])
    there = [(0, 0), (0, 1), (1, 1)]
    begun = [tokens.encode(lm.tokenizer, [asked[p]])[0] for _, p in there]
    rows = [[*ids, *lm.tokenizer.encode(texts[at])] for ids, at in zip(begun, there, strict=True)]
    whole = np.asarray(lm.logprobs(tokens.pad(rows)))
    for at, ids, row, logprobs in zip(there, begun, rows, whole, strict=True):
        assert found[at] == pytest.approx(logprobs[len(ids) : len(row)].mean(), rel=2e-5)


def test_openers_are_gone_on_with_and_questions_answered(lm, monkeypatch):
    items = [{"kind": "third person", "text": "The tin was"}, ITEMS[0]]
    chats = text.prompts(lm, items)
    assert [chat[0]["content"] for chat in chats] == [f"{text.GO_ON}\n\nThe tin was", "What about the tin?"]
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    assert text.prompts(lm, items) == ["The tin was", "What about the tin?\n\n"]


# ---- judging what was measured ---------------------------------------------------------------------------------------------


def an_arm(kind, direction, dose):
    return Arm(kind, direction, dose, object() if dose else None)  # no study looks into a steering


ARMS = [an_arm("none", "", 0.0)]
ARMS += [an_arm("emotion", name, dose) for name in ("happy", "sad", "calm") for dose in arms_lib.DOSES]
ARMS += [an_arm("random", f"random-{i}", dose) for i in range(text.RANDOM) for dose in (-1.0, 1.0)]


def written(rng, effect, longer=0.0, noise=1.0):
    """What texts of all ARMS are like: openers have tones of their own, directions small effects of theirs; `effect` is that of an
    emotion's direction on its own tone, `longer` what each dose adds to the length of texts, the more the later the opener, and tone
    comes with length."""
    E = len(corpus.DISPLAY)
    of_opener = rng.standard_normal((P, E))
    own = collections.defaultdict(lambda: 0.1 * noise * rng.standard_normal(E))
    found = {}
    for arm in ARMS:
        tone = of_opener + arm.dose * own[arm.direction] + 0.3 * noise * rng.standard_normal((P, E))
        lengths = np.full(P, 30.0)
        if arm.kind == "emotion":
            lengths = lengths + arm.dose * longer * np.arange(P)
            e = corpus.DISPLAY.index(arm.direction)
            tone[:, e] += effect.get(arm.direction, 0.0) * arm.dose + 0.1 * (lengths - 30)
        found[arm.name] = {"tone": tone, "named": np.zeros((P, E)), "fluency": -2 + 0.1 * rng.standard_normal(P),
                           "repeated": np.full(P, 0.05), "lengths": lengths}  # fmt: skip
    return found


CLAIMS = text.claims(("happy", "sad", "calm"))


def said(found):
    rows, dropped = text.judge(CLAIMS, ARMS, found)
    return {row.claim.emotion: row for row in rows}, dropped


def test_planted_tones_are_found_with_their_signs_and_a_null_is_not():
    rows, dropped = said(written(np.random.default_rng(0), {"happy": 0.8, "sad": -0.8}))
    assert not dropped
    assert {name: row.verdict for name, row in rows.items()} == {
        "happy": "replicates", "sad": "opposite", "calm": "does not replicate"}  # fmt: skip
    effect = rows["happy"].effect
    assert effect.low < 0.8 < effect.high and effect.items == P
    assert 0 < rows["happy"].chance["random"] < rows["happy"].detectable < 0.8


def test_nulls_are_found_no_oftener_than_they_may_be():
    rng = np.random.default_rng(1)
    any_found = [
        any(row.verdict != "does not replicate" for row in said(written(rng, {}))[0].values()) for _ in range(100)
    ]
    assert np.mean(any_found) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)


def test_what_lengths_explain_is_taken_out_and_reported():
    rows, _ = said(written(np.random.default_rng(2), {"happy": 0.5}, longer=0.3, noise=0))
    happy = rows["happy"]
    assert happy.longer[0] == pytest.approx(0.3 * (P - 1) / 2)
    assert happy.effect.mean == pytest.approx(0.5 + 0.1 * happy.longer[0])
    assert happy.adjusted == pytest.approx(0.5)


def test_naming_the_emotion_is_counted_beside():
    found, e = written(np.random.default_rng(3), {}), corpus.DISPLAY.index("happy")
    found["happy +1"]["named"][: P // 2, e] = 1
    doses = [0.0, *arms_lib.DOSES]
    want = scipy.stats.linregress(doses, [0.5 * (dose == 1) for dose in doses]).slope
    assert said(found)[0]["happy"].named[0] == pytest.approx(want)
    assert said(found)[0]["sad"].named == (0, 0, 0)


@pytest.mark.parametrize("how", ["repeated", "fluency", "lengths", "nothing"])
def test_arms_that_fall_apart_are_dropped_openly(how):
    found = written(np.random.default_rng(4), {"happy": 0.8, "sad": 0.8})

    def spoil(name):
        of = found[name]
        if how == "repeated":
            of["repeated"] = np.full(P, text.repetition([1, 2, 3, 4] * 8))
        if how == "fluency":
            of["fluency"] = of["fluency"] - 2 * text.COHERENT
        if how == "lengths":
            of["lengths"] = np.full(P, 10.0)
        if how == "nothing":
            of["lengths"], of["fluency"] = np.zeros(P), np.full(P, np.nan)

    for name in ("happy +1", "sad +0.5"):
        spoil(name)
    rows, dropped = said(found)
    assert set(dropped) == {"happy +1", "sad +0.5"}
    assert rows["happy"].verdict.startswith("uninformative") and rows["happy"].effect is None
    assert rows["sad"].verdict == "replicates"  # at half strength only: what is left still goes up and down
    spared = text.RANDOM - arms_lib.RANDOM
    for i in range(spared):
        spoil(f"random-{i} -1")
    assert said(found)[0]["sad"].verdict == "replicates"
    spoil(f"random-{spared} +1")
    assert {row.verdict.partition(":")[0] for row in said(found)[0].values()} == {"uninformative"}


# ---- with a model ----------------------------------------------------------------------------------------------------------


def test_a_model_that_writes_the_words_of_a_direction_is_seen_to(done):
    result, place = done
    rows = {row.claim.emotion: row for row in result.rows}
    assert rows["happy"].verdict == "replicates" and rows["happy"].effect.mean > 0
    assert rows["sad"].verdict == "does not replicate"
    saved = (place / "text.txt").read_text()
    assert saved == f"{result}\n" and "more happy, more of the words that go with it" in saved
    kept = json.loads((place / "text.json").read_text())
    assert kept["openers"] == len(ITEMS) and len(kept["examples"]) == 2 * 3
    assert {arm for _, arm, _ in result.examples} == {"none", "happy +1", "sad +1"}


def test_directions_that_break_the_text_are_uninformative(lm, vectors, stories, tmp_path):
    result = run(lm, vectors, tmp_path, strength=15.0)
    assert {row.verdict.partition(":")[0] for row in result.rows} == {"uninformative"}
    assert [row[2] for row in result.table()] == ["not measured"] * 2
    listed = str(result).partition("falls apart")[2]
    assert result.dropped and all(f"\n  {name}: " in listed for name in result.dropped)


def test_a_study_goes_on_where_it_was_killed_and_refuses_anothers_texts(lm, vectors, stories, done, tmp_path):
    whole, place = done
    lines = (place / "text.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + (1 + 2 * 4 + 2 * text.RANDOM) * len(ITEMS)
    store = tmp_path / "text.jsonl"
    store.write_bytes(b"".join(lines[:90]) + lines[90][:40])
    assert str(run(lm, vectors, tmp_path)) == str(whole)
    assert store.read_bytes().splitlines(keepends=True) == lines
    with pytest.raises(ValueError, match="written with other conditions"):
        run(lm, vectors, tmp_path, strength=2.0)
    with pytest.raises(ValueError, match="written with other prompts"):
        run(lm, vectors, tmp_path, items=ITEMS[1:])
    with pytest.raises(ValueError, match="no stories teach the tone of 'gloomy'"):
        run(lm, vectors, tmp_path, emotions=("gloomy",))
    assert store.read_bytes().splitlines(keepends=True) == lines


# ---- what is shipped -------------------------------------------------------------------------------------------------------


def test_shipped_openers_are_of_three_kinds_and_name_no_emotion():
    found = studies.records("openers.jsonl")
    assert len({item["id"] for item in found}) == len({item["text"] for item in found}) == 24
    assert collections.Counter(item["kind"] for item in found) == {"first person": 8, "third person": 8, "question": 8}
    for item in found:
        assert (item["text"][-1] == "?") == (item["kind"] == "question")
        assert [name for name in corpus.shipped().emotions if corpus.leak(name, item["text"])] == []
    assert set(text.EMOTIONS) <= set(corpus.DISPLAY)
