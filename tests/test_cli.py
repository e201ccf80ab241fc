"""The command line: each verb on a tiny model, and mistakes as one line on stderr with exit status 2."""

import io
import os
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

import jaxemo
from jaxemo import EmotionVectors, cli

MODEL = str(pathlib.Path(__file__).parent / "golden" / "gqa_tied.gguf")


@pytest.fixture
def vectors(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "v.safetensors"
    directions = {name: rng.standard_normal((3, 32)) for name in ("glad", "low")}
    made = EmotionVectors.from_directions(directions, np.full(3, 5.0))
    made.neutral_std[:] = 2.0  # as calibrated
    made.save(path)
    return str(path)


def run(capsys, *arguments):
    code = cli.main(["--no-compile-cache", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_info_says_what_the_model_is(capsys):
    code, out, _ = run(capsys, "info", MODEL)
    assert code == 0 and "family llama; 3 layers, d_model 32" in out and "with chat template" in out


def test_generate_is_steered_and_read(capsys, vectors):
    common = ("generate", MODEL, "--raw", "-p", "one two", "-n", "6")
    code, plain, _ = run(capsys, *common)
    assert code == 0
    same = run(capsys, *common, "--vectors", vectors, "--steer", "glad=0")[1]
    steered = run(capsys, *common, "--vectors", vectors, "--steer", "glad=30", "--layers", "0-2", "--read")[1]
    assert same == plain and not steered.startswith(plain.rstrip("\n")) and "glad +" in steered


def test_steer_has_the_librarys_unit_layers_and_tokens(capsys, vectors):
    common = ("generate", MODEL, "--raw", "-p", "one two", "-n", "6", "--vectors", vectors, "--tokens", "generated")
    lm, held = jaxemo.load(MODEL), EmotionVectors.load(vectors)
    want = [lm.generate("one two", held.steer("glad", s, [1], "generated"), 6).texts[0] for s in (0, 6)]
    got = [run(capsys, *common, "--layers", "1", "--steer", f"glad={s}")[1].rstrip("\n") for s in (0, 6)]
    assert got == want and want[0] != want[1]


@pytest.mark.parametrize("layers", ["abc", "20..24", "2-1", "1-", "-1", "1,,2", "", "1.5"])
def test_layers_that_are_none_are_named(capsys, vectors, layers):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", MODEL, "-p", "x", "--vectors", vectors, "--steer", "glad=1", f"--layers={layers}"])
    assert stopped.value.code == 2
    assert f"argument --layers: {layers!r}: expected layers, for example 24, 20-24 or 3,9,20" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("read", "--top"), ("generate", "-n")])
@pytest.mark.parametrize("count", ["0", "-1", "x"])
def test_counts_are_at_least_one(capsys, option, count):
    verb, flag = option
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, *(["--vectors", "v", "text"] if verb == "read" else []), f"{flag}={count}"])
    assert stopped.value.code == 2
    assert f"{count!r}: expected a whole number, at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [("--layers", "1"), ("--tokens", "last"), ("--vectors", "V")])
def test_options_that_would_do_nothing_are_mistakes(capsys, vectors, extra):
    given = [vectors if part == "V" else part for part in extra]
    code, out, err = run(capsys, "generate", MODEL, "--raw", "-p", "one", *given)
    assert code == 2 and not out and f"{extra[0]} does nothing here: give --steer or --ablate" in err


def test_rollouts_are_of_the_study_that_has_them(capsys, vectors, tmp_path):
    given = ("--vectors", vectors, "--samples", "2", "-o", str(tmp_path / "s"))
    code, _, err = run(capsys, "study", "forced-choice,text", MODEL, *given)
    assert code == 2 and "--samples does nothing here" in err and not (tmp_path / "s").exists()


def test_a_corpus_that_is_not_there_is_named(capsys, tmp_path):
    code, _, err = run(capsys, "extract", MODEL, "--corpus", "nowhere.jsonl", "-o", str(tmp_path / "v.safetensors"))
    assert code == 2 and "nowhere.jsonl" in err and not list(tmp_path.iterdir())


