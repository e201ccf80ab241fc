"""Preference: strengths that are Bradley and Terry's, steering at the tokens of one activity alone, planted effects found."""

import json

import numpy as np
import pytest
import scipy.special

import jaxemo
from jaxemo.studies import arms, preference, records

ITEMS = [{"id": f"{i}", "kind": kind, "text": text} for i, (kind, text) in enumerate(
    [("a", "mending a kite"), ("a", "painting a gate"), ("b", "sorting old receipts"), ("b", "waiting in the rain"),
     ("c", "reading a map"), ("c", "naming the stars"), ("d", "peeling onions"), ("d", "whistling badly")])]  # fmt: skip
LAST = 2


@pytest.fixture(scope="module")
def vectors(lm, random_vectors):
    return random_vectors(lm, "abcdef")


def test_strengths_are_those_that_made_the_odds():
    theta = np.random.default_rng(1).standard_normal(12)
    theta -= theta.mean()
    odds = theta[:, None] - theta[None]
    np.testing.assert_allclose(preference.worth(odds), theta, atol=1e-3)
    noisy = odds + 0.8 * np.triu(np.random.default_rng(2).standard_normal((12, 12)), 1)
    noisy = np.triu(noisy) - np.triu(noisy).T
    low, high = preference.worth_interval(noisy)
    assert ((low < preference.worth(noisy)) & (preference.worth(noisy) < high)).all()
    assert np.mean((low < theta) & (theta < high)) > 0.7


def test_the_first_stands_at_a_and_steering_touches_one_activity_alone(lm, vectors, tmp_path):
    pair = (ITEMS[0]["text"], ITEMS[3]["text"])
    (ids,) = preference.prompts(lm, [pair])
    span = preference.place(lm, ids, pair[1])
    assert lm.tokenizer.decode(list(ids[span])) == f" {pair[1]}"
    steering = vectors.steer("a", 0.5, [LAST - 1], tokens=span)
    out = lm.forward(np.array([ids], np.int32), steering, jaxemo.Capture(dose=True), logits="last")
    moved = np.asarray(out.captured.dose)[LAST - 1, 0]
    assert (np.flatnonzero(moved) == np.arange(span.start, span.stop)).all()
    letters = [lm.tokenizer.encode(letter)[-1] for letter in "AB"]
    logits = np.asarray(out.logits)[0, letters]
    everywhere = {"all": vectors.steer("a", 0.5, [LAST - 1])}
    found = preference.odds(lm, [pair], everywhere, tmp_path / "s.jsonl", [pair[1]], progress=False)
    assert found["all"][:, 0] == pytest.approx(
        [logits[0] - logits[1], scipy.special.softmax(np.asarray(out.logits)[0])[letters].sum()], abs=1e-4
    )
    with pytest.raises(ValueError, match="2 times"):
        preference.place(lm, preference.prompts(lm, [(pair[0], pair[0])])[0], pair[0])


def test_a_model_that_prefers_is_seen_to_and_steered_as_its_readings_say(lm, vectors, tmp_path, monkeypatch):
    """Answers are made up: a worth of each activity that one emotion's reading goes with, more of it wherever that is added."""
    rng, texts = np.random.default_rng(3), [item["text"] for item in ITEMS]
    read = np.asarray(
        lm.read([[{"role": "user", "content": t}] for t in texts], vectors, vectors.layer, tokens="user").pooled
    )
    worth = (read[:, 0] - read[:, 0].mean()) / read[:, 0].std()
    reading = np.array([np.corrcoef(worth, read[:, e])[0, 1] for e in range(6)])

    def answer(pairs, spec, steered):
        found = np.array([worth[texts.index(a)] - worth[texts.index(b)] for a, b in pairs]) + 0.3  # a liking for A
        for term in spec.terms if spec else ():
            cosines = vectors.directions[LAST] @ term.directions[LAST]
            gain = reading @ np.where(np.abs(cosines) > 0.99, np.sign(term.value[LAST]) * cosines, 0)
            sides = np.array([1 if a == own else -1 for (a, _), own in zip(pairs, steered, strict=True)])
            found += (2 * gain + 0.05 * rng.standard_normal(len(pairs))) * sides
        return np.stack([found, np.full(len(pairs), 0.9)])

    def odds(lm, pairs, conditions, out, steered=(), progress=True):
        return {name: answer(pairs, spec, steered) for name, spec in conditions.items()}

    monkeypatch.setattr(preference, "odds", odds)
    options = {"emotions": vectors.names, "layers": (LAST,), "strength": 0.1, "activities": ITEMS, "progress": False}
    result = preference.study(lm, vectors, tmp_path, **options)
    np.testing.assert_allclose(np.corrcoef(result.worth, worth)[0, 1], 1, atol=1e-3)
    assert result.names[result.best] == "a" and set(result.verdicts.values()) == {"replicates"}
    assert result.effects["a"].mean == pytest.approx(2, abs=0.1)
    assert result.across[0] > 0.95
    assert str(result) == (tmp_path / "preference.txt").read_text().rstrip("\n")
    assert json.loads((tmp_path / "preference.json").read_text())["effects"]["a"]["items"] == len(ITEMS)


