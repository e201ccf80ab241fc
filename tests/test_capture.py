"""What a forward pass returns besides logits, against the oracle."""

import statistics
from types import SimpleNamespace

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st

import jaxemo
from jaxemo import Capture, TokenBatch, capture
from jaxemo.steering import ablate, add

L, D = 3, 32
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, 256, (3, 12)).astype(np.int32)
BATCH = TokenBatch(IDS, np.array([12, 5, 9], np.int32))
VECTORS = RNG.standard_normal((2, L, D)).astype(np.float32)
DIRECTIONS = RNG.standard_normal((L, 4, D)).astype(np.float32)  # of any length: scores take them as they are
LAYERS = {"resid_pre": [2, 0], "attn_out": [1, 2], "mlp_out": [0, -1], "resid_post": [1, 0]}
STEERING = [add(VECTORS[0], 2.0, [0, 2], slice(1, None)), None, ablate(VECTORS[1], 1, keep_norm=True)]
ACTS = [
    ([oracle.Act("add", VECTORS[0].astype(float), 2.0, [0, 2], range(1, 12))], False),
    ([], False),
    ([oracle.Act("set", VECTORS[1].astype(float), 0.0, [1], range(9))], True),
]


def ask(tokens="all", layers=LAYERS, directions=DIRECTIONS):
    return Capture(raw=layers, mean=layers, norm=layers, scores=layers, directions=directions, tokens=tokens, dose=True)


def on_host(lm, capture, steering=None, batch=BATCH):
    return jax.tree.map(np.asarray, lm.forward(batch, steering, capture).captured)


@pytest.fixture(scope="module", params=["plain", "steered"])
def case(request, tiny, weights):
    """A steering and what the oracle finds for each row."""
    steered = request.param == "steered"
    given = ACTS if steered else [([], False)] * 3
    rows = zip(IDS, BATCH.lengths, given, strict=True)
    runs = [oracle.forward(tiny.config, weights, ids[:n], acts, keep_norm) for ids, n, (acts, keep_norm) in rows]
    return STEERING if steered else None, runs


def test_each_kind_at_each_site_agrees_with_the_oracle(either, case, close, k_of):
    """Layers come in the order asked for; `k_of` counts the roundings up to the logits, more than up to any site."""
    steering, runs = case
    got = on_host(either, ask(), steering)
    for row, (run, n) in enumerate(zip(runs, BATCH.lengths, strict=True)):
        k = k_of(either.config, n)
        for site, layers in LAYERS.items():
            x = run.sites[site][layers]
            size = np.abs(x).max()
            close(got.raw[site][:, row, :n], x, k, f"raw {site} of row {row}")
            close(got.mean[site][:, row], x.mean(1), k, f"mean {site} of row {row}", scale=size)
            close(got.norm[site][:, row, :n], np.linalg.norm(x, axis=-1), k, f"norm {site} of row {row}")
            scores = np.einsum("ltd,led->lte", x, DIRECTIONS[layers].astype(float))
            close(got.scores[site][:, row, :n], scores, k, f"scores {site} of row {row}")
        close(got.dose[:, row, :n], run.dose, k, f"dose of row {row}", scale=1.0)
    assert got.dose.any() == (steering is not None)


ADJUST = {"centre": RNG.standard_normal((L, D)), "cosine": True, "offset": RNG.standard_normal((L, 4)),
          "scale": RNG.standard_normal((L, 4))}  # fmt: skip