def test_where_extract_writes_is_checked_before_the_work(capsys, tmp_path):
    out = tmp_path / "missing" / "v.safetensors"
    code, _, err = run(capsys, "extract", "no-such-model", "-o", str(out))
    assert code == 2 and f"cannot write to {str(out)!r}" in err and "no-such-model" not in err


def test_chat_goes_on_until_an_empty_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
    code, out, _ = run(capsys, "generate", MODEL, "-n", "2")
    assert code == 0 and out.count("> ") == 3


def test_read_ranks_each_text(capsys, vectors, monkeypatch):
    code, out, _ = run(
        capsys, "read", "--model", MODEL, "--vectors", vectors, "--layer", "1", "one two", "three old dogs"
    )
    assert code == 0 and "after layer 1" in out and out.count("glad") == 2 and "| three old dogs" in out
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\nthree old dogs\n"))
    again = run(capsys, "read", "--model", MODEL, "--vectors", vectors, "--layer", "1", "-")[1]
    assert again == out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("info", "no-such-model"), "'no-such-model' is none of: a registered model"),
        (("pull", "no-such-model"), "unknown model 'no-such-model'"),
        (("generate", MODEL, "-p", "x", "--steer", "glad=1"), "steering needs --vectors FILE"),
        (("read", "--model", MODEL, "--vectors", "nowhere.safetensors", "x"), "nowhere.safetensors"),
        (("extract", MODEL, "--corpus", "nowhere.jsonl", "-o", os.devnull), "cannot write to '/dev/null'"),
        (("read", "--model", MODEL, "--vectors", ".", "x"), "'.' is no file; `jaxemo extract -o FILE` makes one"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and err.startswith("jaxemo: ") and message in err and err.count("\n") == 1, err


def test_a_strength_that_is_no_number_is_named(capsys, vectors):
    code, _, err = run(capsys, "generate", MODEL, "-p", "x", "--vectors", vectors, "--steer", "glad=much")
    assert code == 2 and "'glad=much'" in err and "desperate=0.25" in err
    code, _, err = run(capsys, "generate", MODEL, "-p", "x", "--vectors", vectors, "--steer", "glad=nan")
    assert code == 2 and "strength=nan: expected a finite number" in err
    code, _, err = run(capsys, "generate", MODEL, "-p", "x", "--vectors", vectors, "--steer", "gald=1")
    assert code == 2 and "did you mean glad?" in err


def test_sweep_makes_a_grid_beside_controls_and_goes_on(capsys, vectors, tmp_path):
    source, out = tmp_path / "prompts.txt", tmp_path / "grid.parquet"
    source.write_text("one two\nthree\n")
    common = ("sweep", "-m", MODEL, "--raw", "--vectors", vectors, "--emotions", "all", "--strengths", "0.5,-0.5", "-n", "5",
              "--random", "1", "--read", "last", "--words", "a,b", "-o", str(out))  # fmt: skip
    code, text, _ = run(capsys, *common, "--input", str(source))
    assert code == 0 and text.startswith("7 conditions x 2 prompts x 1 samples") and "random-0 add -0.5" in text
    assert str(out) in text and out.exists()
    lm, held = jaxemo.load(MODEL), EmotionVectors.load(vectors)
    want = lm.generate(["one two", "three"], held.steer("low", 0.5), 5)
    rows = [r for r in pq.read_table(out).to_pylist() if r["condition"].startswith("low add +0.5")]
    assert [r["tokens"] for r in rows] == [w[:n].tolist() for w, n in zip(want.tokens, want.lengths, strict=True)]
    z = lm.read(
        ["one two", "three"], held, layer=held.layer, steering=held.steer("low", 0.5), tokens="last", kind="z"
    ).pooled
    np.testing.assert_allclose([r["scores"] for r in rows], z, atol=1e-4)
    code, text, _ = run(capsys, *common, "one two", "three")
    assert code == 0 and "of the 14 texts" not in text, "nothing was left to do"
    code, _, err = run(capsys, *common)
    assert code == 2 and "give prompts, or --input FILE" in err
    code, _, err = run(capsys, *common, "one two", "four")
    assert code == 2 and "written with other prompts" in err
