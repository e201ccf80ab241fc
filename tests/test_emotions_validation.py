"""Classification, logit lens, prompts, numbers, geometry and speakers: against NumPy, SciPy and scikit-learn, and by what must hold.

Planted activations stand in for a model where the arithmetic is meant; the tiny model where the reading is.
"""

import dataclasses
import itertools
import pathlib

import numpy as np
import pytest
import scipy.stats

import jaxemo
from jaxemo.capture import Capture
from jaxemo.emotions import (
    EmotionVectors,
    classification,
    corpus,
    extraction,
    geometry,
    lens,
    methods,
    prompts,
    speakers,
    statistics,
    steering_test,
    validation,
)

GOLDEN = pathlib.Path(__file__).parent / "golden"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "two", "three", "old", "dogs", "run", "by"]


@pytest.fixture(scope="module")
def lm():
    return jaxemo.load(GOLDEN / "gqa_tied.gguf")


def vectors_of(lm, names=("glad", "low", "odd"), seed=0):
    L, D = lm.config.n_layers, lm.config.d_model
    rng = np.random.default_rng(seed)
    return EmotionVectors.from_directions({n: rng.standard_normal((L, D)) for n in names}, np.full(L, 3.0))


def check_streams(got, want):
    """Residual streams `[..., D]` differ by rounding only, which grows with a stream's length and not with each of its numbers.

    Two float32 passes of other padded shapes are 2e-6 of it apart; with a token more or less in a mean it is a tenth.
    """
    error = (np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)).max()
    print(f"\nstreams differ by {error:.1e} of their length (bound 1e-5)")
    assert error < 1e-5


def planted(n=240, L=3, E=6, D=40, size=2.0, seed=0):
    """Activations with a direction for each label after layer 1 only, on top of an offset and what differs between topics."""
    rng = np.random.default_rng(seed)
    labels, topic = np.arange(n) % E, np.arange(n) // E % 4
    x = rng.standard_normal((n, L, D)) + 5 * rng.standard_normal((L, D)) + 3 * rng.standard_normal((4, L, D))[topic]
    truth = rng.standard_normal((E, D))
    x[:, min(1, L - 1)] += size * truth[labels] / np.linalg.norm(truth, axis=1)[labels, None]
    return x, labels, topic, truth


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_the_best_of_several_correlations_pays_for_the_choice():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(30), rng.standard_normal((30, 6))
    assert np.allclose(statistics.correlations(x, y), [scipy.stats.pearsonr(x, c).statistic for c in y.T])
    one = statistics.best_match(x, y[:, :1])[1]
    assert abs(one - scipy.stats.pearsonr(x, y[:, 0]).pvalue) < 0.03, "a single column: the ordinary two-sided p"
    at, many = statistics.best_match(x, y)
    smallest = min(scipy.stats.pearsonr(x, c).pvalue for c in y.T)
    assert at == np.abs(statistics.correlations(x, y)).argmax()
    assert smallest < many < 6 * smallest + 0.02, "between the best p uncorrected and Bonferroni's"
    low, high = statistics.interval(x, x + 0.5 * y[:, 0])
    assert low < scipy.stats.pearsonr(x, x + 0.5 * y[:, 0]).statistic < high


# ---- methods ---------------------------------------------------------------------------------------------------------


def test_the_probe_is_scikit_learns_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    x, labels, *_ = planted(n=150, L=1, E=4, D=12)
    got = methods.directions(x, labels, "probe", l2=0.01)[0]
    centred = x[:, 0] - x[:, 0].mean(0)
    scale = np.sqrt(np.mean(centred**2))
    oracle = (
        LogisticRegression(C=1 / (len(x) * 0.01), tol=1e-8, max_iter=5000).fit(centred / scale, labels).coef_ / scale
    )
    error = np.abs(got - (oracle - oracle.mean(0))).max() / np.abs(oracle).max()
    print(f"\nweights differ by {error:.1e} of the largest (bound 1e-3: both stop at a gradient of about 1e-5)")
    assert error < 1e-3


