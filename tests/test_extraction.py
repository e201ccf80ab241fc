"""What extraction streams, keeps and measures, against plain NumPy and scikit-learn; the method itself is in test_emotions."""

import dataclasses
import pathlib

import hypothesis
import numpy as np
import pytest
import sklearn.decomposition
from hypothesis import strategies as st

import jaxemo
from jaxemo import params
from jaxemo.emotions import EmotionVectors, corpus, extraction

GOLDEN = pathlib.Path(__file__).parent / "golden"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "two", "three", "old", "dogs", "run", "by"]


@pytest.fixture(scope="module")
def lm():
    return jaxemo.load(GOLDEN / "gqa_tied.gguf")


def some_corpus(emotions=("glad", "low", "odd", "dim"), topics=("x", "y", "z"), neutral=9):
    rng = np.random.default_rng(0)

    def text():
        return " ".join(rng.choice(WORDS, rng.integers(8, 17)))

    stories = tuple(corpus.Story(e, t, text()) for e in emotions for t in topics)
    return corpus.Corpus("some", stories, tuple(text() for _ in range(neutral)))


def extract(lm, c, **kwargs):
    return extraction.extract(lm, c, **{"skip": 5, "max_tokens": 32, "progress": False, **kwargs})


def same(a: EmotionVectors, b: EmotionVectors) -> bool:
    fields = ("directions", "residual_norm", "neutral_mean", "neutral_std")
    return (
        all(np.array_equal(getattr(a, name), getattr(b, name)) for name in fields)
        and a.measured.keys() == b.measured.keys()
        and all(np.array_equal(a.measured[name], b.measured[name]) for name in a.measured)
        and a.provenance == b.provenance
        and (a.raw is b.raw is None or same(a.raw, b.raw))
    )


def test_work_killed_anywhere_is_taken_up_to_the_bit(lm, tmp_path, monkeypatch):
    c, path = some_corpus(), tmp_path / "vectors.part"
    monkeypatch.setattr(extraction, "CHUNK", 8)
    whole = extract(lm, c)
    monkeypatch.setattr(extraction, "EVERY", 0.0)
    forward, rng, kills = type(lm).forward, np.random.default_rng(0), 0

    class Killed(BaseException):
        pass

    def mortal(self, *args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(lm), "forward", mortal)
    while True:
        left = int(rng.integers(0, 3)) if kills < 20 else 10**6
        try:
            found = extract(lm, c, checkpoint=path)
            break
        except Killed:
            kills += 1
    assert kills >= 20 and same(found, whole)
    left = 10**6
    assert same(extract(lm, c, checkpoint=path), whole), "the checkpoint stays until the caller has saved the vectors"


def test_a_checkpoint_of_other_work_is_refused(lm, tmp_path, monkeypatch):
    path = tmp_path / "vectors.part"
    monkeypatch.setattr(extraction, "calibrate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extract(lm, some_corpus(), checkpoint=path)
    kept = path.read_bytes()
    for other, named in (({"skip": 6}, "skip"), ({"layers": [1]}, "layers"), ({"denoise": 0.3}, "denoise")):
        with pytest.raises(ValueError, match=rf"checkpoint of another extraction, with a different {named}; remove it"):
            extract(lm, some_corpus(), checkpoint=path, **other)
    other = jaxemo.LanguageModel(lm.config, params.init(lm.config), lm.tokenizer, lm.source)
    with pytest.raises(ValueError, match="with a different model_sha256; remove it"):
        extract(other, some_corpus(), checkpoint=path)
    with pytest.raises(ValueError, match="different corpus_sha256, stories"):
        extract(lm, some_corpus(topics=("x", "y")), checkpoint=path)
    assert path.read_bytes() == kept
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"vectors\.part' is not the checkpoint of an extraction; remove it"):
        extract(lm, some_corpus(), checkpoint=path)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        extract(lm, some_corpus(), checkpoint=tmp_path / "no" / "vectors.part")


