"""Datasets read in a stream: the scores of `LanguageModel.read`, whatever interrupts the work, and faults named by line."""

import json
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

import jaxemo
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
        (b'{"messages": [{"role": "user"}]}', "line 2: a chat is a list of"),
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