def test_whitened_directions_are_fishers_discriminant():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, labels, *_ = planted(n=3000, L=1, E=4, D=8)
    got = methods.directions(x, labels, "whitened")[0]
    oracle = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(4, 0.25)).fit(x[:, 0], labels).coef_
    oracle = oracle - oracle.mean(0)
    cosine = np.sum(got * oracle, 1) / np.linalg.norm(got, axis=1) / np.linalg.norm(oracle, axis=1)
    print(f"\ncosine with the unshrunk discriminant {cosine.min():.4f} (3,000 texts: hardly any shrinkage)")
    assert cosine.min() > 0.999


def test_difference_is_the_mean_less_the_other_means_and_pca_finds_the_planted_axis():
    x, labels, topic, truth = planted(size=6.0)
    got = methods.directions(x, labels, "difference")
    means = np.stack([x[labels == e].mean(0) for e in range(6)])
    for e in range(6):
        assert np.allclose(got[:, e], means[e] - np.delete(means, e, 0).mean(0))
    unit = truth - truth.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for method in methods.METHODS:
        d = methods.directions(x, labels, method, topics=topic)[1]
        cosine = np.sum(d / np.linalg.norm(d, axis=1, keepdims=True) * unit, axis=1)
        print(f"{method}: cosine with the planted direction {cosine.min():.2f} at least")
        assert cosine.min() > 0.7, method  # of the right sign, too


@pytest.mark.parametrize(
    ("change", "message"),
    [({"method": "magic"}, "known are difference, pca"), ({"labels": np.arange(240) % 6 + 1}, r"none have \[0\]"),
     ({"activations": np.zeros((240, 9))}, r"\[n, L, D\]"), ({"activations": np.full((240, 1, 2), np.nan)}, "finite")],
)  # fmt: skip
def test_methods_name_what_is_wrong(change, message):
    x, labels, *_ = planted()
    with pytest.raises(ValueError, match=message):
        methods.directions(**{"activations": x, "labels": labels, **change})


# ---- classification --------------------------------------------------------------------------------------------------


def test_ranks_count_ties_half_and_refuse_nan():
    scores = np.array([[3.0, 1, 2], [1, 1, 1], [0, 0, 5]])
    assert classification.ranks(scores, np.array([0, 1, 0])).tolist() == [0, 1, 1.5]
    with pytest.raises(ValueError, match="finite"):
        classification.ranks(scores * np.nan, np.array([0, 1, 0]))


def test_the_layer_of_a_fold_is_chosen_on_the_others_and_offsets_do_not_matter():
    x, labels, topic, truth = planted(size=4.0)
    scores = methods.project(x, np.stack([truth] * 3)) + np.random.default_rng(1).normal(0, 500, (3, 1, 6))
    z = classification.standardised(scores, topic)
    got = classification.cross_fitted(z, labels, [str(t) for t in topic], list("aabbcc"), [0, 1, 2])
    assert set(got.layers.values()) == {1} and (got.rank == 0).mean() > 0.8
    raw = classification.cross_fitted(scores / 1e3, labels, [str(t) for t in topic], list("aabbcc"), [0, 1, 2])
    assert (raw.rank == 0).mean() < 0.4, "the arg-max of raw scores is the one with the largest offset"
    # A fold's own labels have no say in its layer: another layer that is right for fold "0" alone is not taken.
    tempting = z.copy()
    tempting[2] = np.where((topic == 0)[:, None], np.eye(6)[labels] * 9, tempting[2])
    assert (
        classification.cross_fitted(tempting, labels, [str(t) for t in topic], list("aabbcc"), [0, 1, 2]).layers["0"]
        == 1
    )


def test_standardised_scores_have_no_mean_and_unit_spread_in_each_fold():
    scores = np.random.default_rng(0).normal(3, 7, (2, 30, 4))
    folds = ["x", "y", "z"] * 10
    z = classification.standardised(scores, folds)
    for at in range(3):
        assert np.allclose(z[:, at::3], scipy.stats.zscore(scores[:, at::3], axis=1))
    assert classification.fold_names(np.arange(4), ["shop", "water"] * 2) == ("shop", "water", "shop", "water")
    assert classification.fold_names(np.array([0, 0, 1, 1]), [""] * 4) == ("a", "b", "a", "b")
    assert classification.fold_names(np.arange(3), ["x", "y", "z"]) == ("a", "b", "a")