def test_layers_not_extracted_have_no_directions(lm, tmp_path):
    c = some_corpus()
    every, some = extract(lm, c), extract(lm, c, layers=[2, 0])
    assert every.layers == (0, 1, 2) and some.layers == (0, 2) and some.layer == 2
    for v, w in ((some, every), (some.raw, every.raw)):
        at = list(some.layers)
        assert np.allclose(v.directions[at], w.directions[at], atol=1e-5) and not v.directions[1].any()
        assert np.allclose(v.neutral_mean[at], w.neutral_mean[at], rtol=1e-3, atol=1e-4)
    path = tmp_path / "v.safetensors"
    some.save(path)
    assert same(EmotionVectors.load(path), some)
    lm.forward("one two", some.steer("low", 0.1, layers=[0, 2]))
    for make in (lambda: some.steer("low", 0.1, layers=[0, 1]), lambda: some.ablate("low")):
        with pytest.raises(
            ValueError, match=r"no directions at layers \[1\]: these vectors were extracted at \[0, 2\]"
        ):
            make()
    controls = some.random(5)
    assert controls.layers == (0, 2) and np.allclose(np.linalg.norm(controls.directions[[0, 2]], axis=-1), 1)
    with pytest.raises(ValueError, match="direction of 'b' at layer 0 is zero"):
        EmotionVectors.from_directions({"a": np.ones((2, 3)), "b": np.array([[0, 0, 0], [1, 1, 1]])}, np.ones(2))


def test_raw_directions_are_those_before_denoising(lm):
    c = some_corpus()
    found, plain = extract(lm, c), extract(lm, c, denoise=0)
    assert plain.raw is None and found.raw is not None
    assert np.array_equal(found.raw.directions, plain.directions)
    assert np.allclose(found.raw.neutral_mean, plain.neutral_mean, atol=1e-5)
    assert np.abs(found.directions - plain.directions).max() > 0.01
    assert found.select(["odd"]).raw.names == ("odd",) and found.select(["odd"]).measured["length"].shape == (3, 1)


def test_what_is_measured_is_what_numpy_finds(lm):
    c = some_corpus()
    found = extract(lm, c, denoise=0)
    x = (
        extraction.pooled(lm, [s.text for s in c.stories], skip=5)[0].astype(np.float64).reshape(4, 3, 3, -1)
    )  # e, topic, L, D
    means = x.mean(1)
    centred = means - means.mean(0)
    length, spread = np.linalg.norm(centred, axis=-1), np.sqrt(np.square(x - means[:, None]).sum(-1).sum(1) / 2)
    assert np.allclose(found.measured["length"], length.T, rtol=1e-4)
    assert np.allclose(found.measured["spread"], spread.T, rtol=1e-4)
    # The bootstrap draws topics, the same for all emotions: a topic that only shifts all emotions alike changes nothing.
    draws = np.random.default_rng(0).multinomial(3, [1 / 3] * 3, extraction.REPLICATES)
    cosines = []
    for weight in draws:
        again = np.einsum("etd,t->ed", x[:, :, found.layer], weight / 3)
        again -= again.mean(0)
        cosines.append([u @ v / np.linalg.norm(u) for u, v in zip(again, found.directions[found.layer], strict=True)])
    assert np.allclose(found.measured["self_cosine"], np.mean(cosines, 0), atol=1e-4)
    one, other = (x[:, at, found.layer].mean(1) for at in ([1], [0, 2]))  # every second topic, and the others
    one, other = one - one.mean(0), other - other.mean(0)
    halves = np.sum(one * other, 1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))
    assert np.allclose(found.measured["half_cosine"], halves, atol=1e-4)


def test_a_single_story_is_no_certainty(lm):
    c = some_corpus()
    few = dataclasses.replace(c, stories=(c.stories[0], *c.stories[3:]))  # one story of "glad", three of the others
    found = extract(lm, few)
    for name in ("self_cosine", "half_cosine"):
        assert np.isnan(found.measured[name]).tolist() == [True, False, False, False]
    assert np.isnan(found.measured["spread"][:, 0]).all() and np.isfinite(found.measured["spread"][:, 1:]).all()