@pytest.mark.parametrize("adjust", [{}, ADJUST], ids=["projections", "centred cosines, standardised"])
def test_scores_are_reduced_over_the_selected_tokens(either, case, close, k_of, adjust):
    steering, runs = case
    layers = {"mlp_out": [0, -1], "resid_post": [1, 0]}
    wanted = dict.fromkeys(("scores", "mean_norm", "pooled", "top"), layers)
    got = on_host(either, Capture(**wanted, **adjust, directions=DIRECTIONS, tokens=slice(1, None), k=3), steering)
    k = k_of(either.config, 12)
    for site, numbers in layers.items():
        every, places = np.full((2, 4, 3 * 12), -np.inf), []
        for row, (run, n) in enumerate(zip(runs, BATCH.lengths, strict=True)):
            x = run.sites[site][numbers]
            norm = np.linalg.norm(x, axis=-1)
            close(got.mean_norm[site][:, row], norm[:, 1:].mean(1), k, f"mean norm {site} of row {row}")
            if adjust:
                x = x - ADJUST["centre"][numbers][:, None]
                x = x / np.linalg.norm(x, axis=-1, keepdims=True)
            scores = np.einsum("ltd,led->lte", x, DIRECTIONS[numbers].astype(float))
            if adjust:
                scores = (scores - ADJUST["offset"][numbers][:, None]) * ADJUST["scale"][numbers][:, None]
            close(got.scores[site][:, row, :n], scores, k, f"scores {site} of row {row}", scale=np.abs(scores).max())
            close(got.pooled[site][:, row], scores[:, 1:].mean(1), k, f"pooled {site}", scale=np.abs(scores).max())
            every[:, :, row * 12 + 1 : row * 12 + n] = scores[:, 1:].transpose(0, 2, 1)
        best, places = got.top[site]
        close(best, -np.sort(-every)[..., :3], k, f"best {site}", scale=np.abs(every[np.isfinite(every)]).max())
        close(best, np.take_along_axis(every, places, axis=-1), k, f"places {site}", scale=np.abs(best).max())


@pytest.mark.parametrize("tokens", ["all", "prompt", "last", slice(2, None), slice(-4, -1), [0, 2, 4], -2], ids=str)
def test_means_run_over_the_selected_tokens(tiny, case, close, k_of, tokens):
    steering, runs = case
    got = on_host(tiny, ask(tokens), steering)
    for row, run in enumerate(runs):
        for site, layers in LAYERS.items():
            x = run.sites[site][layers]
            picked = {"all": x, "prompt": x, "last": x[:, -1:]}[tokens] if isinstance(tokens, str) else x[:, tokens]
            want = picked.mean(1) if picked.ndim == 3 else picked
            close(got.mean[site][:, row], want, k_of(tiny.config, 12), f"{site} of row {row}", scale=np.abs(x).max())


def test_only_what_is_asked_for_is_returned(tiny):
    got = tiny.forward(BATCH, capture=Capture(norm={"mlp_out": 1}), logits=None)
    assert got.logits is None
    assert [kind for kind in capture.KINDS if getattr(got.captured, kind)] == ["norm"]
    assert list(got.captured.norm) == ["mlp_out"]
    assert got.captured.norm["mlp_out"].shape == (1, 3, 12) and got.captured.dose is None
    got = tiny.forward(BATCH, capture=Capture(dose=True))
    assert got.captured.dose.shape == (L, 3, 12) and not any(getattr(got.captured, kind) for kind in capture.KINDS)
    assert tiny.forward(BATCH).captured is None


def test_capturing_changes_nothing(either, close, k_of):
    a = either.forward(BATCH, STEERING, ask()).logits
    close(a, either.forward(BATCH, STEERING).logits, k_of(either.config, 12), "logits with capture against without")


def test_raw_keeps_the_models_type(model_of):
    lm = model_of(dtype="bfloat16", n_layers=1)
    layers = {"resid_post": [0]}
    got = lm.forward(IDS, capture=Capture(raw=layers, norm=layers, mean=layers), logits=None).captured
    assert got.raw["resid_post"].dtype == jnp.bfloat16
    assert got.norm["resid_post"].dtype == got.mean["resid_post"].dtype == jnp.float32


