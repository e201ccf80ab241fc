"""The bugs on which public replications failed, by a test each that would have found it."""

import numpy as np
import pytest

from jaxemo.studies import arms, choices, preference
from jaxemo.studies.choices import Choice

LAST = 2


@pytest.fixture(scope="module")
def vectors(lm, random_vectors):
    return random_vectors(lm, "ab", [3.0, 30.0, 300.0])


def test_a_vector_on_both_options_is_another_thing(lm, vectors, tmp_path):
    """Where both options are steered alike, what is left is not the preference for the one."""
    pair = ("walk by the river", "sort old bills")
    (ids,) = preference.prompts(lm, [pair])
    first, second = (preference.place(lm, ids, option) for option in pair)
    assert first.stop <= second.start, "no token of the one is the other's"
    conditions = {"plain": None, "whole": vectors.steer("a", 0.5, [1])}
    (plain, _), (whole, _) = preference.odds(lm, [pair], conditions, tmp_path / "all.jsonl", progress=False).values()
    one = [
        preference.odds(lm, [pair], conditions, tmp_path / f"{i}.jsonl", [option], progress=False)["whole"][0]
        for i, option in enumerate(pair)
    ]
    assert len({round(float(x[0]), 5) for x in (plain, whole, *one)}) == 4, "each is told from the others"


def test_padding_changes_no_odds(lm, vectors, tmp_path):
    """A short situation alone and among longer ones, steered."""
    situations = [
        Choice(text, f"Say {text}.", "yes", "never again")
        for text in ("one", "a rather longer one " * 4, "two or three")
    ]
    strength = arms.Strength(0.1, 0.1, (1, LAST))
    made = [arm for arm in arms.make(vectors, ["a"], strength, random=1) if arm.name in ("none", "a +1")]
    among = choices.measure(lm, situations, made, tmp_path / "among.jsonl", progress=False)
    alone = choices.measure(lm, situations[:1], made, tmp_path / "alone.jsonl", progress=False)
    for name in ("none", "a +1"):
        for reading in choices.READINGS:
            assert among[name][reading][0] == pytest.approx(alone[name][reading][0], abs=2e-5)
    assert abs(among["a +1"]["continuation"][0] - among["none"]["continuation"][0]) > 1e-3


def test_a_strength_is_a_fraction_of_the_residual_norm(vectors):
    made = arms.make(vectors, ["a"], arms.Strength(0.1, 0.02, (1, LAST)), doses=(-1.0, 0.5), random=2)
    for arm in made[1:]:
        (term,) = arm.steering.terms
        s = 0.02 if arm.kind == "matched" else 0.1
        np.testing.assert_allclose(term.value[1:], arm.dose * s * np.array([30.0, 300.0]), rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(term.directions[1:], axis=-1), 1, rtol=1e-5)


def test_questions_are_asked_in_the_models_own_template(lm, monkeypatch):
    assert lm.tokenizer.chat_template
    (asked,) = choices.ask(lm, ["What now?"])
    chat = [{"role": "user", "content": "What now?"}]
    assert lm.tokenizer.decode(asked, skip_special=False).endswith(lm.tokenizer.render(chat)), (
        "up to where its answer begins"
    )
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    (asked,) = choices.ask(lm, ["What now?"])
    assert lm.tokenizer.decode(asked) == "What now?\n\n"
