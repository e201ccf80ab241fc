"""Base against post-trained: shifts planted in a model's weights are found, drift of the whole stream is not, unlike models are refused."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import normalizers

import jaxemo
from jaxemo import tokens
from jaxemo.emotions import corpus
from jaxemo.studies import post_training, records
from jaxemo.studies.post_training import CLAIMS, Stream

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|end|>{% endif %}"
NAMES = ("brooding", "gloomy", "reflective", "playful", "exuberant", "spiteful", "happy", "calm")
LAST, PROMPT = 2, 258  # the last block; the token "<|end|>", which stands before the answer and nowhere else
ITEMS = {
    "messages": [item["text"] for item in records("prediction.jsonl")][::9],
    "plain": ["Name a river.", "What is tar?", "Why?"],
}


@pytest.fixture(scope="module")
def base(model_of, make_tokenizer):
    return model_of(tokenizer=make_tokenizer(chat_template=TEMPLATE), max_positions=512)


@pytest.fixture(scope="module")
def basis(base):
    """Nine directions at right angles: those of the names, and one of none."""
    return np.linalg.qr(np.random.default_rng(0).standard_normal((base.config.d_model, len(NAMES) + 1)))[0].T


def vectors_of(lm, rows, names=NAMES):
    L = lm.config.n_layers
    about = {"made_for": lm.config.outline, "model": "tiny"}
    return jaxemo.EmotionVectors.from_directions(
        {n: np.tile(row, (L, 1)) for n, row in zip(names, rows, strict=False)}, np.ones(L), about
    )


@pytest.fixture(scope="module")
def vectors(base, basis):
    return vectors_of(base, basis)


def trained(lm, push, ids=PROMPT):
    """The model with `push` added to the embeddings of `ids`: the stream there moves along it, through all blocks."""
    return jaxemo.LanguageModel(
        lm.config, lm.params | {"embed": lm.params["embed"].at[ids].add(push)}, lm.tokenizer, "trained"
    )


def run(base, post, vectors, out, **kwargs):
    return post_training.study(base, post, vectors, out, **{"items": ITEMS, "progress": False, **kwargs})


def verdicts(result):
    return {row.claim.emotion: row.verdict for row in result.rows}


# ---- planted in a model --------------------------------------------------------------------------------------------------


def test_planted_shifts_are_found_with_their_signs_and_nothing_else(base, basis, vectors, tmp_path):
    post = trained(base, 20 * (basis[0] - basis[4]))
    result = run(base, post, vectors, tmp_path)
    said = verdicts(result)
    assert said["brooding"] == said["exuberant"] == "replicates"
    assert {said[name] for name in ("gloomy", "reflective", "playful", "spiteful")} == {"does not replicate"}
    order = np.argsort(-result.shift)
    assert (result.names[order[0]], result.names[order[-1]]) == ("brooding", "exuberant")
    assert set(result.rows[0].by) == {"messages", "plain"} and result.messages == {"messages": 16, "plain": 3}
    for mean, low, high in result.rows[0].by.values():
        assert 0 < low < mean < high
    opposite = run(base, trained(base, -20 * basis[0]), vectors, tmp_path)
    assert verdicts(opposite)["brooding"] == "opposite" and opposite.shift[0] < 0


def test_the_shift_is_the_difference_of_scores_read_by_hand(base, basis, vectors, tmp_path):
    post = trained(base, 20 * basis[0])
    result, place = run(base, post, vectors, tmp_path), []
    texts = tokens.pad([base.tokenizer.encode(text)[:160] for text in corpus.shipped().neutral])
    chats = [[{"role": "user", "content": text}] for of in ITEMS.values() for text in of]
    counted = (np.arange(texts.ids.shape[1]) >= 50) & (np.arange(texts.ids.shape[1]) < texts.lengths[:, None])
    for lm in (base, post):
        neutral = lm.read(texts, vectors, LAST).scores[counted]
        before = lm.read(chats, vectors, LAST, tokens="before_answer").pooled
        place.append((before - neutral.mean(0)) / neutral.std(0))
    np.testing.assert_allclose(result.shift, (place[1] - place[0]).mean(0), atol=1e-3)


def test_what_was_not_trained_or_moves_along_no_direction_is_not_found(base, basis, vectors, tmp_path):
    same = run(base, base, vectors, tmp_path)
    assert not same.shift.any() and set(verdicts(same).values()) == {"does not replicate"}
    elsewhere = run(base, trained(base, 20 * basis[len(NAMES)]), vectors, tmp_path)
    assert elsewhere.chance["random"] > 0.1 and set(verdicts(elsewhere).values()) == {"does not replicate"}


def test_a_stream_that_moves_everywhere_alike_is_no_shift(base, basis, vectors, tmp_path):
    """The same push as above, in every token: it is seen in neutral text, and taken out."""
    result = run(base, trained(base, 20 * basis[0], slice(None)), vectors, tmp_path)
    assert result.moved > 1 and verdicts(result)["brooding"] == "does not replicate"


def test_directions_that_are_others_on_the_base_tell_nothing(base, basis, vectors, tmp_path):
    post = trained(base, 20 * basis[0])
    unknown = run(base, post, vectors, tmp_path)
    assert "is not known" in str(unknown) and unknown.rows[0].cosine is None
    known = run(base, post, vectors, tmp_path, base_vectors=vectors)
    assert verdicts(known)["brooding"] == "replicates" and known.rows[0].cosine == pytest.approx(1, abs=1e-5)
    turned = vectors_of(base, np.concatenate([-basis[:1], basis[1:]]))
    other = run(base, post, vectors, tmp_path, base_vectors=turned)
    assert verdicts(other)["brooding"].startswith("uninformative: the base's own direction is another")
    assert "least -1.00 (brooding)" in str(other)


def test_the_result_is_kept_and_a_missing_direction_is_said_to_be(base, vectors, tmp_path):
    few = vectors.select(["gloomy", "happy"])
    result = run(base, trained(base, 0.1), few, tmp_path)
    assert verdicts(result)["brooding"] == "uninformative: there is no direction of that name"
    assert (tmp_path / "post-training.txt").read_text() == f"{result}\n"
    kept = json.loads((tmp_path / "post-training.json").read_text())
    assert kept["names"] == ["gloomy", "happy"] and kept["shift"] == pytest.approx(result.shift.tolist())
    assert [row[:2] for row in result.table()] == [(claim.text, "before answer") for claim in CLAIMS]


def test_shipped_messages_are_read_by_default(base, vectors, tmp_path):
    result = post_training.study(base, base, vectors, tmp_path, progress=False)
    assert result.messages == {"messages": 144, "neutral questions": 204}


# ---- what is refused -----------------------------------------------------------------------------------------------------


def test_models_that_differ_are_refused_with_the_difference_named(base, vectors, model_of, make_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"the base has 2 layers.*; the post-trained model 3 layers"):
        run(model_of(tokenizer=base.tokenizer, n_layers=2, max_positions=512), base, vectors, tmp_path)

    def with_tokenizer(change=lambda backend: None, **kwargs):
        tokenizer = make_tokenizer(**{"chat_template": TEMPLATE, **kwargs})
        change(tokenizer.backend)
        return jaxemo.LanguageModel(base.config, base.params, tokenizer)

    with pytest.raises(ValueError, match="in 1 tokens: 263 is 'more' for the base and None for the post-trained"):
        run(with_tokenizer(lambda backend: backend.add_tokens(["more"])), base, vectors, tmp_path)
    with pytest.raises(ValueError, match="cut a text in other places: 'user: "):
        run(
            with_tokenizer(lambda backend: setattr(backend, "normalizer", normalizers.Lowercase())),
            base,
            vectors,
            tmp_path,
        )
    with pytest.raises(ValueError, match="has no chat template"):
        run(base, with_tokenizer(chat_template=None), vectors, tmp_path)
    run(with_tokenizer(chat_template=None), base, vectors, tmp_path)  # a base needs none
    of_another = dataclasses.replace(vectors, provenance={"made_for": "another"})
    with pytest.raises(ValueError, match="made for another model"):
        run(base, base, of_another, tmp_path)
    with pytest.raises(ValueError, match="no direction named 'brooding'"):
        run(base, base, vectors, tmp_path, base_vectors=vectors.select(["calm"]))


# ---- arithmetic on made-up streams ---------------------------------------------------------------------------------------


def made_up(rng, n=40, m=60, D=48):
    """Neutral text and messages that vary along some axes much more than along others, about an offset."""
    size = np.exp(rng.standard_normal(D))
    offset, texts = rng.standard_normal(D), rng.standard_normal((m, D)) * size
    return Stream(offset + rng.standard_normal((n, D)) * size, offset + texts, offset, np.diag(size**2))


def directions(rng, D=48):
    found = rng.standard_normal((len(NAMES), D))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_a_stream_that_grew_and_moved_as_a_whole_stands_where_it_did():
    rng = np.random.default_rng(1)
    base, push = made_up(rng), rng.standard_normal(48)
    post = Stream(3 * base.before + push, 3 * base.texts + push, 3 * base.mean + push, 9 * base.covariance)
    found = post_training.judge(base, post, NAMES, directions(rng), ["all"] * 40)
    np.testing.assert_allclose(found["shift"], 0, atol=1e-9)
    assert found["moved"] > 0.1


def shifted(rng, push):
    base = made_up(rng)
    before = base.before + push(base) + 0.1 * rng.standard_normal(base.before.shape)
    return base, dataclasses.replace(base, before=before)


@pytest.mark.parametrize("along", ["any axis", "what texts differ in"])
def test_shifts_of_no_meaning_are_found_no_oftener_than_they_may_be(along):
    rng, hits = np.random.default_rng(2), []

    def push(base):
        return base.texts[0] - base.mean if along == "what texts differ in" else rng.standard_normal(48)

    for seed in range(100):
        base, post = shifted(rng, push)
        found = post_training.judge(base, post, NAMES, directions(rng), ["all"] * 40, seed=seed)
        hits.append(any(row.verdict != "does not replicate" for row in found["rows"]))
    assert np.mean(hits) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)


def test_a_shift_along_a_direction_is_found():
    rng, hits = np.random.default_rng(3), []
    for seed in range(20):
        of = directions(rng)
        base, post = shifted(rng, lambda base, of=of: 4 * post_training.spread(base, of)[0] * of[0])
        (row, *_) = post_training.judge(base, post, NAMES, of, ["all"] * 40, seed=seed)["rows"]
        hits.append(row.verdict == "replicates")
    assert np.mean(hits) >= 0.8