def reduced(config, wanted, x):
    """What `wanted` makes of residuals `x [B, T, D]` of layer 1."""
    probes = capture.resolve(config, wanted, BATCH)

    @jax.jit
    def run(x):
        layer = jax.tree.map(lambda leaf: leaf[1], probes.layers)
        sites = dict.fromkeys((*capture.SITES, "unsteered"), x)
        return capture.collect(probes, layer, capture.init(config, probes, x), sites, np.tile(np.arange(12), (3, 1)))

    return jax.tree.map(np.asarray, run(x))


def test_nan_in_the_padding_does_not_leak_into_means(tiny):
    x = np.ones((3, 12, D), np.float32)
    x[np.arange(12) >= BATCH.lengths[:, None]] = np.nan
    one = {"resid_post": [1]}
    for sinks in (True, False):
        wanted = Capture(mean=one, mean_norm=one, pooled=one, top=one, directions=DIRECTIONS, sinks=sinks)
        got = reduced(tiny.config, wanted, x)
        # Twelve weights of 1/12 add up to one within twelve roundings.
        eps = 12 * np.finfo(np.float32).eps
        np.testing.assert_allclose(got.mean["resid_post"], np.ones((1, 3, D)), rtol=eps)
        np.testing.assert_allclose(got.mean_norm["resid_post"], np.full((1, 3), np.sqrt(D)), rtol=eps)
        assert np.isfinite(got.pooled["resid_post"]).all() and np.isfinite(got.top["resid_post"][0]).all()


def test_means_leave_attention_sinks_out(tiny):
    """A first token a thousand times as long as the rest, and one of those in the middle."""
    x = np.random.default_rng(3).standard_normal((3, 12, D)).astype(np.float32)
    x[:, 0] *= 1000
    x[1, 3] *= 100
    one = {"resid_post": [1]}
    kept = [[t for t in range(n) if t and (row, t) != (1, 3)] for row, n in enumerate(BATCH.lengths)]
    ask = Capture(mean=one, mean_norm=one, pooled=one, directions=DIRECTIONS, sinks=False)
    got = reduced(tiny.config, ask, x)
    for row, at in enumerate(kept):
        mean = x[row, at].mean(0)
        np.testing.assert_allclose(got.mean["resid_post"][0, row], mean, atol=1e-5)
        np.testing.assert_allclose(
            got.mean_norm["resid_post"][0, row], np.linalg.norm(x[row, at], axis=-1).mean(), rtol=1e-5
        )
        np.testing.assert_allclose(got.pooled["resid_post"][0, row], DIRECTIONS[1] @ mean, atol=1e-4)
    alone = reduced(tiny.config, Capture(mean=one, tokens=0, sinks=False), x)
    np.testing.assert_allclose(
        alone.mean["resid_post"][0], x[:, 0], rtol=1e-5, err_msg="read where nothing else is asked for"
    )


SIZES = st.lists(st.lists(st.floats(0.1, 1e5), min_size=1, max_size=9), min_size=3, max_size=3)


@hypothesis.given(norms=SIZES, first=st.integers(0, 4))
def test_a_sink_is_ten_times_its_rows_median(norms, first):
    norm = np.full((3, 12), np.nan, np.float32)  # padding holds anything
    for i, row in enumerate(norms):
        norm[i, : len(row)] = row
    spans = np.array([[[first, 9], [10, 12]]] * 3, np.int32)
    got = np.asarray(jax.jit(capture.ordinary)(spans, norm, np.array([len(row) for row in norms], np.int32)))
    for i, row in enumerate(norms):
        row = norm[i, : len(row)].tolist()
        limit = np.float32(10) * np.float32(statistics.median_low(row))
        sinks = sorted((t for t in range(len(row)) if row[t] > limit), key=lambda t: (-row[t], t))[:4]
        want = [t for t in range(first, len(row)) if t not in sinks] or list(range(first, len(row)))
        assert sorted({t for start, stop in got[i] for t in range(start, stop) if t < len(row)}) == want


