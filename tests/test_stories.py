"""Stories that a model writes, the store they are kept in, and what a program finds wrong with a corpus."""

import json
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest

import jaxemo
from jaxemo import params
from jaxemo.emotions import corpus, quality, stories

GOLDEN = pathlib.Path(__file__).parent / "golden"
SHIPPED = corpus.shipped().stories


@pytest.fixture(scope="module")
def lm():
    return jaxemo.load(GOLDEN / "gqa_tied.gguf")


def encode(text):
    return list(text.encode())


@pytest.fixture
def writes(lm, monkeypatch):
    """Have the model write what `text(emotion, seed)` says, and count its batches; `use.asked` is how it was asked to."""
    calls = []

    def use(text, length=150):
        def generate(self, prompts, steering, new_tokens, *, seed, **settings):
            calls.append(len(prompts))
            use.asked = (steering, new_tokens, settings)
            written = [
                text(p[0]["content"] if isinstance(p, list) else p, s) for p, s in zip(prompts, seed, strict=True)
            ]
            return SimpleNamespace(texts=written, lengths=np.full(len(written), length))

        monkeypatch.setattr(type(lm), "generate", generate)
        return calls

    return use


TOPICS = [("ferry", "a ferry crossing"), ("oven", "an oven that will not heat")]


def test_every_story_is_asked_for_once_and_kept_with_its_reason(lm, tmp_path, writes):
    good = iter(story.text for story in SHIPPED)
    answers = [
        "I'm sorry, but I cannot write that.",
        "Too short.",
        "She was calm. " + SHIPPED[0].text,
        "word " * 140,
        None,
    ]

    def text(prompt, seed):
        answer = answers.pop(0) if answers else None
        return next(good) if answer is None else answer

    calls = writes(text)
    out = tmp_path / "stories.jsonl"
    summary = stories.write(lm, out, ["calm", "sad"], TOPICS, per_topic=2, rows=3, progress=False)
    assert calls == [3, 3, 3], "batches of one size"
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["emotion"], r["topic"], r["n"]) for r in records] == [
        (e, t, n) for n in (0, 1) for t in ("ferry", "oven") for e in ("calm", "sad")
    ]
    found = [r["rejected"] for r in records]
    assert found[:4] == ["refused", "too short", "named the emotion", "repetitive"] and found[4:] == [None] * 4
    assert summary.kept == 4 and summary.rejected == dict.fromkeys(
        ("refused", "too short", "named the emotion", "repetitive"), 1
    )
    assert "4 of 8 stories kept" in str(summary) and "until as many are kept" in str(summary)
    assert [s.text for s in corpus.load(out).stories] == [r["text"] for r in records[4:]]


def test_near_duplicates_are_rejected_also_after_a_restart(lm, tmp_path, writes):
    texts = iter(
        [SHIPPED[0].text, SHIPPED[0].text.replace("the", "a", 1), SHIPPED[1].text, SHIPPED[1].text[:-20] + "then."]
    )
    writes(lambda prompt, seed: next(texts))
    out = tmp_path / "stories.jsonl"
    stories.write(lm, out, ["sad"], TOPICS, rows=1, progress=False)
    summary = stories.write(lm, out, ["sad"], TOPICS, per_topic=2, rows=1, progress=False)
    found = [json.loads(line)["rejected"] for line in out.read_text().splitlines()]
    assert found == [None, "near-duplicate", None, "near-duplicate"] and summary.fresh == 2


