"""The decode loop: steering by absolute position, sampling by row, readout, stops, streams."""

from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import oracle
import pytest
import scipy.stats

import jaxemo
from jaxemo import Steering, TokenBatch, generate
from jaxemo.language_model import sampling_of as _sampling
from jaxemo.steering import ablate, add, clamp

L, D, NEW = 3, 32, 8
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, 256, (3, 8)).astype(np.int32)
PROMPTS = TokenBatch(IDS * (np.arange(8) < [[3], [8], [6]]), np.array([3, 8, 6], np.int32))
VECTORS = RNG.standard_normal((3, L, D)).astype(np.float32)
READ = SimpleNamespace(names=("a", "b"), directions=RNG.standard_normal((L, 2, D)).astype(np.float32), layer=1)
NONE = [None] * 3


def run(lm, steering=NONE, prompts=PROMPTS, **kwargs):
    """Every generation here reads, and is steered if only by nothing: a few programs serve all tests."""
    return lm.generate(prompts, steering, **{"max_new_tokens": NEW, "read": READ, "stop": [], **kwargs})


def chosen(rows):
    """Some of the prompts, in another order, without the padding that they do not need."""
    return TokenBatch(PROMPTS.ids[rows, : PROMPTS.lengths[rows].max()], PROMPTS.lengths[rows])


def acts(tokens):
    """One kind of steering a row, each on its own selection."""
    return [
        add(VECTORS[0], 2.0, tokens=tokens[0]),
        clamp(VECTORS[1], 2.5, [0, 2], tokens[1]),
        ablate(VECTORS[2], tokens=tokens[2]) + add(VECTORS[0], -1.0, 1, tokens[2], keep_norm=True),
    ]


def absolute(selection, length, total):
    """The positions that a selection names in a row of `length` prompt tokens that has grown to `total`."""
    row = list(range(total))
    if isinstance(selection, str):
        return {"all": row, "prompt": row[:length], "generated": row[length:], "last": [length - 1]}[selection]
    if isinstance(selection, slice):
        return [t for t in row if (selection.start is None or t >= selection.start + length * (selection.start < 0))
                and (selection.stop is None or t < selection.stop + length * (selection.stop < 0))]  # fmt: skip
    return [p + length if p < 0 else p for p in np.atleast_1d(selection).tolist()]


def uncached(lm, generation, steering):
    """Logits, scores and log-probabilities of prompts and generated tokens, read again in one pass without a cache."""
    ids = np.zeros((3, 16), np.int32)
    for row, n in enumerate(PROMPTS.lengths):
        ids[row, :n], ids[row, n : n + NEW] = PROMPTS.ids[row, :n], generation.tokens[row]
    batch = TokenBatch(ids, PROMPTS.lengths + NEW)
    capture = jaxemo.Capture(scores={"resid_post": [READ.layer]}, directions=READ.directions)
    out = lm.forward(batch, steering, capture)
    return (
        np.asarray(out.logits),
        np.asarray(out.captured.scores["resid_post"])[0],
        np.asarray(lm.logprobs(batch, steering)),
    )


# ---- rule 2: the same tokens with and without a cache ----------------------------------------------------------------


