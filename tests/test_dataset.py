"""Datasets read in a stream: the scores of `LanguageModel.read`, whatever interrupts the work, and faults named by line."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

import jaxemo
from jaxemo import capture, language_model, params
from jaxemo.emotions import EmotionVectors, dataset

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = ("glad", "low", "odd")


@pytest.fixture(scope="module")
def lm():
    return jaxemo.load(GOLDEN / "gqa_tied.gguf")


@pytest.fixture(scope="module")
def vectors(lm):
    rng = np.random.default_rng(0)
    L, D = lm.config.n_layers, lm.config.d_model
    made = EmotionVectors.from_directions({n: rng.standard_normal((L, D)) for n in NAMES}, rng.uniform(5, 9, L))
    made.neutral_mean[:], made.neutral_std[:] = rng.standard_normal((L, 3)), rng.uniform(0.5, 2, (L, 3))
    return made


WORDS = ["cat", "sat", "mat", "and", "saw", "one", "two", "old", "dogs", "run"]


def texts(n=23):
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS, rng.choice([2, 9]))) for _ in range(n)]


def run(lm, source, vectors, out, **kwargs):
    return dataset.read_dataset(lm, source, vectors, out, **{"progress": False, "max_tokens": 64, "top": 2, **kwargs})


def test_a_dataset_is_read_as_its_texts_are(lm, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK", 8)
    source = tmp_path / "some.txt"
    source.write_text("\n".join(texts()) + "\n")
    want = lm.read(texts(), vectors, layer=1, kind="centred")
    for out in (tmp_path / "scores.parquet", tmp_path / "scores.safetensors"):
        summary = run(lm, source, vectors, out, layer=1, kind="centred")
        if out.suffix == ".parquet":
            table = pq.read_table(out)
            assert table.column_names == ["row", "id", "tokens", "cut", *NAMES]
            scores = np.stack([table[name].to_numpy() for name in NAMES], axis=1)
            lengths = table["tokens"].to_numpy()
            assert table["row"].to_pylist() == list(range(23))
        else:
            arrays = safetensors.numpy.load_file(out)
            scores, lengths = arrays["scores"], arrays["tokens"]
            assert not arrays["cut"].any()
        assert np.allclose(scores, want.pooled, atol=1e-4) and lengths.tolist() == want.lengths.tolist()
        assert (summary.texts, summary.tokens, summary.unread) == (23, want.lengths.sum(), 0)
        assert np.allclose(summary.mean, want.pooled.mean(0), atol=1e-4)
        passages = [json.loads(line) for line in dataset.passages_path(out).read_text().splitlines()]
        for e, name in enumerate(NAMES):
            of_tokens = np.where(np.arange(want.scores.shape[1]) < want.lengths[:, None], want.scores[..., e], -np.inf)
            got = [p for p in passages if p["emotion"] == name]
            assert len({p["row"] for p in got}) == 2 and got[0]["score"] >= got[1]["score"]
            assert got[0]["row"] == of_tokens.max(1).argmax()
            for p in got:
                row = p["row"]
                assert abs(p["score"] - of_tokens[row].max()) < 1e-4 and p["position"] == of_tokens[row].argmax()
                assert p["token"] == want.tokens[row][p["position"]]
                assert p["before"] + p["token"] + p["after"] in texts()[row]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [
            "some.txt",
            *(f"scores.{form}{also}" for form in ("parquet", "safetensors") for also in ("", ".passages.jsonl")),
        ]
    ), "nothing else is left"


def test_interrupted_work_goes_on_with_nothing_lost_or_twice(lm, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK", 4)
    source, out = tmp_path / "some.jsonl", tmp_path / "scores.parquet"
    source.write_text("".join(json.dumps({"id": f"t{i}", "text": text}) + "\n" for i, text in enumerate(texts())))
    run(lm, source, vectors, tmp_path / "whole.parquet")
    read_part, rng, kills, left = dataset._read_part, np.random.default_rng(0), 0, 0

    def mortal(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return read_part(*args)

    monkeypatch.setattr(dataset, "_read_part", mortal)
    while True:
        left = int(rng.integers(0, 2))
        try:
            run(lm, source, vectors, out)
            break
        except KeyboardInterrupt:
            kills += 1
            assert not out.exists()
    assert kills >= 5
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "whole.parquet"))
    assert dataset.passages_path(out).read_text() == dataset.passages_path(tmp_path / "whole.parquet").read_text()
    assert pq.read_table(out)["id"].to_pylist() == [f"t{i}" for i in range(23)]

    left = 2
    with pytest.raises(KeyboardInterrupt):
        run(lm, source, vectors, out)
    with pytest.raises(ValueError, match="begun with a different kind, top; remove it to begin again"):
        run(lm, source, vectors, out, kind="cosine", top=3)
    source.write_text(source.read_text().replace("t1", "t0"))
    with pytest.raises(ValueError, match=r"some.jsonl' has changed since"):
        run(lm, source, vectors, out)


def test_blank_lines_and_long_texts_are_counted(lm, vectors, tmp_path):
    source, out = tmp_path / "some.txt", tmp_path / "scores.safetensors"
    source.write_text("cat sat\n\n" + "dogs run " * 30 + "\none\n")
    summary = run(lm, source, vectors, out, longest=16)
    found = safetensors.numpy.load_file(out)
    assert np.isnan(found["scores"][1]).all() and np.isfinite(found["scores"][[0, 2, 3]]).all()
    assert found["cut"].tolist() == [False, False, True, False] and found["tokens"][2] == 16
    assert (summary.texts, summary.cut, summary.unread) == (4, 1, 1)
    assert "4 texts" in str(summary) and "1 cut to the longest length, 1 not read" in str(summary)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "some.jsonl, line 2: this is not JSON"),
        (b'{"body": "x"}', r'some.jsonl, line 2: expected \{"text": ...\} or \{"messages": \[...\]\}'),
        (b'{"text": 3}', "some.jsonl, line 2: expected"),
        (b"\xff\xfe", "some.jsonl, line 2: this is not UTF-8"),
        (b'{"messages": [{"role": "user"}]}', "some.jsonl, line 2: a chat is a list of"),
    ],
)
def test_a_faulty_line_is_named(lm, vectors, tmp_path, line, message):
    source = tmp_path / "some.jsonl"
    source.write_bytes(b'{"text": "cat"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        run(lm, source, vectors, tmp_path / "scores.parquet")


def test_files_are_checked_before_the_work(lm, vectors, tmp_path):
    source = tmp_path / "some.txt"
    source.write_text("cat\n")
    with pytest.raises(ValueError, match=r"expected the name of a .parquet or a .safetensors file"):
        run(lm, source, vectors, tmp_path / "scores.csv")
    with pytest.raises(ValueError, match=r"expected a .txt file, one text a line, or a .jsonl file"):
        run(lm, tmp_path / "some.csv", vectors, tmp_path / "scores.parquet")
    with pytest.raises(FileNotFoundError, match="no file with texts"):
        run(lm, tmp_path / "other.txt", vectors, tmp_path / "scores.parquet")
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        run(lm, source, vectors, tmp_path / "no" / "scores.parquet")
    with pytest.raises(ValueError, match="kind='mean'"):
        run(lm, source, vectors, tmp_path / "scores.parquet", kind="mean")
    with pytest.raises(ValueError, match="top=-1: expected a whole number"):
        run(lm, source, vectors, tmp_path / "scores.parquet", top=-1)


def test_what_has_no_selected_token_is_named(lm, vectors, tmp_path):
    source = tmp_path / "some.txt"
    source.write_text("cat sat mat and saw\n\ncat\n")
    with pytest.raises(ValueError, match=r"some.txt, line 3: token selection slice\(5, None, None\) is empty"):
        run(lm, source, vectors, tmp_path / "scores.parquet", tokens=slice(5, None))


def test_layers_are_checked_and_counted_from_either_end(lm, vectors, tmp_path, monkeypatch):
    source, out, last = tmp_path / "some.txt", tmp_path / "scores.safetensors", lm.config.n_layers - 1
    source.write_text("cat sat\n")
    with pytest.raises(ValueError, match="layer 99 does not exist"):
        run(lm, source, vectors, out, layer=99)
    with pytest.raises(ValueError, match="kind='mean'"):
        run(lm, source, vectors, out, kind="mean")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["some.txt"], "nothing is begun that cannot be done"
    monkeypatch.setattr(dataset, "_read_part", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(lm, source, vectors, out, layer=last)
    monkeypatch.undo()
    run(lm, source, vectors, out, layer=-1)
    assert json.loads(_about(out)["settings"])["layer"] == last


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def _about(out):
    with safetensors.safe_open(out, "numpy") as file:
        return file.metadata()


def test_parts_of_another_model_or_other_vectors_are_refused(lm, vectors, tmp_path, monkeypatch):
    source, out = tmp_path / "some.txt", tmp_path / "scores.parquet"
    source.write_text("cat sat\n")
    others = EmotionVectors.from_directions(
        {n: vectors.directions[::-1, e] for e, n in enumerate(NAMES)}, np.ones(len(vectors.directions))
    )
    monkeypatch.setattr(dataset, "_read_part", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(lm, source, vectors, out, kind="cosine")
    weights = jaxemo.LanguageModel(lm.config, params.init(lm.config), lm.tokenizer, "other")
    for args, differs in (
        ((jaxemo.load(GOLDEN / "gqa_tied.gguf", dtype="bfloat16"), vectors), "weights, dtype"),
        ((weights, vectors), "weights"),
        ((lm, others), "vectors"),
    ):
        with pytest.raises(ValueError, match=f"begun with a different {differs}; remove"):
            run(args[0], source, args[1], out, kind="cosine")
    about = tmp_path / "scores.parquet.parts" / "settings.json"
    about.write_text(about.read_text().replace(lm.config.outline, "another"))
    with pytest.raises(ValueError, match="begun with a different model;"):
        run(lm, source, vectors, out, kind="cosine")


def test_a_centre_of_other_texts_is_refused(lm, vectors, tmp_path, monkeypatch):
    source, out = tmp_path / "some.txt", tmp_path / "scores.parquet"
    source.write_text("cat sat\none two\n")
    monkeypatch.setattr(dataset, "_read_part", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(lm, source, vectors, out, kind="centred")
    monkeypatch.undo()
    source.write_text("old dogs\none two\n")
    with pytest.raises(ValueError, match=r"changed since '.*centre.safetensors' was read from it: remove"):
        run(lm, source, vectors, out, kind="centred")


def test_attention_sinks_are_left_out(lm, vectors, tmp_path, monkeypatch):
    source, out = tmp_path / "some.txt", tmp_path / "scores.safetensors"
    source.write_text("\n".join(texts()) + "\n")
    counted = lm.read(texts(), vectors, layer=1, kind="z")
    monkeypatch.setattr(capture, "SINK", 1.05)
    programs = (language_model._forward, dataset._peaks)  # the number is part of them
    for program in programs:
        program.clear_cache()
    try:
        run(lm, source, vectors, out, layer=1)
        want = lm.read(texts(), vectors, layer=1, kind="z").pooled
    finally:
        for program in programs:
            program.clear_cache()
    assert np.abs(want - counted.pooled).max() > 0.01, "there are sinks to leave out"
    assert np.allclose(safetensors.numpy.load_file(out)["scores"], want, atol=1e-4)
    norm = np.asarray(
        lm.forward(texts(), capture=capture.Capture(norm={"resid_post": [1]})).captured.norm["resid_post"]
    )[0]
    norm = np.where(np.arange(norm.shape[1]) < counted.lengths[:, None], norm, np.nan)
    sinks = norm > 1.05 * np.nanquantile(norm, 0.5, axis=1, method="lower", keepdims=True)
    sinks &= np.argsort(np.argsort(-norm, axis=1), axis=1) < 4
    scores = np.where((sinks | np.isnan(norm))[..., None], -np.inf, counted.scores)
    passages = [json.loads(line) for line in dataset.passages_path(out).read_text().splitlines()]
    for e, name in enumerate(NAMES):
        best = scores[..., e].max(1)
        got = [(p["score"], scores[p["row"], p["position"], e]) for p in passages if p["emotion"] == name]
        assert np.allclose(got, np.sort(best)[:-3:-1, None], atol=1e-4)
    assert (scores.max((0, 1)) < counted.scores.max((0, 1)) - 0.01).any(), "sinks would have been among them"


@pytest.mark.parametrize(("chunk", "others"), [(1024, 0), (16, 40)])
def test_passages_are_the_highest_of_all_tokens_sorted(lm, tmp_path, monkeypatch, chunk, others):
    """One a text, although a text may hold many of the highest tokens, and copies fill batches up."""
    monkeypatch.setattr(dataset, "CHUNK", chunk)
    rng, top = np.random.default_rng(0), 8
    L, D = lm.config.n_layers, lm.config.d_model
    many = EmotionVectors.from_directions({f"e{i}": rng.standard_normal((L, D)) for i in range(20)}, np.ones(L))
    drawn = [" ".join([word] * 12) for word in WORDS] + texts(others)
    source, out = tmp_path / "some.txt", tmp_path / "scores.safetensors"
    source.write_text("\n".join(drawn) + "\n")
    run(lm, source, many, out, layer=1, kind="projection", top=top, max_tokens=4096)
    found = [json.loads(line) for line in dataset.passages_path(out).read_text().splitlines()]
    reading = lm.read(drawn, many, layer=1)
    for e, name in enumerate(many.names):
        tokens = [(row, at, reading.scores[row, at, e]) for row, n in enumerate(reading.lengths) for at in range(n)]
        first: dict[int, float] = {}  # score by text, from the highest token of all down
        for row, _, score in sorted(tokens, key=lambda token: -token[2]):
            first.setdefault(row, score)
        got = [passage for passage in found if passage["emotion"] == name]
        rows, at, scores = ([passage[key] for passage in got] for key in ("row", "position", "score"))
        assert len(set(rows)) == len(rows) == top
        # Texts that begin alike have tokens of one score, so it is the scores that must be those of the sorted tokens.
        assert np.allclose(scores, list(first.values())[:top], atol=1e-4)
        assert np.allclose(scores, reading.scores[rows, at, e], atol=1e-4)


def test_more_texts_compile_nothing_more(lm, vectors, tmp_path, compiles, monkeypatch):
    """A program for each length bucket, however many texts fall into it: they are most of the memory that is held."""
    monkeypatch.setattr(dataset, "CHUNK", 16)
    few, many = tmp_path / "few.txt", tmp_path / "many.txt"
    few.write_text("\n".join(texts(11)) + "\n")
    many.write_text("\n".join(texts(90)) + "\n")
    run(lm, few, vectors, tmp_path / "few.parquet", kind="centred")
    before = compiles.count
    run(lm, many, vectors, tmp_path / "many.parquet", kind="centred")
    assert compiles.count == before > 0


@pytest.mark.parametrize("form", ["parquet", "safetensors"])
def test_a_kill_at_the_end_of_the_work_leaves_nothing_in_the_way(lm, vectors, tmp_path, monkeypatch, form):
    monkeypatch.setattr(dataset, "CHUNK", 8)
    source, out, whole = tmp_path / "some.txt", tmp_path / f"scores.{form}", tmp_path / f"whole.{form}"
    source.write_text("\n".join(texts()) + "\n")
    run(lm, source, vectors, whole)
    parts = pathlib.Path(f"{out}.parts")
    parts.mkdir()
    (parts / "settings.json.7.part").write_text("{")  # killed before there was anything

    def dying(real, end):
        def dies(path, *args, **kwargs):
            if str(path).endswith(end) and not kwargs:  # not the removal at the start, which finds nothing
                raise KeyboardInterrupt
            return real(path, *args, **kwargs)

        return dies

    for module, name, end in (
        (dataset.os, "replace", "/passages"),
        (dataset.os, "replace", "/scores"),
        (dataset.pathlib.Path, "rename", ".parts"),
        (dataset.shutil, "rmtree", ".parts.finished"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, dying(getattr(module, name), end))
            with pytest.raises(KeyboardInterrupt):
                run(lm, source, vectors, out)
        if parts.exists():
            (parts / "000009.safetensors.7.part").write_text("{")
    assert not parts.exists() and len(list(tmp_path.glob("*.parts.finished/0*.safetensors"))) == 3
    run(lm, source, vectors, out)
    _same(out, whole)
    assert len(list(tmp_path.iterdir())) == 5, "nothing else is left"


def _same(out, whole):
    assert out.read_bytes() == whole.read_bytes()
    assert dataset.passages_path(out).read_bytes() == dataset.passages_path(whole).read_bytes()


def test_a_killed_process_loses_nothing(lm, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK", 2)
    source, out, whole = tmp_path / "some.txt", tmp_path / "scores.safetensors", tmp_path / "whole.safetensors"
    source.write_text("\n".join(texts(120)) + "\n")
    run(lm, source, vectors, whole)
    vectors.save(tmp_path / "v.safetensors")
    model, saved = str(GOLDEN / "gqa_tied.gguf"), str(tmp_path / "v.safetensors")
    script = f"""
import jaxemo
from jaxemo.emotions import EmotionVectors, dataset
dataset.CHUNK = 2
dataset.read_dataset(jaxemo.load({model!r}), {str(source)!r}, EmotionVectors.load({saved!r}), {str(out)!r}, progress=False,
                     max_tokens=64, top=2)
"""
    parts, rng, killed = pathlib.Path(f"{out}.parts"), np.random.default_rng(0), 0
    for _ in range(3):
        before = len(list(parts.glob("0*.safetensors")))
        process = subprocess.Popen([sys.executable, "-c", script])
        try:
            while process.poll() is None and len(list(parts.glob("0*.safetensors"))) <= before:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.03))
        finally:
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    done = len(list(parts.glob("0*.safetensors")))
    assert killed >= 2 and 2 <= done <= 60
    summary = run(lm, source, vectors, out)
    assert summary.fresh == 120 - 2 * done and summary.texts == 120
    _same(out, whole)