def test_a_kill_at_any_byte_loses_one_batch_at_most(lm, tmp_path, writes):
    calls = writes(lambda prompt, seed: SHIPPED[seed % len(SHIPPED)].text)
    out, whole = tmp_path / "stories.jsonl", tmp_path / "whole.jsonl"
    stories.write(lm, whole, ["sad", "calm", "happy"], TOPICS, rows=2, progress=False)
    written = whole.read_bytes()
    for cut in [0, 1, *np.random.default_rng(0).integers(2, len(written), 20).tolist(), len(written)]:
        out.write_bytes(written[:cut])
        calls.clear()
        summary = stories.write(lm, out, ["sad", "calm", "happy"], TOPICS, rows=2, progress=False)
        assert out.read_bytes() == written, f"cut at {cut}"
        assert summary.fresh == 6 - written[:cut].count(b"\n") and len(calls) == -(-summary.fresh // 2)


def test_another_store_or_file_is_refused_untouched(lm, tmp_path, writes):
    writes(lambda prompt, seed: SHIPPED[0].text)
    out = tmp_path / "stories.jsonl"
    stories.write(lm, out, ["sad"], TOPICS, progress=False, rows=2)
    for content, message in (
        (out.read_bytes(), "was written with .*'seed': 0"),
        (b"my notes", "no store"),
        (b"{}\n", "line 1"),
    ):
        out.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            stories.write(lm, out, ["sad"], TOPICS, seed=1, progress=False)
        assert out.read_bytes() == content
    for names, message in (([], "at least one"), (["sad", " "], "at least one"), ("sad", "expected a list")):
        with pytest.raises(ValueError, match=f"emotions=.*{message}"):
            stories.write(lm, tmp_path / "new.jsonl", names, TOPICS)
    with pytest.raises(ValueError, match="topics=999: there are"):
        stories.write(lm, tmp_path / "new.jsonl", topics=999)


def test_the_model_is_asked_with_the_settings_given_and_for_no_row_too_many(lm, tmp_path, writes):
    calls = writes(lambda prompt, seed: SHIPPED[0].text)
    stories.write(lm, tmp_path / "s.jsonl", ["sad"], TOPICS[:1], temperature=0.3, top_p=0.7, progress=False)
    assert calls == [1]
    assert writes.asked == (None, stories.NEW_TOKENS, {"temperature": 0.3, "top_p": 0.7})


@pytest.mark.parametrize(("short", "end"), [(0, ""), (1, " And the")])
def test_a_story_is_cut_to_whole_sentences_only_where_the_tokens_ran_out(lm, tmp_path, writes, short, end):
    writes(lambda prompt, seed: SHIPPED[0].text + " And the", stories.NEW_TOKENS - short)
    stories.write(lm, tmp_path / "s.jsonl", ["sad"], TOPICS[:1], progress=False)
    assert json.loads((tmp_path / "s.jsonl").read_text())["text"] == SHIPPED[0].text + end


def test_a_store_goes_on_with_the_same_weights_wording_and_descriptions_only(lm, tmp_path, writes, monkeypatch):
    writes(lambda prompt, seed: SHIPPED[0].text)
    out = tmp_path / "s.jsonl"

    def go_on(model=lm, topics=TOPICS):
        return stories.write(model, out, ["sad"], topics, rows=2, progress=False).fresh

    def model(weights, name=lm.source):
        return jaxemo.LanguageModel(lm.config, weights, lm.tokenizer, name)

    assert go_on() == 2 and go_on(model(lm.params, "elsewhere/m.gguf")) == 0 and go_on(topics=TOPICS[:1]) == 0
    written = out.read_bytes()
    for other in (model(params.init(lm.config)), jaxemo.load(GOLDEN / "gqa_tied.gguf", dtype="bfloat16")):
        with pytest.raises(ValueError, match=r"was written with .*'weights'"):
            go_on(other)
    with pytest.raises(ValueError, match="on 'oven' as 'an oven that will not heat', not 'x'"):
        go_on(topics=[TOPICS[0], ("oven", "x")])
    with pytest.raises(ValueError, match="two have one name"):
        go_on(topics=[TOPICS[0], ("ferry", "x")])
    for name, value in (("NEW_TOKENS", 5), ("_prompt", lambda lm, emotion, about: f"{about}: {emotion}")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="was written with"):
            patch.setattr(stories, name, value)
            go_on()
    assert out.read_bytes() == written
    out.write_bytes(written + written)
    with pytest.raises(ValueError, match=r"holds two stories \('sad', 'ferry', 0\)"):
        go_on()


def test_two_runs_never_write_one_store(lm, tmp_path, writes):
    out, errors = tmp_path / "s.jsonl", []

    def text(prompt, seed):
        with pytest.raises(BlockingIOError, match="is being written by another run") as error:
            stories.write(lm, out, ["sad"], TOPICS[:1], progress=False)
        errors.append(error)
        return SHIPPED[0].text

    writes(text)
    assert stories.write(lm, out, ["sad"], TOPICS[:1], progress=False).asked == len(errors) == 1
    assert stories.write(lm, out, ["sad"], TOPICS[:1], progress=False).fresh == 0, "and lets go of it"


def test_emotions_are_stripped_and_written_on_once(lm, tmp_path, writes):
    writes(lambda prompt, seed: "Sadly, " + SHIPPED[0].text)
    summary = stories.write(lm, tmp_path / "s.jsonl", [" sad", "calm", "sad "], TOPICS[:1], progress=False)
    records = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [(r["emotion"], r["rejected"]) for r in records] == [("sad", "named the emotion"), ("calm", None)]
    assert summary.asked == 2


def test_a_refusal_is_told_from_a_story_in_the_first_person():
    for text in ("I'm sorry, but I cannot write that.", "Sorry, I can’t help with that.", "I won't create such a scene.",
                 "As an AI, I have no feelings.", "I'm unable to fulfill this request.", "I apologize, but I can't assist you.",
                 "**I cannot in good conscience continue.**", "I am not able to provide it.", "I'm afraid I cannot comply."):  # fmt: skip
        assert stories.REFUSAL.match(text), text
    for text in ("I can't feel my hands on the rail.", "Sorry was all he could say.", "I'm afraid of the stairs tonight.",
                 "I won't look at the clock again.", "I can't help smiling.", "I cannot breathe. I write to her."):  # fmt: skip
        assert not stories.REFUSAL.match(text), text
    assert not any(stories.REFUSAL.match(story.text) for story in SHIPPED)


def test_a_corpus_may_hold_any_line_separator_inside_its_texts(tmp_path):
    text = "one\u2028two\u0085three"
    (tmp_path / "c.jsonl").write_text(json.dumps({"emotion": "a", "text": text}, ensure_ascii=False) + "\n", "utf-8")
    assert [story.text for story in corpus.load(tmp_path / "c.jsonl").stories] == [text]


def test_a_story_depends_on_its_seed_and_subject_alone(lm, tmp_path, writes):
    """Whatever shares its batch: the seeds given to the model are of the story."""
    seeds = {}
    for rows in (1, 4):
        seeds[rows] = []
        writes(lambda prompt, seed, rows=rows: seeds[rows].append((prompt, seed)) or SHIPPED[0].text)
        stories.write(lm, tmp_path / f"{rows}.jsonl", ["sad", "calm"], TOPICS, rows=rows, progress=False)
    assert sorted(set(seeds[1])) == sorted(set(seeds[4])) and len({seed for _, seed in seeds[1]}) == 4
    assert all(
        str(about) in prompt for (prompt, _), about in zip(seeds[1], ["ferry", "ferry", "oven", "oven"], strict=True)
    )


def test_the_model_writes_for_real(tmp_path, monkeypatch):
    monkeypatch.setattr(stories, "NEW_TOKENS", 5)
    out = tmp_path / "stories.jsonl"
    summary = stories.write(jaxemo.load("smollm2-135m"), out, ["sad"], TOPICS[:1], rows=1, progress=False)
    assert summary.rejected == {"too short": 1} and json.loads(out.read_text())["text"]


def test_a_text_that_breaks_off_ends_with_its_last_whole_sentence():
    assert stories._tidy("**A title**\nOne. Two!\n\nThr", True) == "One. Two!"
    assert stories._tidy("One. Two and three", False) == "One. Two and three"
    assert stories._tidy("One. Two.", True) == "One. Two."
    for text in (
        "He was **fine** and left.\nThe door closed.",
        "It was bay # 4.\nThe door.",
        "**Now** he ran.\nThe door.",
    ):
        assert stories._tidy(text, False) == text.replace("\n", " ")


# ---- quality ---------------------------------------------------------------------------------------------------------


def test_each_fault_is_found_and_named():
    base = [corpus.Story(e, t, s.text) for (e, t), s in zip([("sad", "call"), ("sad", "meal"), ("calm", "call"),
            ("calm", "meal")], SHIPPED[:4], strict=True)]  # fmt: skip
    assert quality.check(base, encode).problems == ()

    def problems(i, text, topic=None):
        changed = list(base)
        changed[i] = changed[i]._replace(text=text, topic=topic or changed[i].topic)
        return quality.check(changed, encode).problems

    assert problems(0, base[0].text + " He was saddened.") == ("sad, call (1): names its emotion: 'saddened'",)
    assert problems(1, "Too short.")[0] == "sad, meal (2): 2 words, fewer than 90"
    assert "repeats its words" in problems(2, "again and " * 60)[0]
    assert problems(3, base[1].text) == ("calm, meal (4): nearly repeats sad, meal (2)",)
    assert problems(3, base[3].text, "call") == (
        "calm, call: 2 stories where others have 1", "calm, meal: 0 stories where others have 1",
    )  # fmt: skip
    run = "one two three four five six seven"
    many = [s._replace(text=f"{s.text} {run}") for s in base]
    assert quality.check(many, encode).problems == (f"{run!r} stands in 4 stories, the first sad, call (1)",)
    named = [s._replace(text=f"{s.text} and then Ludmila came, as {i}") for i, s in enumerate(base)]
    assert next(p for p in quality.check(named, encode).problems if "Ludmila" in p).startswith("'Ludmila' stands in 4")
    opened = [s._replace(text=f"All at once {s.text}") for s in base]
    assert quality.check(opened, encode).problems == ("4 stories begin with 'all at once', the first sad, call (1)",)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_near_duplicates_are_those_of_the_exact_similarity(share):
    """MinHash errs by about 1/sqrt(128): pairs well to either side of the limit are told."""
    rng = np.random.default_rng(0)
    words = SHIPPED[5].text.split()
    changed = [w if rng.random() > share else f"w{i}" for i, w in enumerate(words)]
    a, b = (quality.runs_of(" ".join(w), 3) for w in (words, changed))
    exact = len(a & b) / len(a | b)
    assert abs(exact - quality.ALIKE) > 0.15, "chosen so"
    seen = quality.Seen()
    assert seen.duplicate("a", " ".join(words)) is None
    assert (seen.duplicate("b", " ".join(changed)) == "a") == (exact > quality.ALIKE)
