"""Sweeps: the same as row by row, whatever shares the loop; stores that survive kills; shapes that compile once."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import jaxemo
from jaxemo import batching, generate, params, tokens

MODEL = "tests/golden/gqa_tied.gguf"
BEGIN = "Same beginning here: "  # 21 tokens of one byte
PROMPTS = [BEGIN + end for end in ("one", "two words", "a third one", "x")]
N = 12


@pytest.fixture(scope="module")
def lm():
    return jaxemo.load(MODEL)


@pytest.fixture(scope="module")
def vectors(lm, random_vectors):
    return random_vectors(lm, "abc")


@pytest.fixture(scope="module")
def conditions(vectors):
    return {
        "none": None,
        "a": vectors.steer("a", 0.8),
        "b late": vectors.steer("b", 0.8, tokens="generated"),
        "c prompt": vectors.steer("c", -0.8, tokens="prompt"),
        "no a": vectors.ablate("a"),
        "a and b": vectors.steer("a", 0.5, layers="all", tokens=slice(4, None), keep_norm=True) + vectors.ablate("b"),
    }


def sweep(lm, conditions, prompts=PROMPTS, **kwargs):
    return jaxemo.sweep(lm, prompts, conditions, **{"max_new_tokens": N, "rows": 8, "progress": False, **kwargs})


def same(a, b):
    for name in ("texts", "tokens", "lengths", "logprobs", "ended", "scores", "words"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_array_equal(x, y)


def test_a_sweep_is_what_generate_gives_row_by_row(lm, vectors, conditions):
    grid = sweep(lm, conditions, read=vectors)
    for c, spec in enumerate(conditions.values()):
        one = lm.generate(PROMPTS, spec, N, read=vectors)
        np.testing.assert_array_equal(grid.tokens[c, :, 0], one.tokens)
        np.testing.assert_allclose(grid.logprobs[c, :, 0], one.logprobs, atol=2e-5)
        assert grid.texts[c, :, 0].tolist() == one.texts
        scores = [one.scores[p, :n].mean(0) for p, n in enumerate(one.lengths)]
        np.testing.assert_allclose(grid.scores[c, :, 0], scores, atol=1e-4)
        assert (grid.ended[c, :, 0] == (one.lengths < N)).all()
    assert len({grid.tokens[c].tobytes() for c in range(len(conditions))}) > 3, "the conditions do something"


@pytest.mark.parametrize("at", ["last", "prompt", slice(-5, -2), slice(2, 6)])
def test_scores_of_the_prompt_and_log_probabilities_of_words(lm, vectors, conditions, at):
    words = ("q", " itself")
    conditions = {
        name: spec for name, spec in conditions.items() if name != "b late"
    }  # it acts on none of these tokens
    grid = sweep(lm, conditions, max_new_tokens=0, read=vectors, layer=1, kind="cosine", tokens=at, words=words)
    ids = [lm.tokenizer.encode(word)[len(lm.tokenizer.prefix)] for word in words]
    for c, spec in enumerate(conditions.values()):
        read = lm.read(PROMPTS, vectors, layer=1, steering=spec, tokens=at, kind="cosine").pooled
        np.testing.assert_allclose(grid.scores[c, :, 0], read, atol=2e-6)
        logits = np.asarray(lm.forward(PROMPTS, spec, logits="last").logits, np.float64)
        want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(grid.words[c, :, 0], want[:, ids], atol=2e-5)
    assert not grid.lengths.any() and grid.tokens.shape[-1] == 0


def test_a_text_depends_on_nothing_that_shares_the_loop(lm, vectors, conditions):
    """Bit for bit: in another order, beside other jobs, and when only a part is left to do."""
    how = {"samples": 3, "temperature": 1.0, "top_p": 0.9, "read": vectors, "stop": list("etaoinsh")}
    whole = sweep(lm, conditions, **how)
    assert len(set(whole.lengths.ravel().tolist())) > 5, "rows end at different times"
    backwards = sweep(lm, dict(reversed(conditions.items())), **how)
    for name in ("tokens", "logprobs", "scores"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(backwards, name)[::-1])
    shuffled = [2, 0, 3, 1]
    moved = sweep(lm, conditions, [PROMPTS[p] for p in shuffled], **how)
    for name in ("tokens", "logprobs", "scores"):
        np.testing.assert_array_equal(getattr(whole, name)[:, shuffled], getattr(moved, name))


def test_what_prompts_share_is_read_alike_whichever_of_them_comes_first(lm, vectors):
    """Also in the blocks below all that is steered: to the bit, with prompts of very different lengths."""
    steered = {f"{name} {x}": vectors.steer(name, x, layers=[2]) for name in "abc" for x in (0.2, -0.3)}
    mixed = [BEGIN + "x" * n for n in (1, 30, 9, 20, 2, 35)]
    how = {"max_new_tokens": 0, "words": ("a", "b")}
    first, last = sweep(lm, steered, mixed, **how), sweep(lm, steered, mixed[::-1], **how)
    np.testing.assert_array_equal(first.words, last.words[:, ::-1])


def test_samples_are_paired_across_conditions_and_differ(lm, vectors):
    grid = sweep(lm, {"none": None, "nothing": vectors.steer("a", 0.0)}, samples=4, temperature=1.0)
    np.testing.assert_array_equal(grid.tokens[0], grid.tokens[1])
    assert len({grid.tokens[0, 0, s].tobytes() for s in range(4)}) == 4
    other = sweep(lm, {"none": None}, samples=4, temperature=1.0, seed=1)
    assert not np.array_equal(grid.tokens[0], other.tokens[0])


def test_values_compile_nothing(lm, vectors):
    programs = generate.prefill, generate.begin, generate.decode
    of = [
        {f"{name} {x}": vectors.steer(name, x, layers=[at]) for name in "ab" for x in (0.1 + at, 0.2)}
        | {"first": vectors.steer("c", 0.1 + at, layers=[0])}
        for at in range(3)
    ]
    sweep(lm, of[0])
    before = [program._cache_size() for program in programs]
    for conditions in of[1:]:
        sweep(lm, conditions, seed=5)
    assert [program._cache_size() for program in programs] == before


def test_prompts_are_read_once_for_all_that_share_them(lm, vectors, monkeypatch):
    read = []

    def counted(config, params, ids, *args, prefill=generate.prefill, **kwargs):
        read.append(ids.shape[:2])
        return prefill(config, params, ids, *args, **kwargs)

    monkeypatch.setattr(generate, "prefill", counted)
    rows = 2  # a quarter of 8
    ends = sorted(tokens.bucket(len(lm.tokenizer.encode(text)) - batching.COMMON) for text in PROMPTS)
    by_length = [(rows, T) for T in sorted(set(ends)) for _ in range(-(-ends.count(T) // rows))]
    late = {f"{name} {x}": vectors.steer(name, x, tokens="generated") for name in "abc" for x in (0.1, 0.2)}
    sweep(lm, late, samples=4, temperature=1.0)
    assert read == [(rows, batching.COMMON), *by_length], "96 texts from four prompts"
    read.clear()
    sweep(lm, {name: vectors.steer(name, 0.5) for name in "ab"})
    both = [(rows, T) for T in sorted(set(ends)) for _ in range(-(-2 * ends.count(T) // rows))]
    assert read == [(rows, batching.COMMON), *both], "the beginning once for each of two conditions"


@pytest.mark.parametrize(
    ("prompts", "stacked"), [(PROMPTS, False), (["one", "some other", *PROMPTS], True)], ids=["alike", "different"]
)
def test_blocks_below_all_that_is_steered_are_read_once_a_prompt(lm, vectors, monkeypatch, prompts, stacked):
    lm = jaxemo.LanguageModel(lm.config, (params.stack if stacked else params.unstack)(lm.params), lm.tokenizer)
    conditions = {"none": None} | {
        f"{name} {x}": vectors.steer(name, x, [1, 2][x > 0 :]) for name in "abc" for x in (-1, 1)
    }
    read, below = [], generate.prefill_below
    monkeypatch.setattr(generate, "prefill_below", lambda *args: read.append(args[-1]) or below(*args))
    of_prompt = {"max_new_tokens": 0, "read": vectors, "layer": 1, "tokens": "last", "words": ("q", " itself")}
    of_text = {"samples": 2, "temperature": 1.0, "read": vectors, "layer": 0}
    found = [sweep(lm, conditions, prompts, **how) for how in (of_prompt, of_text)]
    common = batching.COMMON * (prompts is PROMPTS)
    ends = [tokens.bucket(len(lm.tokenizer.encode(text)) - common) for text in prompts]
    once = sum(-(-ends.count(T) // 2) for T in set(ends))  # two at a time
    # where prompts begin alike, for every two of seven conditions, and their beginning besides
    assert read == [1] * (2 * (4 * (1 + once) if common else once))
    read.clear()
    low = sweep(lm, conditions, prompts, **of_prompt | {"layer": 0})
    assert not read, "what is read lies below what is steered"
    monkeypatch.setattr(batching._Run, "_split", lambda self: 0)
    for grid, how in zip([*found, low], (of_prompt, of_text, of_prompt | {"layer": 0}), strict=True):
        want = sweep(lm, conditions, prompts, **how)
        np.testing.assert_array_equal(grid.tokens, want.tokens)
        np.testing.assert_allclose(grid.logprobs, want.logprobs, atol=2e-5)
        np.testing.assert_allclose(grid.scores, want.scores, atol=2e-5)
        if want.words is not None:
            np.testing.assert_allclose(grid.words, want.words, atol=2e-5)


def test_many_directions_take_several_loops(lm, vectors, conditions, monkeypatch):
    whole = sweep(lm, conditions, samples=2, temperature=1.0)
    monkeypatch.setattr(batching, "BANK", 2)
    parts = sweep(lm, conditions, samples=2, temperature=1.0)
    np.testing.assert_array_equal(whole.tokens, parts.tokens)


# ---- stores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_store_goes_on_where_it_was(lm, vectors, conditions, tmp_path, monkeypatch, name):
    out, how = tmp_path / name, {"samples": 2, "temperature": 1.0, "read": vectors, "words": ("q", "r")}
    want = sweep(lm, conditions, **how)
    run = batching.run

    def broken(*args):
        for i, result in enumerate(run(*args)):
            if i == 17:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(batching, "run", broken)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sweep(lm, conditions, out=out, **how)
    monkeypatch.setattr(batching, "run", run)
    store = tmp_path / ("out.jsonl" if name == "out.jsonl" else "out.parquet.jsonl")
    lines = store.read_bytes()
    assert lines.count(b"\n") == 1 + 2 * 17
    store.write_bytes(lines[:-20])  # torn
    grid = sweep(lm, conditions, out=out, **how)
    assert grid.fresh == 48 - 33
    same(grid, want)
    again = sweep(lm, conditions, out=out, **how)
    assert again.fresh == 0
    same(again, want)
    whole = tmp_path / f"whole{out.suffix}"
    sweep(lm, conditions, out=whole, **how)
    assert whole.read_bytes() == out.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {out.name, whole.name}
    with pytest.raises(ValueError, match="written with other seed"):
        sweep(lm, conditions, out=out, seed=3, **how)
    with pytest.raises(ValueError, match="written with other conditions"):
        sweep(lm, {**conditions, "a": vectors.steer("a", 0.7)}, out=out, **how)


def test_a_process_killed_at_any_moment_loses_nothing(lm, tmp_path):
    """SIGKILL, twice here and twenty times in bench/sweep.py; the store becomes an uninterrupted run's, byte for byte."""
    script = tmp_path / "work.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys, numpy as np, jaxemo
        from jaxemo.cli import cache_compilations
        cache_compilations()
        lm = jaxemo.load({os.path.abspath(MODEL)!r})
        draw = np.random.default_rng(0).standard_normal
        L, D = lm.config.n_layers, lm.config.d_model
        vectors = jaxemo.EmotionVectors.from_directions({{n: draw((L, D)) for n in "abcdefgh"}}, np.full(L, 3.0))
        conditions = {{n: vectors.steer(n, 0.5) for n in vectors.names}}
        how = dict(samples=8, temperature=1.0, max_new_tokens=24, rows=8, progress=False)
        jaxemo.sweep(lm, {PROMPTS!r}, conditions, **how)
        print("ready", flush=True)
        jaxemo.sweep(lm, {PROMPTS!r}, conditions, out=sys.argv[1], **how)
    """)
    )
    environment = {**os.environ, "JAXEMO_CACHE": str(tmp_path / "cache")}

    def start(out):
        return subprocess.Popen([sys.executable, str(script), str(out)], env=environment, stdout=subprocess.PIPE)

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    process = start(whole)
    assert process.stdout.readline() == b"ready\n"
    assert process.wait() == 0
    process = start(killed)
    assert process.stdout.readline() == b"ready\n"
    while not killed.exists() or killed.read_bytes().count(b"\n") < 90:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert killed.read_bytes().count(b"\n") < 257, "work was under way when it was killed"
    assert start(killed).wait() == 0
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"conditions": {}}, ValueError, "conditions are"),
        ({"conditions": {"a": "sad"}}, TypeError, r"conditions\['a'\] is str"),
        ({"samples": 0}, ValueError, "samples=0"),
        ({"samples": 2}, ValueError, "would all be the same"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens=-1"),
        ({"max_new_tokens": 60}, ValueError, "exceed the model's 64 positions"),
        ({"layer": 1}, ValueError, "there is nothing to read"),
        ({"words": "yes"}, TypeError, "several texts"),
        ({"words": ("yes", "")}, ValueError, "'' has no tokens"),
        ({"words": ("yes", "you")}, ValueError, "begin with the same token"),
        ({"rows": 0}, ValueError, "rows=0"),
        ({"temperature": -1.0}, ValueError, "temperature=-1.0"),
        ({"out": "x.csv"}, ValueError, "expected a .jsonl or a .parquet file"),
        ({"out": "README.md"}, ValueError, "expected a .jsonl"),
        ({"out": "no/such/x.jsonl"}, FileNotFoundError, "there is no directory"),
        ({"prompts": []}, ValueError, "no rows"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(lm, tmp_path, monkeypatch, change, error, message):
    arguments = {"prompts": PROMPTS, "conditions": {"none": None}, "max_new_tokens": N, "progress": False, **change}
    before = set(os.listdir("."))
    with pytest.raises(error, match=message):
        jaxemo.sweep(lm, **arguments)
    assert set(os.listdir(".")) == before


def test_conditions_that_act_nowhere_are_refused_before_the_work(lm, vectors, tmp_path):
    with pytest.raises(ValueError, match="is outside this row's"):
        sweep(lm, {"none": None, "far": vectors.steer("a", 0.1, tokens=60)}, out=tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match='centred" needs'):
        sweep(lm, {"none": None}, read=vectors, kind="centred")
    with pytest.raises(ValueError, match="select tokens of the prompt"):
        sweep(lm, {"none": None}, read=vectors, max_new_tokens=0)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_store_is_left_alone(lm, tmp_path):
    out = tmp_path / "mine.jsonl"
    for text in ('{"my": "data"}\n', "notes", '{"sweep": {}}\n'):
        out.write_text(text)
        with pytest.raises(ValueError, match=r"no store of|written with other"):
            sweep(lm, {"none": None}, out=out)
        assert out.read_text() == text
    out = tmp_path / "mine.parquet"
    out.write_text("notes")
    with pytest.raises(ValueError, match="no store of a sweep"):
        sweep(lm, {"none": None}, out=out)
    assert out.read_text() == "notes" and len(list(tmp_path.iterdir())) == 2


def test_grids_of_conditions_have_their_controls(lm, vectors):
    made = jaxemo.emotions.conditions(
        vectors, ["a", "b"], (0.1, -0.1), layers=(0, "all"), operations=("add", "ablate"), random=2
    )
    assert len(made) == 1 + 4 * (2 * 2 + 2) and made["none"] is None
    assert "random-1 add -0.1 layers=all tokens=all" in made and "a ablate layers=0 tokens=all" in made
    steer = made["a add +0.1 layers=0 tokens=all"]
    assert steer.terms[0].same_as(vectors.steer("a", 0.1, layers=0).terms[0])
    control = made["random-0 add +0.1 layers=0 tokens=all"].terms[0]
    assert control.value[0] == steer.terms[0].value[0]
    for wrong in ({"emotions": "a"}, {"emotions": []}, {"operations": ["stretch"]}, {"emotions": ["z"]}):
        with pytest.raises((ValueError, KeyError)):
            jaxemo.emotions.conditions(vectors, **{"emotions": ["a"], **wrong})


def test_the_summary_says_what_came(lm, conditions, tmp_path):
    out = tmp_path / "x.jsonl"
    text = str(sweep(lm, conditions, out=out))
    assert text.startswith("6 conditions x 4 prompts x 1 samples: ") and "24 of the 24 texts" in text
    assert all(name in text for name in conditions)
    first = json.loads(out.read_text().splitlines()[1])
    assert first["condition"] == "none" and first["prompt"] == 0 and len(first["tokens"]) == len(first["logprobs"])
