"""Parity with transformers without torch: the files that tests/golden/make.py made with it.

Four tiny random models, each a GGUF as llama.cpp's converter writes it: grouped-query attention with tied embeddings
(float32), multi-head untied (float16), heads wider than d_model / n_heads (bfloat16), and quantised (Q4_0 and Q8_0).
"""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest

import jaxemo
from jaxemo import params as params_lib
from jaxemo import tokens as tokens_lib
from jaxemo.capture import SITES

GOLDEN = pathlib.Path(__file__).parent / "golden"
TINY = ("gqa_tied", "mha_untied", "wide_heads", "quantised")
# Logits in float32 on both sides, with sums in different orders: a tiny model's are up to 9 in size, after 2 or 3 layers;
# the real model's up to 32, after 30.
TINY_BOUND, REAL_BOUND = 1e-4, 2e-3
LAYOUTS = pytest.mark.parametrize("stacked", [False, True], ids=["separate", "stacked"])


class Golden:
    """One tiny model's arrays. Those over tokens hold the rows' tokens one after another, without padding."""

    def __init__(self, name):
        self.path = GOLDEN / f"{name}.gguf"
        self.arrays = dict(np.load(GOLDEN / f"{name}.npz"))
        self.rows = [ids.tolist() for ids in np.split(self.arrays["ids"], np.cumsum(self.arrays["lengths"])[:-1])]
        self.tokens = json.loads((GOLDEN / f"{name}.json").read_text(encoding="ascii"))

    def load(self, stacked):
        return jaxemo.load(self.path, dtype="float32", stacked=stacked)

    def batch(self):
        """All rows, right-padded with a token that is not harmless should anything read it."""
        batch = tokens_lib.pad(self.rows)
        padding = np.arange(batch.ids.shape[1]) >= batch.lengths[:, None]
        assert padding.any()
        return batch.replace(ids=np.where(padding, 7, batch.ids))


@pytest.fixture(params=TINY)
def golden(request):
    return Golden(request.param)


def unpad(x, lengths):
    """`[..., B, T, D]` to `[..., tokens, D]`."""
    x = np.asarray(x)
    return np.concatenate([x[..., row, :n, :] for row, n in enumerate(lengths)], axis=-2)


def error(label, got, expected, bound) -> float:
    assert np.shape(got) == np.shape(expected), label
    worst = float(np.abs(np.asarray(got) - expected).max())
    print(f"{label}: max |Δ| {worst:.2e} (bound {bound:g}), values up to {np.abs(expected).max():.1f}")
    return worst


@LAYOUTS
def test_activations(golden, stacked, close, k_of):
    """Logits, residual stream, attention and MLP of every layer, in a ragged batch."""
    lm, batch, expected = golden.load(stacked), golden.batch(), golden.arrays
    assert params_lib.is_stacked(lm.params) == stacked
    out = lm.forward(batch, capture=jaxemo.Capture(raw=dict.fromkeys(SITES, "all")))
    assert error("logits", unpad(out.logits, batch.lengths), expected["logits"], TINY_BOUND) <= TINY_BOUND
    before = np.concatenate([expected["embed"][None], expected["resid_post"][:-1]])
    k = 2 * k_of(lm.config, max(batch.lengths))  # both sides round
    scale = np.abs(expected["resid_post"]).max()  # what a block adds is computed from the stream, with its errors
    for site in SITES:
        want = before if site == "resid_pre" else expected[site]
        close(unpad(out.captured.raw[site], batch.lengths), want, k, site, scale)


def test_rows_alone(golden):
    lm = golden.load(stacked=False)
    by_row = np.split(golden.arrays["logits"], np.cumsum(golden.arrays["lengths"])[:-1])
    for ids, want in zip(golden.rows, by_row, strict=True):
        logits = lm.forward(tokens_lib.pad([ids], 16)).logits[0, : len(ids)]
        assert error(f"{len(ids)} tokens", logits, want, TINY_BOUND) <= TINY_BOUND


@LAYOUTS
def test_greedy_in_a_batch(golden, stacked):
    """make.py has seen to it that no two logits come closer than ten times the bound."""
    expected = golden.arrays["greedy"]
    got = golden.load(stacked).generate(golden.batch(), max_new_tokens=expected.shape[1], stop=[])
    np.testing.assert_array_equal(got.tokens, expected)


def test_greedy_alone(golden):
    lm, expected = golden.load(stacked=False), golden.arrays["greedy"]
    for ids, want in zip(golden.rows, expected, strict=True):
        got = lm.generate(tokens_lib.pad([ids], 16), max_new_tokens=len(want), stop=[])
        np.testing.assert_array_equal(got.tokens[0], want)