@pytest.mark.parametrize(
    "selections",
    [
        (slice(5, None),) * 3,
        ("all", "all", "all"),
        ("prompt", "generated", "last"),
        ("generated", "last", "prompt"),
        ([1, 9], slice(-2, None), -1),
        (slice(2, 7), slice(None, -3), [4, 5, 6, 7]),
        (8, 0, slice(-4, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_selection_means_the_same_tokens_in_generation_and_afterwards(either, close, k_of, selections, temperature):
    """Generated once, then read again as one text, steered at absolute positions: logprobs and scores are equal."""
    lengths = PROMPTS.lengths.tolist()
    got = run(either, acts(selections), temperature=temperature)
    again = acts([absolute(s, n, n + NEW) for s, n in zip(selections, lengths, strict=True)])
    logits, scores, logprobs = uncached(either, got, again)
    _, unsteered, _ = uncached(either, got, NONE)
    k = 2 * k_of(either.config, 16)
    for row, n in enumerate(lengths):
        here = slice(n, n + NEW)
        if temperature == 0:
            assert got.tokens[row].tolist() == logits[row, n - 1 : n - 1 + NEW].argmax(-1).tolist()
        close(got.logprobs[row], logprobs[row, here], k, f"logprobs of row {row}", scale=np.abs(logits).max())
        close(got.scores[row], scores[row, here], k, f"scores of row {row}")
        # Steering a token changes it and what comes after it, and nothing before.
        moved = np.abs(scores[row] - unsteered[row]).max(-1)[: n + NEW] > 1e-3
        assert moved.argmax() == absolute(selections[row], n, n + NEW)[0]
        want = oracle.log_softmax(logits[row].astype(np.float64))[np.arange(n - 1, n - 1 + NEW), got.tokens[row]]
        close(logprobs[row, here], want, k, f"log-softmax of row {row}", scale=np.abs(logits).max())


def test_steering_what_is_generated_leaves_the_prompt_alone(either):
    """The first token comes from the unsteered prompt."""
    got, plain = run(either, add(VECTORS[0], 9.0, tokens="generated")), run(either)
    np.testing.assert_array_equal(got.tokens[:, 0], plain.tokens[:, 0])
    np.testing.assert_array_equal(got.logprobs[:, 0], plain.logprobs[:, 0])
    assert (got.tokens[:, 1:] != plain.tokens[:, 1:]).any(1).all()


def test_selections_beyond_the_last_token_are_refused(either):
    for tokens in (slice(14, None), [14], 14):
        with pytest.raises(ValueError, match=r"row's 11 tokens|a row of 3 prompt tokens and 8 to be"):
            run(either, add(VECTORS[0], 1.0, tokens=tokens))


def test_generation_agrees_with_the_oracle(tiny, weights, close, k_of):
    got = run(tiny, add(VECTORS[0], 2.0, [0, 2], slice(5, None)))
    for row, n in enumerate(PROMPTS.lengths.tolist()):
        ids = [*PROMPTS.ids[row, :n], *got.tokens[row]]
        act = oracle.Act("add", VECTORS[0].astype(float), 2.0, [0, 2], range(5, len(ids)))
        found = oracle.forward(tiny.config, weights, ids, [act])
        assert found.logits[n - 1 : -1].argmax(-1).tolist() == got.tokens[row].tolist()
        scores = found.sites["resid_post"][1, n:] @ READ.directions[1].astype(float).T
        close(got.scores[row], scores, k_of(tiny.config, len(ids)), f"scores of row {row}")


# ---- rules 1 and 7: a row does not depend on what shares its batch ---------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_row_is_the_same_whatever_shares_the_batch_and_wherever_it_stands(either, close, k_of, temperature):
    """Each row has a seed of its own. Tokens are equal; logprobs and scores to twice the roundings of a pass."""
    steering, seeds = acts([slice(5, None), "all", "generated"]), [11, 5, 8]
    together = run(either, steering, temperature=temperature, seed=seeds)
    for order in ([1, 2, 0], [2, 2, 1], [0]):
        got = run(
            either, [steering[i] for i in order], chosen(order), temperature=temperature, seed=[seeds[i] for i in order]
        )
        for row, i in enumerate(order):
            assert got.tokens[row].tolist() == together.tokens[i].tolist(), f"row {i} at place {row} of {order}"
            k, size = 2 * k_of(either.config, 16), 10.0  # no logit is larger
            close(got.logprobs[row], together.logprobs[i], k, f"logprobs of row {i} in {order}", scale=size)
            close(got.scores[row], together.scores[i], k, f"scores of row {i} in {order}")


def test_one_seed_gives_each_place_its_own_draws(tiny):
    same = TokenBatch(PROMPTS.ids[[1, 1, 1]], PROMPTS.lengths[[1, 1, 1]])
    first = run(tiny, prompts=same, temperature=1.0, seed=3).tokens
    assert len({tuple(row) for row in first}) == 3
    np.testing.assert_array_equal(run(tiny, prompts=same, temperature=1.0, seed=3).tokens, first)
    assert (run(tiny, prompts=same, temperature=1.0, seed=4).tokens != first).any(1).all()
    # Each token has a draw of its own: nearly uniform ones repeat rarely.
    hot = run(tiny, prompts=same, temperature=1000.0, seed=3).tokens
    assert all(len(set(row)) > NEW - 3 for row in hot.tolist())
    # The row in the middle stays as it is when its neighbours change.
    other = run(tiny, prompts=chosen([0, 1, 2]), temperature=[2.0, 1.0, 0.0], seed=3, top_k=[2, 0, 0])
    assert other.tokens[1].tolist() == first[1].tolist()
    # Rows with equal seeds and prompts draw the same; a list of one number differs from that number.
    twins = run(tiny, prompts=same, temperature=1.0, seed=[3, 3, 4]).tokens
    assert twins[0].tolist() == twins[1].tolist() != twins[2].tolist()


def test_temperatures_are_per_row(either):
    greedy, hot = run(either).tokens, run(either, temperature=1.5, seed=1).tokens
    got = run(either, temperature=[0.0, 1.5, 0.0], seed=1).tokens
    np.testing.assert_array_equal(got, np.stack([greedy[0], hot[1], greedy[2]]))
    assert (greedy != hot).any(1).all()
    for narrow in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"top_p": [0.0] * 3, "top_k": [1, 5, 1]}):
        np.testing.assert_array_equal(run(either, temperature=1.5, **narrow).tokens, greedy)  # only the best is left


def test_stacked_layers_generate_the_same(tiny, tiny_stacked):
    for temperature in (0.0, 1.0):
        a, b = (run(lm, acts(["all"] * 3), temperature=temperature).tokens for lm in (tiny, tiny_stacked))
        np.testing.assert_array_equal(a, b)


# ---- sampling --------------------------------------------------------------------------------------------------------


def softmax(x):
    return np.exp(oracle.log_softmax(x))


def warp(logits, temperature, top_k, top_p, min_p):
    """One row in float64, filter by filter as transformers' logits processors do it, and its distance from a change."""
    x, margin = logits / temperature, np.inf
    if top_k:
        x = np.where(x < np.sort(x)[-min(top_k, len(x))], -np.inf, x)
    if top_p < 1:
        order = np.argsort(x)
        cumulative = softmax(x)[order].cumsum()
        removed = cumulative <= 1 - top_p
        removed[-1] = False
        margin = np.abs(cumulative[:-1] - (1 - top_p)).min()
        x[order[removed]] = -np.inf
    if min_p:
        p = softmax(x)
        margin = min(margin, np.abs(np.delete(p, p.argmax()) - min_p * p.max()).min())
        x = np.where((p < min_p * p.max()) & (p < p.max()), -np.inf, x)
    return x, margin


filter_logits = jax.jit(generate.filter_logits)
settings = st.tuples(
    st.sampled_from([0.3, 1.0, 2.5]), st.integers(0, 20), st.floats(0, 1, width=32), st.floats(0, 1, width=32)
)  # fmt: skip


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.lists(settings, min_size=4, max_size=4), st.integers(0, 1000))
def test_filters_are_those_of_transformers(rows, seed):
    logits = 2 * np.random.default_rng(seed).standard_normal((4, 17)).astype(np.float32)
    temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*rows, strict=True))
    scaled = (logits / temperature[:, None]).astype(np.float32)
    got = np.asarray(filter_logits(scaled, top_k, top_p.astype(np.float32), min_p.astype(np.float32)))
    for row in range(4):
        want, margin = warp(scaled[row].astype(np.float64), 1.0, top_k[row], top_p[row], min_p[row])
        if margin > 1e-5:  # closer than float32 sums of 17 probabilities can tell
            assert (got[row] > -np.inf).tolist() == (want > -np.inf).tolist()
        np.testing.assert_array_equal(got[row][got[row] > -np.inf], scaled[row][got[row] > -np.inf])