def test_a_comparison_says_how_often_each_method_is_right():
    x, labels, topic, truth = planted(size=3.0)
    folds = ["ab"[t % 2] for t in topic]
    scores = methods.project(x, np.stack([truth] * 3))
    noise = np.random.default_rng(1).standard_normal((30, 3, 240, 6))
    families = ("up", "up", "up", "down", "down", "side")
    found = classification.compare(
        "planted", "abcdef", families, labels, folds, {"directions": scores}, noise, [0, 1, 2], 4
    )
    (top1, low, high), (top5, *_), (family, *_) = found.rates("directions")
    guess = found.guesses["directions"].guess[0]
    assert top1 == np.mean(guess == labels) and low < top1 < high
    interval = scipy.stats.binomtest(int((guess == labels).sum()), 240).proportion_ci(method="wilson")
    assert (low, high) == (interval.low, interval.high)
    # The family by hand: the sum over its emotions of exp(2 z), at the layer of the text's fold.
    z, at = classification.standardised(scores, folds), found.guesses["directions"].layers
    z = np.stack([z[at[fold], i] for i, fold in enumerate(folds)])
    sums = {f: sum(np.exp(2 * z[:, e]) for e in range(6) if families[e] == f) for f in set(families)}
    likeliest = [max(sums, key=lambda f, i=i: sums[f][i]) for i in range(240)]
    assert family == np.mean([f == families[y] for f, y in zip(likeliest, labels, strict=True)]) and top5 >= top1
    mean = classification.standardised(scores, folds)[[1, 2]].mean(
        0
    )  # of 4 layers, those from a third to seven eighths up
    assert np.array_equal(found.guesses["directions, layers averaged"].guess[0], mean.argmax(1))
    assert found.confusion.sum() == 240 and found.confusion.trace() == (guess == labels).sum()
    assert np.allclose(found.confusion, _confusion(labels, guess))
    assert found.rates("majority")[:, 0].tolist() == [1 / 6, 5 / 6, 0.5]
    chance = found.rates("random directions")
    assert chance[0, 1] < 1 / 6 < chance[0, 2] and chance[0, 2] < top1
    assert np.isnan(found.by_layer[3]).all() and found.by_layer[1, 0] == found.by_layer[:3, 0].max()
    lines = found.summary().splitlines()
    assert "240 texts, 6 emotions, 3 families" in lines[0] and len(lines) == 6
    with pytest.raises(ValueError, match="one fold cannot choose"):
        classification.compare("x", "abcdef", families, labels, ["a"] * 240, {"d": scores}, noise, [0, 1, 2], 3)


def _confusion(labels, guess):
    import sklearn.metrics

    return sklearn.metrics.confusion_matrix(labels, guess)