def test_only_the_tokens_from_skip_to_longest_without_sinks_are_read(lm, monkeypatch):
    asked = []
    forward = type(lm).forward

    def spy(self, batch, steering=None, capture=None, **kwargs):
        asked.append(capture)
        return forward(self, batch, steering, capture, **kwargs)

    monkeypatch.setattr(type(lm), "forward", spy)
    texts = [" ".join(WORDS), " ".join(WORDS[:12])]
    means, _ = extraction.pooled(lm, texts, skip=5, longest=8)
    assert not any(capture.sinks for capture in asked)
    cut = [lm.tokenizer.decode(lm.tokenizer.encode(text)[:8]) for text in texts]
    want = extraction.pooled(lm, cut, skip=5)[0]
    assert (
        np.linalg.norm(means - want, axis=-1) < 1e-5 * np.linalg.norm(want, axis=-1)
    ).all()  # rounding grows with length


def test_every_short_text_is_named_before_the_work(lm):
    c = some_corpus()
    short = dataclasses.replace(c, neutral=(*c.neutral, "one two", "three"))
    with pytest.raises(ValueError, match=r"a text has \d tokens, more than 5 are needed: 'one two', and 1 others"):
        extract(lm, short)


def test_layers_and_scores_that_are_not_there_are_refused(lm):
    vectors = extract(lm, some_corpus(), layers=[2])
    for call in (lambda: lm.read("one two", vectors, layer=0), lambda: lm.read("one two", vectors),
                 lambda: lm.generate("one two", max_new_tokens=2, read=vectors, layer=1)):  # fmt: skip
        with pytest.raises(ValueError, match=r"no directions at layers \[.*\]: these vectors were extracted at \[2\]"):
            call()
    controls = vectors.random(3)
    with pytest.raises(ValueError, match="not calibrated on neutral text, so they have no z-scores"):
        lm.read("one two", controls, layer=2, kind="z")
    with pytest.raises(ValueError, match="a single text cannot be centred"):
        lm.read("one two", vectors, layer=2, kind="centred")


@hypothesis.given(st.integers(0, 10**6), st.sampled_from([(3, 40), (40, 6), (7, 7)]), st.floats(0.05, 0.95))
def test_main_components_are_those_of_pca(seed, shape, share):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * rng.uniform(0.1, 3, shape[1]) + rng.standard_normal(shape[1]) * 5
    rows = np.zeros((1, 0, 1 + shape[1]))
    for part in np.array_split(x, 5):  # as the stream brings them
        rows = extraction._compressed(np.concatenate([rows, np.insert(part, 0, 1, axis=1)[None]], axis=1))
    assert rows.shape[1] <= 2 * rows.shape[2]
    basis = extraction.main_components(rows[0], share)
    pca = sklearn.decomposition.PCA().fit(x)
    n = int(np.searchsorted(np.cumsum(pca.explained_variance_ratio_), share)) + 1
    assert abs(len(basis) - n) <= (np.abs(np.cumsum(pca.explained_variance_ratio_) - share).min() < 1e-12)
    want = pca.components_[: len(basis)]
    assert np.allclose(basis.T @ basis, want.T @ want, atol=1e-6)


def test_a_fingerprint_tells_weights_and_not_layouts(lm):
    own = params.fingerprint(lm.params)
    assert (
        own
        == params.fingerprint(params.stack(lm.params))
        == params.fingerprint(jaxemo.load(GOLDEN / "gqa_tied.gguf").params)
    )
    assert own != params.fingerprint(jaxemo.load(GOLDEN / "gqa_tied.gguf", dtype="bfloat16").params)
    other = params.init(lm.config)
    assert params.fingerprint(other) != own