def test_ties_at_the_edge_are_kept():
    logits = np.array([[1.0, 3.0, 2.0, 2.0, 0.0]] * 2, np.float32)
    got = filter_logits(logits, np.array([2, 0]), np.array([1.0, 1.0], np.float32), np.array([0.0, 0.3], np.float32))
    assert (np.asarray(got) > -np.inf).tolist() == [[False, True, True, True, False]] * 2


@pytest.mark.parametrize("options", [(1.0, 0, 1.0, 0.0), (0.7, 5, 0.9, 0.05), (2.0, 0, 0.6, 0.0)], ids=str)
def test_draws_follow_the_filtered_distribution(options):
    """20,000 rows with the seeds 0, 1, 2, ...: Pearson's χ² below its 99.9% quantile."""
    n, likely = 20_000, np.array([0, 100, 255, 256, 400, 511, 599])
    logits = np.full(600, -60, np.float32)
    logits[likely] = [2.0, 0.5, 1.0, -1.0, 1.5, 0.0, -3.0]
    sampling = _sampling(n, *options, seed=np.arange(n))
    token, logprob = jax.jit(generate.sample)(np.tile(logits, (n, 1)), sampling, np.full(n, 7, np.int32))
    p = softmax(warp(logits.astype(np.float64), *options)[0])
    counts = np.bincount(token, minlength=600)
    kept = p > 1e-9
    assert not counts[~kept].any()
    chi2 = ((counts - n * p)[kept] ** 2 / (n * p)[kept]).sum()
    bound = scipy.stats.chi2.ppf(0.999, kept.sum() - 1)
    print(f"χ² {chi2:.1f}, bound {bound:.1f}")
    assert chi2 < bound
    np.testing.assert_allclose(
        logprob, oracle.log_softmax(logits.astype(np.float64))[token], atol=1e-6
    )  # of 3, in float32


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_its_row_and_is_not_kept(either):
    free = run(either)
    stop = int(free.tokens[1, 3])
    ends = [row.index(stop) if stop in row else NEW for row in free.tokens.tolist()]
    got = run(either, stop=[stop])
    assert got.lengths.tolist() == ends and min(ends) < NEW
    for row, end in enumerate(ends):
        for name in ("tokens", "logprobs", "scores"):
            np.testing.assert_array_equal(getattr(got, name)[row, :end], getattr(free, name)[row, :end])
            assert not getattr(got, name)[row, end:].any()
    first = run(either, stop=free.tokens[:, 0].tolist())
    assert first.lengths.tolist() == [0, 0, 0] and not first.tokens.any() and first.tokens.shape == (3, NEW)