def test_one_compilation_for_every_choice_of_layers_tokens_and_directions(tiny, compiles):
    rng = np.random.default_rng(1)
    selections = ["all", "prompt", "last", slice(2, None), slice(-3, None), 1, [0, 2, 4], [1, 2]]

    def random_capture():
        layers = {site: rng.permutation(L)[:2].tolist() for site in LAYERS}
        return ask(selections[rng.integers(8)], layers, rng.standard_normal((L, 4, D)).astype(np.float32))

    def random_batch():
        # A width of its own: no other test has compiled a program that this one should not need.
        return TokenBatch(rng.integers(1, 256, (3, 13)).astype(np.int32), rng.integers(5, 14, 3).astype(np.int32))

    tiny.forward(random_batch(), STEERING, random_capture())
    before = compiles.count
    for _ in range(50):
        tiny.forward(random_batch(), STEERING, random_capture())
    assert compiles.count == before, f"{compiles.count - before} programs compiled"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Capture(), "asks for nothing"),
        (Capture(tokens="last"), "asks for nothing"),
        (
            Capture(raw={"resid_mid": [0]}),
            r"Capture\(raw=...\): unknown site 'resid_mid'; sites are resid_pre, attn_out",
        ),
        (Capture(mean={"resid_post": [3]}), "layer 3 does not exist"),
        (Capture(norm={"resid_post": [1, 1]}), "name a layer twice"),
        (Capture(norm={"resid_post": []}), "no layers given"),
        (Capture(mean={"resid_post": [0]}, tokens="generated"), "'generated' is empty"),
        (Capture(mean={"resid_post": [0]}, tokens=7), "position 7 is outside this row's 5 tokens"),
        (Capture(scores={"resid_post": [0]}), r"needs directions \[L=3, E, D=32\], got none"),
        (Capture(scores={"resid_post": [0]}, directions=DIRECTIONS[0]), r"got \[4, 32\]"),
        (Capture(scores={"resid_post": [0]}, directions=DIRECTIONS[:2]), r"got \[2, 4, 32\]"),
        (Capture(pooled={"resid_post": [0]}), r"Capture\(pooled=...\) needs directions"),
        (Capture(norm={"resid_post": [0]}, cosine=True), "has cosine but asks for no scores"),
        (Capture(norm={"resid_post": [0]}, directions=DIRECTIONS), "has directions but asks for no scores"),
        (
            Capture(scores={"resid_post": [0]}, directions=DIRECTIONS, centre=np.zeros((3, 4))),
            r"centre \[L=3, D\], got \[3, 4\]",
        ),
        (
            Capture(scores={"resid_post": [0]}, directions=DIRECTIONS, offset=np.zeros(4)),
            r"offset \[L=3, E\], got \[4\]",
        ),
        (Capture(top={"resid_post": [0]}, directions=DIRECTIONS, k=0), r"Capture\(k=0\)"),
    ],
)
def test_what_cannot_be_captured_is_refused(tiny, wanted, message):
    with pytest.raises(ValueError, match=message):
        tiny.forward(BATCH, capture=wanted)


# ---- read ------------------------------------------------------------------------------------------------------------