def stories(n, seed, topics=("x", "y")):
    rng = np.random.default_rng(seed)
    names = ("glad", "low", "odd")
    made = [
        corpus.Story(names[i % 3], topics[i // 3 % len(topics)], " ".join(rng.choice(WORDS, 12)) + " " + WORDS[i % 3])
        for i in range(n)
    ]
    return corpus.Corpus(f"stories {seed}", tuple(made), ())


def test_classify_reads_the_texts_and_refuses_those_it_was_taught(lm):
    training, held = stories(12, 0), stories(12, 1)
    vectors = extraction.extract(lm, training, denoise=0, skip=5, progress=False)
    got = classification.classify(lm, vectors, held, training, skip=5, random=3, progress=False)
    assert set(got.guesses) == {
        "directions",
        "directions, layers averaged",
        "bag of words",
        "embedding table",
        "random directions",
        "majority",
    }
    assert got.folds == ("x",) * 3 + ("y",) * 3 + ("x",) * 3 + ("y",) * 3 and got.families == ("", "", "")
    # By hand, at the layers it chose: the mean residual stream of tokens 5 on, projected, standardised within a topic.
    for fold, layer in got.guesses["directions"].layers.items():
        of = [i for i, f in enumerate(got.folds) if f == fold]
        scores = []
        for i in of:
            batch = lm.tokenize(held.stories[i].text)
            raw = lm.forward(batch, capture=Capture(raw={"resid_post": [layer]})).captured.raw["resid_post"]
            scores.append(
                np.asarray(raw, np.float64)[0, 0, 5 : int(batch.lengths[0])].mean(0) @ vectors.directions[layer].T
            )
        assert np.array_equal(scipy.stats.zscore(scores).argmax(1), got.guesses["directions"].guess[0, of])
    with pytest.raises(ValueError, match="share 12 texts"):
        classification.classify(lm, vectors, training, training, skip=5, progress=False)
    strange = dataclasses.replace(held, stories=(*held.stories, corpus.Story("new", "x", "a b")))
    with pytest.raises(ValueError, match="no directions for new"):
        classification.classify(lm, vectors, strange, training, skip=5, progress=False)


# ---- logit lens ------------------------------------------------------------------------------------------------------


@pytest.fixture
def spelled(lm, monkeypatch):
    """The tiny vocabulary has only two of the words as one token; let the others stand for tokens of their own."""
    assert lens.single_tokens(lm, WORDS) == {word: lm.tokenizer.encode(" " + word)[0] for word in ("a", "the")}
    ids = {word: 40 + 3 * i for i, word in enumerate(sorted(WORDS))}
    monkeypatch.setattr(lens, "single_tokens", lambda lm, words: {w: ids[w] for w in sorted(words) if w in ids})
    return ids


def test_the_lens_is_the_final_norm_and_the_unembedding(lm, spelled):
    vectors = vectors_of(lm, ("cat", "mat", "dogs"))
    got = lens.lens(lm, vectors, layer=1, words=tuple(WORDS), random=4)
    ids = spelled
    assert set(got.words) == set(ids)
    table = np.asarray(lm.params["embed" if lm.config.tie_embeddings else "unembed"], np.float64)
    logits = (vectors.directions[1] * np.asarray(lm.params["final_norm"], np.float64)) @ table[
        [ids[w] for w in got.words]
    ].T
    for e, name in enumerate(vectors.names):
        order = [got.words[i] for i in np.argsort(-logits[e])]
        assert got.top[e] == tuple(order[:10]) and got.bottom[e] == tuple(order[::-1][:10])
        assert np.isclose(got.share[e], order.index(name) / (len(order) - 1))
    assert got.random.shape == (4, 3) and np.isfinite(got.by_layer).all()
    assert "logit lens at layer 1" in got.summary()


def test_the_lens_sees_a_word_that_a_direction_is_made_of(lm, spelled):
    ids = spelled
    table = np.asarray(lm.params["embed" if lm.config.tie_embeddings else "unembed"], np.float64)
    named = ["cat", "mat", "one", "old"]
    made = {
        w: np.stack([(table[ids[w]] - table.mean(0)) / np.asarray(lm.params["final_norm"])] * lm.config.n_layers)
        for w in named
    }
    got = lens.lens(lm, EmotionVectors.from_directions(made, np.ones(lm.config.n_layers)), words=tuple(WORDS))
    assert (got.share == 0).all() and [top[0] for top in got.top] == named
    with pytest.raises(ValueError, match="fewer than two"):
        lens.lens(lm, vectors_of(lm), words=("qwertyuiop",))


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_read_where_the_answer_begins(lm, monkeypatch):
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    x, where = prompts.before_answer(lm, ["one two", "the cat sat on"])
    assert where == "last"
    raw = lm.forward("the cat sat on", capture=Capture(raw={"resid_post": "all"})).captured.raw["resid_post"]
    n = int(lm.tokenize("the cat sat on").lengths[0])
    check_streams(x[1], np.asarray(raw)[:, 0, n - 1])
    monkeypatch.setattr(
        lm.tokenizer, "chat_template",
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
    )  # fmt: skip
    x, where = prompts.before_answer(lm, ["one two"])
    rendered = lm.tokenizer.render([{"role": "user", "content": "one two"}])
    raw = lm.forward(
        np.array([lm.tokenizer.encode(rendered)[len(lm.tokenizer.prefix) :]]),
        capture=Capture(raw={"resid_post": "all"}),
    )
    assert where == "before_answer" and rendered.endswith("<a>")
    check_streams(x[0], np.asarray(raw.captured.raw["resid_post"])[:, 0, -1])


def test_implicit_prompts_that_carry_their_direction_are_told(lm, monkeypatch):
    """Planted at layer 1: each prompt's residual stream holds its emotion's direction."""
    names = ("glad", "low", "odd", "shy")
    vectors = vectors_of(lm, names)
    records = [{"emotion": name, "prompt": f"{name} {i}"} for i in range(4) for name in names]

    def read(lm, texts, *_):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((len(texts), lm.config.n_layers, lm.config.d_model)) + 20
        x[:, 1] += [8 * vectors.directions[1, vectors.index(text.split()[0])] for text in texts]
        return x, "last"

    monkeypatch.setattr(prompts, "before_answer", read)
    got = prompts.implicit(lm, vectors, records=records, random=20, progress=False)
    assert got.hits == 4 and got.p < 0.01 and got.random_hits.mean() < 3 and got.z.shape == (4, 4)
    assert (got.z.argmax(1) == np.arange(4)).all() and set(got.guesses.guesses["directions"].layers.values()) == {1}
    assert "4 of 4 emotions largest on the diagonal" in got.summary()
    wrong = [{**r, "emotion": names[(names.index(r["emotion"]) + 1) % 4]} for r in records]
    lost = prompts.implicit(lm, vectors, records=wrong, random=20, progress=False)
    assert lost.hits == 0 and lost.p > 0.5
    with pytest.raises(ValueError, match=r"fewer for \['low'\]"):
        prompts.implicit(lm, vectors, records=records[:4] + records[4:5] + records[6:8], progress=False)


def test_number_templates_are_judged_beyond_a_harmless_count(lm, monkeypatch):
    """A reading that rises with any number is no evidence; one that rises with the dose alone is."""
    vectors = vectors_of(lm, ("afraid", "calm"))
    values = [1, 5, 20, 80, 300]
    records = [
        {"name": "pills", "kind": "dose", "template": "took {n}", "values": values, "rises": ["afraid"], "falls": ["calm"]},
        {"name": "beads", "kind": "control", "template": "count {n}", "values": values},
    ]  # fmt: skip

    def reader(dose, count):
        def read(lm, texts, *_):
            x = 0.01 * np.random.default_rng(0).standard_normal((len(texts), lm.config.n_layers, lm.config.d_model))
            afraid, calm = vectors.directions[1]
            for row, text in zip(x, texts, strict=True):
                word, n = text.split()
                row[1] += np.log(float(n)) * (dose if word == "took" else count) * (afraid - calm)
            return x, "last"

        return read

    monkeypatch.setattr(prompts, "before_answer", reader(1.0, 0.0))
    got = prompts.numbers(lm, vectors, 1, records, random=50, progress=False)
    assert got.emotions == ("afraid", "calm") and got.expected.tolist() == [1, -1]
    assert np.allclose(got.rho, 1) and (got.excess > 0.5).all() and got.p < 0.1
    assert got.random_slope.shape == (50, 2) and got.curves["pills"][1]["afraid"].shape == (5,)
    monkeypatch.setattr(prompts, "before_answer", reader(1.0, 1.0))
    counted = prompts.numbers(lm, vectors, 1, records, random=50, progress=False)
    assert np.allclose(counted.rho, 1) and np.abs(counted.excess).max() < 0.1
    assert "right sign: 2 of 2 (in the same direction under a harmless count: 2" in counted.summary()
    with pytest.raises(ValueError, match=r"'pills': a .dose. or .control."):
        prompts.numbers(lm, vectors, 1, [{**records[0], "template": "took"}, records[1]], progress=False)
    with pytest.raises(ValueError, match="need a dose that names emotions, and a control"):
        prompts.numbers(lm, vectors, 1, records[:1], progress=False)


# ---- geometry --------------------------------------------------------------------------------------------------------


def rated_vectors(L=2, D=64, seed=0):
    """Directions of rated words that hold valence most and arousal second, at layer 1; noise at layer 0."""
    rng = np.random.default_rng(seed)
    names = [row["emotion"] for row in corpus.table("glasgow_norms.csv")]
    human = np.stack([scipy.stats.zscore(geometry.human_norms(names, norm)) for norm in ("valence", "arousal")], 1)
    axes = np.linalg.qr(rng.standard_normal((D, 2)))[0].T
    x = rng.standard_normal((L, len(names), D)) * 0.1
    x[1] += human @ (axes * [[1.0], [0.6]])
    return EmotionVectors.from_directions({n: x[:, e] for e, n in enumerate(names)}, np.ones(L))


def test_components_are_set_beside_human_ratings_and_chance():
    vectors = rated_vectors()
    got, none = geometry.affect(vectors, 1), geometry.affect(vectors, 0)
    parts = geometry.components(vectors, 1, 5)
    valence = geometry.human_norms(vectors.names, "valence")
    assert got.rated == 82 and np.isclose(got.r[0], scipy.stats.pearsonr(parts.coordinates[:, 0], valence).statistic)
    assert (
        (np.abs(got.r) > 0.7).all()
        and (got.p < 0.001).all()
        and (got.best_p < 0.001).all()
        and got.best.tolist() == [0, 1]
    )
    assert (got.interval[:, 0] < got.r).all() and (got.r < got.interval[:, 1]).all()
    assert (none.best_p > none.p[none.best == none.expected].max(initial=0)).all() and np.abs(none.matrix).max() < 0.5
    assert (
        (got.decoded[:, 0] > 0.8).all()
        and (np.abs(got.random_decoded) < 0.5).all()
        and (none.decoded[:, 0] < 0.5).all()
    )
    assert got.share[0] > 3 * got.random_share[0] and "permutation p" in got.summary()
    with pytest.raises(ValueError, match="1 of 1 words are rated"):
        geometry.affect(vectors.select(["happy"]), 1)


def test_k_means_finds_planted_families():
    rng = np.random.default_rng(0)
    centres, families = rng.standard_normal((4, 32)), [f"family {i}" for i in range(4) for _ in range(6)]
    x = np.repeat(centres, 6, axis=0) + 0.2 * rng.standard_normal((24, 32))
    vectors = EmotionVectors.from_directions({f"e{i}": row[None] for i, row in enumerate(x)}, np.ones(1))
    got = geometry.clusters(vectors, 0, families, k=4)
    assert got.rand == 1 and got.p < 0.003 and got.shuffled < 0.3
    mixed = geometry.clusters(vectors, 0, families[::2] + families[1::2], k=4)
    assert abs(mixed.rand) < 0.3 and "adjusted Rand index to the 4 families" in got.summary()
    with pytest.raises(ValueError, match="k=99"):
        geometry.clusters(vectors, 0, families, k=99)


def test_similarity_of_layers_is_spearmans_of_the_cosines():
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.standard_normal((4, 12, 64)), axis=0)
    vectors = EmotionVectors.from_directions({f"e{i}": walk[:, i] for i in range(12)}, np.ones(4))
    got, pairs = geometry.similarity(vectors), np.triu_indices(12, 1)
    for i, j in itertools.combinations(range(4), 2):
        both = [geometry.cosines(vectors, at)[pairs] for at in (i, j)]
        assert np.isclose(got.rho[i, j], scipy.stats.spearmanr(*both).statistic) and got.rho[i, j] == got.rho[j, i]
    assert np.allclose(np.diag(got.rho), 1) and got.random.shape == (20, 4, 4)
    own, draws = got.overall
    assert np.isclose(own, np.mean([got.rho[i, j] for i, j in itertools.combinations(range(4), 2)]))
    assert draws.min() < own < draws.max() and draws.std() > 0.01, "these are random directions that turn"
    assert f"random directions {draws.mean():+.2f}, largest of the draws {draws.max():+.2f}" in got.summary()


def test_layers_that_keep_an_arrangement_are_told_from_directions_that_turn_as_much():
    """Twelve points in the plane, embedded in another plane at each layer: their cosines stay, the directions do not."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((12, 2))
    x = np.stack([points @ np.linalg.qr(rng.standard_normal((64, 2)))[0].T for _ in range(4)])
    vectors = EmotionVectors.from_directions({f"e{i}": x[:, i] for i in range(12)}, np.ones(4))
    own, draws = geometry.similarity(vectors).overall
    assert own > 0.999 and np.abs(draws).max() < 0.3
    with pytest.raises(ValueError, match="single layer"):
        geometry.similarity(
            dataclasses.replace(vectors, directions=vectors.directions * (np.arange(4) == 1)[:, None, None])
        )


# ---- speakers --------------------------------------------------------------------------------------------------------


def dialogues(n=36, words=5):
    names, rng = ("glad", "low", "odd"), np.random.default_rng(0)
    return [
        {
            "topic": "x", "speakers": ["Ann", "Bo"], "emotions": [names[i % 3], names[i // 3 % 3]],
            "turns": [{"speaker": t % 2, "text": " ".join(rng.choice(WORDS, words))} for t in range(4)],
        }
        for i in range(n)
    ]  # fmt: skip


def test_speakers_are_read_over_their_own_words_after_the_first_turn(lm):
    made = dialogues(2, words=3)
    x = speakers.readings(lm, made)
    for d, dialogue in enumerate(made):
        row = speakers._encoded(lm, dialogue)
        text = "\n".join(f"{dialogue['speakers'][t['speaker']]}: {t['text']}" for t in dialogue["turns"])
        assert lm.tokenizer.decode(row[len(lm.tokenizer.prefix) :]) == text
        raw = np.asarray(
            lm.forward(np.array([row]), capture=Capture(raw={"resid_post": "all"})).captured.raw["resid_post"]
        )[:, 0]
        for speaker in (0, 1):
            of = [t for t in row.turns if t.name == f"speaker {speaker}"]
            said = [turn["text"] for i, turn in enumerate(dialogue["turns"]) if turn["speaker"] == speaker and i]
            assert [lm.tokenizer.decode(row[a:b]).strip() for _, a, b in of] == said
            want = np.concatenate([raw[:, a:b] for _, a, b in of], axis=1).mean(1)
            check_streams(x[2 * d + speaker], want)
    with pytest.raises(ValueError, match="both speakers after its first turn"):
        speakers.readings(lm, [{**made[0], "turns": made[0]["turns"][:2]}])


def test_speaker_directions_are_told_from_dialogues_that_were_not_learnt_from(lm, monkeypatch):
    """Planted at layer 1: what the speaker feels on one axis an emotion, what the other feels on another; and only the first."""
    made, names = dialogues(), ["glad", "low", "odd"]
    L, D = lm.config.n_layers, lm.config.d_model
    axes = np.linalg.qr(np.random.default_rng(1).standard_normal((D, 6)))[0].T

    def reader(of_other):
        def read(lm, made, *_):
            x = np.random.default_rng(0).standard_normal((2 * len(made), L, D))
            for i, dialogue in enumerate(made):
                for s in (0, 1):
                    own, other = (names.index(dialogue["emotions"][k]) for k in (s, 1 - s))
                    x[2 * i + s, 1] += 8 * axes[own] + of_other * axes[3 + other]
            return x

        return read

    monkeypatch.setattr(speakers, "readings", reader(8))
    stories = EmotionVectors.from_directions({"low": np.stack([axes[1]] * L)}, np.ones(L))
    got = speakers.speakers(lm, made, stories, layer=1, shuffles=5)
    assert got.hits.shape == (2, 72) and (got.hits.mean(1) > 0.9).all() and (got.layers == 1).all()
    assert (got.shuffled.mean(1) < 0.6).all() and np.abs(got.cosine[1]).max() < 0.5
    assert got.stories[1, 0, 1] > 0.6 > 0.4 > abs(got.stories[1, 1, 1]) and np.isnan(got.stories[1, :, 0]).all()
    assert "cosine of present and other direction" in got.summary()
    monkeypatch.setattr(speakers, "readings", reader(0))
    alone = speakers.speakers(lm, made, layer=1, shuffles=5)
    assert alone.hits[0].mean() > 0.9 and alone.hits[1].mean() < 0.6
    with pytest.raises(ValueError, match="too few dialogues"):
        speakers.speakers(lm, made[:3])


# ---- names ------------------------------------------------------------------------------------------------------------


def test_a_bare_string_is_no_list_of_names(lm):
    vectors, c = vectors_of(lm, ("s", "a", "d")), stories(6, 0)
    number = {"name": "n", "kind": "dose", "template": "{n}", "values": [1, 2, 3], "rises": "sad"}
    said = [{**dialogue, "emotions": "sad"} for dialogue in dialogues(3)]
    for what, call in (
        ("names", lambda: vectors.select("sad")),
        ("names", lambda: dataclasses.replace(vectors, names="sad")),
        ("methods", lambda: methods.extract(lm, c, "sad", skip=5, progress=False)),
        ("texts", lambda: extraction.pooled(lm, "sad")),
        ("prompts", lambda: prompts.before_answer(lm, "sad")),
        ("rises", lambda: prompts.numbers(lm, vectors, 1, [number], progress=False)),
        ("emotions", lambda: speakers.speakers(lm, said)),
        ("words", lambda: lens.lens(lm, vectors, words="sad")),
        ("words", lambda: steering_test.word_logprobs(lm, ["a"], "sad", [None])),
        ("prefixes", lambda: steering_test.word_logprobs(lm, "sad", ["a"], [None])),
        ("families", lambda: geometry.clusters(vectors, 1, "sad", k=2)),
        ("names", lambda: geometry.human_norms("sad", "valence")),
        ("names", lambda: classification.families_of("sad")),
        ("names", lambda: validation.check("sad")),
    ):
        with pytest.raises(ValueError, match=f"{what}='sad': expected a list"):
            call()


# ---- all of it -------------------------------------------------------------------------------------------------------


def test_a_model_is_validated_in_one_call(lm, monkeypatch):
    """Every test runs on the shipped forms of records and says its numbers beside their baselines."""
    names = ("afraid", "angry", "calm", "happy", "sad", "proud", "bored", "tired", "safe", "upset")
    rng = np.random.default_rng(0)

    def made(seed, topics):
        rng = np.random.default_rng(seed)
        return tuple(corpus.Story(e, t, " ".join(rng.choice(WORDS, 12))) for e in names for t in topics)

    values = [1, 2, 3]
    records = {
        "implicit.jsonl": [
            {"emotion": e, "prompt": " ".join(rng.choice(WORDS, 4))} for e in (*names, "unheard of") for _ in "ab"
        ],
        "numbers.jsonl": [
            {"name": "a", "kind": "dose", "template": "one {n}", "values": values, "rises": ["sad"], "falls": ["calm"]},
            {"name": "b", "kind": "control", "of": "a", "template": "a {n}", "values": values},
        ],
        "dialogues.jsonl": [{k: v for k, v in d.items() if k != "speakers"} for d in dialogues(9, words=3)],
    }
    monkeypatch.setattr(corpus, "records", records.__getitem__)
    training = corpus.Corpus(
        "taught", made(0, ("x", "y", "z")), ("the cat sat on a mat and saw", "one two three old dogs run by")
    )
    heldout = corpus.Corpus("asked", (*made(1, ("u", "v")), corpus.Story("unheard of", "u", "a cat")), ())
    vectors = extraction.extract(lm, training, skip=5, progress=False)
    monkeypatch.setattr(lens, "vocabulary", lambda: frozenset(WORDS))
    m = validation.Material(lm, vectors, training, heldout, progress=False)
    got = validation.validate(m, say=lambda _: None)
    (stories,) = got.found["stories"]
    assert got.layer == stories.layer and "not denoised" in stories.guesses and not got.missing
    assert got.found["numbers"].layer == got.found["implicit"].guesses.layer
    text = got.summary()
    for what in ("asked: 20 texts, 10 emotions", "implicit prompts, read at", "number templates", "logit lens", "PCA of the directions",
                 "k-means", "similarity of layers", "speakers at layer", "self-cosine", "random directions", "bag of words"):  # fmt: skip
        assert what in text, what