def test_lengths_and_shapes(tiny):
    got = run(tiny, max_new_tokens=5)
    assert got.texts is None and got.lengths.tolist() == [5] * 3
    assert got.tokens.shape == got.logprobs.shape == (3, 5) and got.scores.shape == (3, 5, 2)
    np.testing.assert_array_equal(got.tokens, run(tiny).tokens[:, :5])


def test_one_compilation_for_every_value(tiny, compiles):
    """50 changes of prompts, steering, readout, sampling, seeds, stops and number of tokens: not one program more."""
    rng = np.random.default_rng(3)

    def random_run(i):
        selections = ["all", "prompt", "generated", "last", slice(2, None), slice(-2, 9), 3, [1, 2, 3]]
        spec = [
            [add, clamp][rng.integers(2)](v, rng.normal(), rng.permutation(L)[:2].tolist(), selections[rng.integers(8)])
            for v in VECTORS[rng.integers(3, size=3)]
        ]
        # A width of its own: no other test has compiled a program that this one should not need.
        prompts = TokenBatch(rng.integers(1, 256, (3, 9)).astype(np.int32), rng.integers(4, 10, 3).astype(np.int32))
        read = SimpleNamespace(directions=rng.standard_normal((L, 2, D)).astype(np.float32), layer=int(rng.integers(L)))
        options = {
            "temperature": rng.random(3) * 2,
            "top_k": rng.integers(0, 9, 3),
            "top_p": rng.random(),
            "min_p": 0.01,
        }
        seed = i if i % 2 else [i, i + 1, i + 2]
        stop, new = rng.integers(1, 256, rng.integers(0, 8)).tolist(), int(rng.integers(2, NEW + 1))
        return run(tiny, spec, prompts, read=read, seed=seed, stop=stop, max_new_tokens=new, **options)

    random_run(0), random_run(1)  # one seed for all and seeds of their own make their keys in different ways
    before, seen = compiles.count, set()
    for i in range(50):
        seen.add(random_run(i).scores.tobytes())
    assert len(seen) == 50
    assert compiles.count == before, f"{compiles.count - before} programs compiled"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 57}, "8 prompt tokens and 57 new ones exceed the model's 64 positions"),
        ({"temperature": -0.5}, "temperature=-0.5: expected a number from 0 to inf, or 3"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": [1.0, 0.0]}, r"temperature=\[1.0, 0.0\]: .* or 3 of them"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 1.5}, "top_p=1.5: expected a number from 0 to 1"),
        ({"min_p": [0.1, -0.1, 0.2]}, "min_p="),
        ({"seed": [1, 2]}, "seed=.1, 2.: expected a whole number from 0 to 4294967295, or 3 of them"),
        ({"seed": -1}, "seed=-1: expected a whole number"),
        ({"top_k": 2.7}, "top_k=2.7: expected a whole number"),
        ({"layer": 3}, "layer 3 does not exist"),
        ({"stop": ["end"]}, "no tokenizer"),
        ({"stream": print}, "no tokenizer"),
        ({"prompts": ["a text"]}, "no tokenizer"),
        ({"prompts": np.array([[1, 263]])}, "token id 263 is outside the vocabulary of 263"),
        ({"prompts": np.ones((3, 65), int)}, "a row has 65 tokens; the model was made for 64"),
        ({"steering": [None]}, "1 steerings for 3 rows"),
    ],
)
def test_bad_arguments_are_refused(tiny, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(tiny, **kwargs)


# ---- texts -----------------------------------------------------------------------------------------------------------

STO, PX, END = 259, 260, 257  # "sto", "p!x" and the end token
CHAINS = [  # token follows token; no two tokens are the same
    [ord("a"), *"bcdé中ef".encode(), END],
    [ord("g"), *"h😀ijklqrst".encode()],
    [ord("m"), STO, PX, *b"nopuvwxyz"],
]


@pytest.fixture(scope="module")
def parrot(model_of, tokenizer):
    """A model that says the chains: its layers do nothing, and a token's embedding is its successor's unembedding."""
    lm = model_of(n_layers=1, tie_embeddings=False, tokenizer=tokenizer)
    embed = np.random.default_rng(0).standard_normal(lm.params["embed"].shape)
    embed /= np.linalg.norm(embed, axis=1, keepdims=True)
    unembed = np.zeros_like(embed)
    for chain in CHAINS:
        for token, successor in zip(chain, [*chain[1:], chain[-1]], strict=True):
            unembed[successor] = embed[token] if token != successor else unembed[successor] + embed[token]
    layer = {name: leaf if "norm" in name else 0 * leaf for name, leaf in lm.params["layers"][0].items()}
    arrays = {"embed": embed, "unembed": 10 * unembed, "final_norm": np.ones(32)}
    params = {name: jax.numpy.asarray(array, "float32") for name, array in arrays.items()}
    return jaxemo.LanguageModel(lm.config, {**params, "layers": (layer,)}, tokenizer)


def speak(parrot, stop=None, **kwargs):
    """Generate, streamed and at once, and check that both say the same. Returns texts, pieces and the Generation."""
    calls = []
    vectors = SimpleNamespace(directions=READ.directions[:1], layer=0)
    options = {"max_new_tokens": 10, "stop": stop, "read": vectors, **kwargs}
    streamed = parrot.generate(["a", "g", "m"], stream=calls.append, **options)
    got = parrot.generate(["a", "g", "m"], **options)
    assert got.texts == streamed.texts
    for name in ("tokens", "lengths", "logprobs", "scores"):
        np.testing.assert_array_equal(getattr(got, name), getattr(streamed, name))
    assert ["".join(pieces) for pieces in zip(*calls, strict=True)] == got.texts
    for row, n in enumerate(got.lengths):
        assert not got.tokens[row, n:].any() and not got.logprobs[row, n:].any() and not got.scores[row, n:].any()
        assert got.scores[row, :n].all()
        assert parrot.tokenizer.decode(got.tokens[row, :n]).startswith(got.texts[row])
    return got, calls


def test_streams_hold_back_half_characters(parrot):
    got, calls = speak(parrot)
    assert got.texts == ["bcdé中ef", "h😀ijklq", "stop!xnopuvwxy"]
    assert got.lengths.tolist() == [10, 10, 10]
    assert len(calls) == 10
    assert [pieces[0] for pieces in calls] == ["b", "c", "d", "", "é", "", "", "中", "e", "f"]
    assert [pieces[1] for pieces in calls[:6]] == ["h", "", "", "", "😀", "i"]
    assert [pieces[2] for pieces in calls[:3]] == ["sto", "p!x", "n"]


def test_the_models_own_end_token_is_the_default(parrot):
    got, calls = speak(parrot, max_new_tokens=12)
    assert got.texts[0] == "bcdé中ef" and got.lengths.tolist() == [10, 12, 12] and len(calls) == 12
    for none_of_its_own in ([], ["never said"]):
        assert speak(parrot, none_of_its_own, max_new_tokens=12)[0].lengths.tolist() == [12, 12, 12]
    assert speak(parrot, ["</s>"], max_new_tokens=12)[0].lengths.tolist() == [10, 12, 12]


def test_without_steering_and_readout_the_text_is_the_same(parrot):
    got = parrot.generate(["a", "g", "m"], max_new_tokens=10)
    assert got.texts == speak(parrot, steering=Steering())[0].texts and got.scores is None


def test_a_text_cut_inside_a_character_says_so(parrot):
    assert speak(parrot, max_new_tokens=4)[0].texts[0] == "bcd\ufffd"


@pytest.mark.parametrize(
    ("stop", "texts", "lengths"),
    [
        ("op!", ["bcdé中ef", "h😀ijklq", "st"], [10, 10, 1]),  # begins and ends inside tokens
        (["p!xn"], ["bcdé中ef", "h😀ijklq", "sto"], [10, 10, 1]),
        ("stop", ["bcdé中ef", "h😀ijklq", ""], [10, 10, 0]),
        (["中"], ["bcdé", "h😀ijklq", "stop!xnopuvwxy"], [5, 10, 10]),  # the text before it ends in a whole character
        (["dé"], ["bc", "h😀ijklq", "stop!xnopuvwxy"], [2, 10, 10]),  # half of é is not the end of hope for this stop
        (["j", "é中", "x", "ij"], ["bcd", "h😀", "stop!"], [3, 5, 2]),  # whichever comes first
        (["b", "h", "s"], ["", "", ""], [0, 0, 0]),
        (["zz", ord("k"), "noq"], ["bcdé中ef", "h😀ij", "stop!xnopuvwxy"], [10, 7, 10]),
        (["fz", "qz"], ["bcdé中ef", "h😀ijklq", "stop!xnopuvwxy"], [10, 10, 10]),  # begun, never finished
    ],
)
def test_stop_strings(parrot, stop, texts, lengths):
    got, calls = speak(parrot, stop)
    assert got.texts == texts and got.lengths.tolist() == lengths
    assert not any("\ufffd" in piece for pieces in calls for piece in pieces)


def test_generation_ends_when_all_rows_have_stopped(parrot):
    _, calls = speak(parrot, ["c", "h", "s"])
    assert len(calls) == 2


def test_an_empty_stop_is_refused(parrot):
    with pytest.raises(ValueError, match="an empty string cannot stop a text"):
        speak(parrot, [""])


def test_stop_strings_compile_nothing(parrot, compiles):
    speak(parrot, ["dé"])
    before = compiles.count
    for stop in (["b"], ["op!", 5], "l", ["中", "x"], [1, 2, 3, 4]):
        speak(parrot, stop)
    assert compiles.count == before