def test_a_study_goes_on_where_it_was_killed_and_refuses_anothers_answers(lm, vectors, tmp_path):
    options = {"emotions": "abc", "layers": (LAST,), "strength": 0.1, "activities": ITEMS, "progress": False}
    whole = str(preference.study(lm, vectors, tmp_path, **options))
    store = tmp_path / "preference.jsonl"
    lines = store.read_bytes().splitlines(keepends=True)
    store.write_bytes(b"".join(lines[:300]) + lines[300][:20])
    assert str(preference.study(lm, vectors, tmp_path, **options)) == whole
    assert store.read_bytes().splitlines(keepends=True) == lines
    with pytest.raises(ValueError, match="was written with other conditions"):
        preference.study(lm, vectors, tmp_path, **options | {"strength": 0.2})


def test_a_model_that_always_says_a_tells_nothing(lm, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(
        preference,
        "odds",
        lambda lm, pairs, conditions, *_, **__: {
            name: 9 + np.random.default_rng(4).standard_normal((2, len(pairs))) for name in conditions
        },
    )
    result = preference.study(
        lm, vectors, tmp_path, emotions="abc", layers=(LAST,), strength=0.1, activities=ITEMS, progress=False
    )
    assert {said.partition(":")[0] for said in result.verdicts.values()} == {"uninformative"}
    assert "the first is chosen 100%" in str(result)


def test_directions_that_leave_no_letters_are_dropped_openly(lm, vectors, tmp_path, monkeypatch):
    def odds(lm, pairs, conditions, *_, **__):
        moved = np.random.default_rng(len(pairs)).standard_normal(len(pairs))
        return {
            name: np.stack([moved, np.full(len(pairs), 0.4 if name.endswith("-1") else 0.9)]) for name in conditions
        }

    monkeypatch.setattr(preference, "odds", odds)
    result = preference.study(
        lm, vectors, tmp_path, emotions="abc", layers=(LAST,), strength=0.1, activities=ITEMS, progress=False
    )
    assert len(result.dropped) == 3 + arms.RANDOM and all(name.endswith("-1") for name in result.dropped)
    assert not result.effects and "uninformative: so few answers are letters" in str(result)
    assert "dropped, letters are no longer an answer: a -1, b -1, c -1, random-0" in str(result)


def test_what_lengths_explain_is_taken_out_of_readings_and_preference(lm, vectors, tmp_path, monkeypatch):
    """A worth that is the number of tokens: it goes with that, and with nothing besides."""
    texts = [item["text"] for item in ITEMS]
    tokens = {text: len(lm.tokenizer.encode(f" {text}")) for text in texts}

    def odds(lm, pairs, conditions, *_, **__):
        moved = np.array([tokens[a] - tokens[b] for a, b in pairs]) * 0.1
        return {name: np.stack([moved, np.ones(len(pairs))]) for name in conditions}

    monkeypatch.setattr(preference, "odds", odds)
    result = preference.study(
        lm, vectors, tmp_path, emotions="abc", layers=(LAST,), strength=0.1, activities=ITEMS, progress=False
    )
    assert result.length_r == pytest.approx(1, abs=1e-3)
    assert f"r = {result.length_r:+.2f} of worth with the number of tokens, without which the best is" in str(result)


def test_random_directions_are_steered_as_the_emotions_are(vectors):
    made = arms.make(vectors, "ab", arms.Strength(0.1, 0.1, (LAST,)), doses=(-1.0, 1.0))
    assert (
        sum(arm.kind == "random" for arm in made) == 2 * arms.RANDOM and sum(arm.kind == "emotion" for arm in made) == 4
    )


def test_shipped_activities_are_eight_of_eight_kinds():
    found = records("activities.jsonl")
    kinds = [item["kind"] for item in found]
    assert len({item["id"] for item in found}) == len({item["text"] for item in found}) == 64
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(kinds, 8) and len(set(kinds)) == 8
    assert all(5 <= len(item["text"].split()) <= 12 for item in found)