def test_greedy_uncached(golden):
    lm, expected = golden.load(stacked=False), golden.arrays["greedy"]
    texts = [list(ids) for ids in golden.rows]
    room = max(map(len, texts)) + expected.shape[1]
    for _ in range(expected.shape[1]):
        best = np.asarray(lm.forward(tokens_lib.pad(texts, room), logits="last").logits).argmax(-1)
        for text, token in zip(texts, best.tolist(), strict=True):
            text.append(token)
    for text, ids, want in zip(texts, golden.rows, expected, strict=True):
        assert text[len(ids) :] == want.tolist()


def test_a_stop_token_ends_a_row_and_only_that_row():
    golden = Golden("gqa_tied")
    expected = golden.arrays["greedy"].tolist()
    count = len(expected[0])

    def ends(stop):
        return [row.index(stop) if stop in row else count for row in expected]

    # A token that some continuations hold, others not, and none at the start.
    stop = next(token for row in expected for token in row if min(ends(token)) > 0 and max(ends(token)) == count)
    got = golden.load(stacked=False).generate(golden.batch(), max_new_tokens=count, stop=[stop])
    assert got.lengths.tolist() == ends(stop)
    for row, end in enumerate(ends(stop)):
        assert got.tokens[row].tolist() == expected[row][:end] + [0] * (count - end)


def _changed(config, params, what):
    layers = params["layers"]
    if what == "norm_eps":
        return dataclasses.replace(config, norm_eps=config.norm_eps * 1.5), params
    if what == "rope_theta":
        rope = config.attention[0].rope
        other = jaxemo.config.Attention(dataclasses.replace(rope, theta=rope.theta * 1.5))
        return dataclasses.replace(config, attention=(other,)), params
    swap = {"k_halves_swapped": ("wk", lambda w: np.roll(w, w.shape[-1] // 2, axis=-1)),
            "q_still_permuted": ("wq", lambda w: w.reshape(*w.shape[:2], 2, -1).swapaxes(2, 3).reshape(w.shape)),
            "heads_reversed": ("wo", lambda w: w[::-1])}  # fmt: skip
    name, change = swap[what]
    return config, {**params, "layers": tuple({**layer, name: change(np.asarray(layer[name]))} for layer in layers)}


MISTAKES = list(itertools.product(TINY, ("rope_theta", "k_halves_swapped", "q_still_permuted", "heads_reversed")))
MISTAKES += [("wide_heads", "norm_eps")]  # the others' epsilons are too small to matter beside activations of size 1


@pytest.mark.parametrize("name, what", MISTAKES)
def test_mistakes_are_seen(name, what):
    """Each of these is a plausible bug; it must move the logits far beyond the bound, or the files prove little."""
    golden = Golden(name)
    lm, batch = golden.load(stacked=False), golden.batch()
    wrong = jaxemo.LanguageModel(*_changed(lm.config, lm.params, what))
    moved = error(what, unpad(wrong.forward(batch).logits, batch.lengths), golden.arrays["logits"], TINY_BOUND)
    assert moved > 100 * TINY_BOUND


def check_tokens(tokenizer, rows, chats):
    for text, ids in rows:
        assert tokenizer.encode(text) == ids, ascii(text)
    for chat, prompt, rendered, ids in chats:
        assert tokenizer.render(chat, add_generation_prompt=prompt) == rendered
        assert tokenizer.encode_chat(chat, add_generation_prompt=prompt) == ids


def test_tiny_tokens(golden):
    tokenizer = golden.load(stacked=False).tokenizer
    check_tokens(tokenizer, golden.tokens["strings"], golden.tokens["chats"])
    for text, ids in golden.tokens["strings"]:  # these vocabularies hold every byte, so nothing is lost
        assert tokenizer.decode(ids, skip_special=False) == text


@pytest.fixture(scope="module")
def real():
    return json.loads((GOLDEN / "smollm2-135m.json").read_text(encoding="ascii"))


@pytest.fixture(scope="module")
def lm():
    return jaxemo.load("smollm2-135m", dtype="float32", stacked=True)


def test_real_tokens(lm, real):
    assert len(real["strings"]) >= 100 and len(real["chats"]) >= 20
    check_tokens(lm.tokenizer, real["strings"], real["chats"])


def test_real_logits(lm, real):
    """The ten largest logits after four texts, in one ragged batch."""
    names, rows, best, expected = zip(*real["last_logits"], strict=True)
    logits = np.asarray(lm.forward(tokens_lib.pad(rows), logits="last").logits)
    for row, name in enumerate(names):
        assert logits[row].argmax() == best[row][0]
        assert error(name, logits[row, list(best[row])], np.array(expected[row]), REAL_BOUND) <= REAL_BOUND


def test_real_greedy(lm, real):
    prompts, expected = zip(*real["greedy"], strict=True)
    got = lm.generate(list(prompts), max_new_tokens=max(map(len, expected)))
    for row, want in enumerate(expected):
        assert got.tokens[row, : got.lengths[row]].tolist() == want, prompts[row]
