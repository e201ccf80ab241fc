"""Reading predicts the answer: found where it does, not where only the user's words do, with data that are what they should be."""

import collections

import numpy as np
import pytest

from jaxemo.emotions import corpus
from jaxemo.studies import prediction, records, statistics

E, N = 12, 144


def made_up(rng, predicts: float, assistant: float):
    """Messages of 12 emotions; the reading before the answer has the user's emotion, a tone of its own, or both."""
    labels, same = np.repeat(np.arange(E), N // E), np.arange(N) % 2 == 0
    emotion = np.eye(E)[labels]
    tone = np.where(same[:, None], emotion, np.eye(E)[rng.permutation(E)[labels]])
    user = emotion + 0.5 * rng.standard_normal((N, E))
    own = rng.standard_normal((N, E))
    before = predicts * own + assistant * tone + (1 - assistant) * emotion + 0.5 * rng.standard_normal((N, E))
    answer = own + emotion + rng.standard_normal((N, E))
    words = emotion + 0.3 * rng.standard_normal((N, E))
    random = [rng.standard_normal((N, E)) for _ in range(20)]
    return prediction.judge(before, user, answer, words, labels, same, random)


def test_a_reading_that_predicts_and_is_the_assistants_is_found(monkeypatch):
    monkeypatch.setattr(prediction, "PERMUTATIONS", 200)
    found = made_up(np.random.default_rng(0), predicts=1.0, assistant=1.0)
    assert set(found["verdicts"].values()) == {"replicates"}
    told = found["told"]
    assert told["before the answer, same tone"] > 2 / E > told["before the answer, another tone"]


def test_a_reading_of_the_users_emotion_alone_is_not(monkeypatch):
    """What goes with the answer only because both go with the message is no prediction."""
    monkeypatch.setattr(prediction, "PERMUTATIONS", 200)
    said = [made_up(np.random.default_rng(seed), 0.0, 0.0)["verdicts"] for seed in range(1, 41)]
    for claim in said[0]:
        assert np.mean([verdicts[claim] == "replicates" for verdicts in said]) <= 0.1


def test_the_partial_correlation_is_that_of_the_textbook():
    rng = np.random.default_rng(5)
    x, y, z = rng.standard_normal((3, 200))
    x, y = x + z, y + z + 0.5 * x
    xy, xz, yz = np.corrcoef(x, y)[0, 1], np.corrcoef(x, z)[0, 1], np.corrcoef(y, z)[0, 1]
    want = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert statistics.partial(x[:, None], y[:, None], z[:, None]) == pytest.approx(want)


def test_shipped_messages_imply_twelve_emotions_and_ask_for_replies_of_both_kinds():
    found = records("prediction.jsonl")
    assert len({item["id"] for item in found}) == len({item["text"] for item in found}) == N
    kinds = collections.Counter((item["emotion"], item["reply"]) for item in found)
    assert kinds == {(name, reply): 6 for name in corpus.DISPLAY for reply in ("same", "other")}
    for item in found:
        assert all(corpus.leak(name, item["text"]) is None for name in corpus.DISPLAY)