def test_read_scores_every_token(tiny, tokenizer, weights, close, k_of):
    lm = jaxemo.LanguageModel(tiny.config, tiny.params, tokenizer)
    neutral = {"neutral_mean": RNG.standard_normal((L, 4)), "neutral_std": RNG.uniform(0.5, 2, (L, 4))}
    vectors = SimpleNamespace(names=("a", "b", "c", "d"), directions=DIRECTIONS, layer=1, **neutral)
    texts = ["héllo", "abc"]
    every, one = lm.read(texts, vectors), lm.read(texts, vectors, layer=-2)
    cosine, standard, centred = (lm.read(texts, vectors, kind=kind) for kind in ("cosine", "z", "centred"))
    means = [oracle.forward(lm.config, weights, tokenizer.encode(t)).sites["resid_post"].mean(1) for t in texts]
    mean = np.mean(means, axis=0)  # of the texts, each as much as another
    with pytest.raises(ValueError, match="kind='zz'; expected one of projection, z, cosine, centred"):
        lm.read(texts, vectors, kind="zz")
    assert every.names == vectors.names
    assert [len(words) for words in every.tokens] == every.lengths.tolist() == [6, 3]
    assert every.tokens[1] == ["a", "b", "c"]
    k = k_of(lm.config, 8)
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text)
        x = oracle.forward(lm.config, weights, ids).sites["resid_post"]
        scores = np.einsum("ltd,led->lte", x, DIRECTIONS.astype(float))
        close(every.scores[:, row, : len(ids)], scores, k, f"scores of {text}")
        close(every.pooled[:, row], scores.mean(1), k, f"pooled scores of {text}", scale=np.abs(scores).max())
        close(one.scores[row, : len(ids)], scores[1], k, f"scores of {text} at one layer")
        unit = scores / np.linalg.norm(x, axis=-1, keepdims=True)
        close(cosine.scores[:, row, : len(ids)], unit, k, f"cosines of {text}", scale=1.0)
        z = (scores - vectors.neutral_mean[:, None]) / vectors.neutral_std[:, None]
        close(standard.scores[:, row, : len(ids)], z, k, f"z of {text}", scale=np.abs(z).max())
        x = x - mean[:, None]
        unit = np.einsum("ltd,led->lte", x, DIRECTIONS.astype(float)) / np.linalg.norm(x, axis=-1, keepdims=True)
        close(centred.scores[:, row, : len(ids)], unit, 4 * k, f"centred cosines of {text}", scale=1.0)
        close(centred.pooled[:, row], unit.mean(1), 4 * k, f"centred cosines of {text}", scale=1.0)
        close(
            one.pooled[row], scores[1].mean(0), k, f"pooled scores of {text} at one layer", scale=np.abs(scores).max()
        )
        assert not every.scores[:, row, len(ids) :].any()
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        lm.read(texts, vectors, layer=3)


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<>' if add_generation_prompt }}"
TALK = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "de"}]


def test_turns_are_read_by_name(tiny, make_tokenizer, close):
    """Means and pooled scores over turns, against those over the tokens that spell them; plain texts have no turns."""
    lm = jaxemo.LanguageModel(tiny.config, tiny.params, make_tokenizer(chat_template=TEMPLATE))
    vectors = SimpleNamespace(names=("a", "b", "c", "d"), directions=DIRECTIONS, layer=1)
    batch = lm.tokenize([TALK, TALK[:1]])
    users = Capture(raw={"resid_post": [1]}, mean={"resid_post": [1]}, tokens="user")
    got = lm.forward(batch, capture=users).captured
    reading, before = lm.read(batch, vectors, layer=1, tokens="user"), lm.read(batch, vectors, tokens="before_answer")
    text = lm.tokenizer.render(TALK)  # a token a character
    ab, de = text.index(">ab<") + 1, text.index(">de<") + 1
    for row, at in enumerate(([ab, ab + 1, de, de + 1], [ab, ab + 1])):
        mean = np.asarray(got.raw["resid_post"], np.float64)[0, row, at].mean(0)
        close(got.mean["resid_post"][0, row], mean, 16, f"mean in row {row}")
        close(reading.pooled[row], reading.scores[row, at].mean(0), 16, f"pooled in row {row}")
        assert np.array_equal(before.pooled[:, row], before.scores[:, row, batch.lengths[row] - 1])
    with pytest.raises(ValueError, match=r"'user' \(row 1\).*not made from a chat"):
        lm.read([TALK, "plain"], vectors, tokens="user")
    with pytest.raises(ValueError, match=r"'assistant' \(row 1\).*this row has the turns user \(turn:0\)"):
        lm.forward(batch, capture=Capture(mean={"resid_post": [1]}, tokens="assistant"))
