"""Preference: strengths that are Bradley and Terry's, steering at the tokens of one activity alone, planted effects found."""

import dataclasses
import json

import numpy as np
import pytest

import jaxemo
from jaxemo.studies import arms, preference, records

ITEMS = [{"id": f"{i}", "kind": kind, "text": text} for i, (kind, text) in enumerate(
    [("a", "mending a kite"), ("a", "painting a gate"), ("b", "sorting old receipts"), ("b", "waiting in the rain"),
     ("c", "reading a map"), ("c", "naming the stars"), ("d", "peeling onions"), ("d", "whistling badly")])]  # fmt: skip
LAST = 2


@pytest.fixture(scope="module")
def lm():
    tiny = jaxemo.load("tests/golden/gqa_tied.gguf")
    return jaxemo.LanguageModel(
        dataclasses.replace(tiny.config, max_positions=512), tiny.params, tiny.tokenizer, "tiny"
    )


@pytest.fixture(scope="module")
def vectors(lm):
    draw, L = np.random.default_rng(0).standard_normal, lm.config.n_layers
    return jaxemo.EmotionVectors.from_directions(
        {name: draw((L, lm.config.d_model)) for name in "abcdef"}, np.full(L, 3.0)
    )


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


def test_the_first_stands_at_a_and_steering_touches_one_activity_alone(lm, vectors):
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
    assert preference.odds(lm, [pair], preference.begin(lm, [pair]), [steering])[0] == pytest.approx(
        logits[0] - logits[1], abs=1e-4
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

    def odds(lm, pairs, begun, steerings=None):
        found = np.array([worth[texts.index(a)] - worth[texts.index(b)] for a, b in pairs]) + 0.3  # a liking for A
        for i, (a, _) in enumerate(pairs):
            for term in steerings[i].terms if steerings else ():
                cosines = vectors.directions[LAST] @ term.directions[LAST]
                gain = reading @ np.where(np.abs(cosines) > 0.99, np.sign(term.value[LAST]) * cosines, 0)
                ids = preference.prompts(lm, [pairs[i]])[0]
                found[i] += (2 * gain + 0.05 * rng.standard_normal()) * (
                    1 if term.tokens == preference.place(lm, ids, a) else -1
                )
        return found

    monkeypatch.setattr(preference, "odds", odds)
    options = {"emotions": vectors.names, "layers": (LAST,), "strength": 0.1, "activities": ITEMS, "progress": False}
    result = preference.study(lm, vectors, tmp_path, **options)
    np.testing.assert_allclose(np.corrcoef(result.worth, worth)[0, 1], 1, atol=1e-3)
    assert result.names[result.best] == "a" and set(result.verdicts.values()) == {"replicates"}
    assert result.effects["a"].mean == pytest.approx(2, abs=0.1)
    assert result.across[0] > 0.95
    again = preference.study(lm, vectors, tmp_path, **options)
    assert str(again) == str(result) == (tmp_path / "preference.txt").read_text().rstrip("\n")
    assert json.loads((tmp_path / "preference.json").read_text())["effects"]["a"]["items"] == len(ITEMS)
    with pytest.raises(ValueError, match="with another steering"):
        preference.study(lm, vectors, tmp_path, **options | {"strength": 0.2})


def test_a_model_that_always_says_a_tells_nothing(lm, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(
        preference, "odds", lambda lm, pairs, *_: 9 + np.random.default_rng(4).standard_normal(len(pairs))
    )
    result = preference.study(
        lm, vectors, tmp_path, emotions="abc", layers=(LAST,), strength=0.1, activities=ITEMS, progress=False
    )
    assert {said.partition(":")[0] for said in result.verdicts.values()} == {"uninformative"}
    assert "the first is chosen 100%" in str(result)


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
