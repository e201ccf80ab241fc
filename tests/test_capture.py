"""What a forward pass returns besides logits, against the oracle."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

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
    assert {kind: list(getattr(got.captured, kind)) for kind in capture.KINDS} == {
        "raw": [], "mean": [], "norm": ["mlp_out"], "scores": [],
    }  # fmt: skip
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


def test_nan_in_the_padding_does_not_leak_into_means(tiny):
    probes = capture.resolve(tiny.config, Capture(mean={"resid_post": [1]}), BATCH)
    x = np.ones((3, 12, D), np.float32)
    x[np.arange(12) >= BATCH.lengths[:, None]] = np.nan

    @jax.jit
    def mean(x):
        layer = jax.tree.map(lambda leaf: leaf[1], probes.layers)
        sites = dict.fromkeys((*capture.SITES, "unsteered"), x)
        empty = capture.init(tiny.config, probes, x)
        return capture.collect(probes, layer, empty, sites, np.tile(np.arange(12), (3, 1))).mean["resid_post"]

    # Twelve weights of 1/12 add up to one within twelve roundings.
    np.testing.assert_allclose(mean(x), np.ones((1, 3, D)), rtol=12 * np.finfo(np.float32).eps)


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
    ],
)
def test_what_cannot_be_captured_is_refused(tiny, wanted, message):
    with pytest.raises(ValueError, match=message):
        tiny.forward(BATCH, capture=wanted)


# ---- read ------------------------------------------------------------------------------------------------------------


def test_read_scores_every_token(tiny, tokenizer, weights, close, k_of):
    lm = jaxemo.LanguageModel(tiny.config, tiny.params, tokenizer)
    vectors = SimpleNamespace(names=("a", "b", "c", "d"), directions=DIRECTIONS, layer=1)
    texts = ["héllo", "abc"]
    every, one = lm.read(texts, vectors), lm.read(texts, vectors, layer=-2)
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
