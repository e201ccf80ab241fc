"""Stories written by the probed model itself, as in the paper: 100 topics x 171 emotions x 12 at its scale.

The store is a JSONL file with one line for every story asked for, those that a filter rejected among them with the reason;
`corpus.load` reads those that were kept. Lines are written and synced a batch at a time, so a kill costs one batch, and each
story depends only on the seed and what it is about: the work goes on where it was, with the same stories.
"""

import collections
import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from jaxemo import files, params
from jaxemo.emotions import corpus, quality
from jaxemo.emotions.vectors import listed
from jaxemo.language_model import LanguageModel

PAPER = 205_200  # stories
NEW_TOKENS = 224
REFUSAL = re.compile(  # first-person stories open with "I can't feel my hands" too: what is not done must be the writing
    r"\W*(?:(?:(?:i['’]?m |i am )?(?:(?:so|very|truly) )?(?:sorry|afraid)|i apologi[sz]e|unfortunately)\b.{0,60}?)?"
    r"\b(?:as an ai\b|i(?: can(?:no|['’]| no)t| won['’]t| will not|['’]?m unable to|['’]?m not able to| am unable to| am not able to)"
    r" (?:\w+ ){0,3}?(?:(?:write|fulfil+|provide|create|comply|continue|generate|produce)\b|(?:help|assist)(?: you\b| with\b|[.,!])))",
    re.IGNORECASE,
)
TITLE = re.compile(r"\A\s*(?:\*\*[^*\n]+\*\*:?[^\S\n]*|#+ [^\n]*|title:[^\n]*)\n", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Summary:
    """`kept` of `asked` stories are in the store, the others `rejected` for reasons (counts by kind); of this run: new tokens
    and seconds."""

    out: str
    asked: int
    kept: int
    rejected: dict[str, int]
    fresh: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        reasons = ", ".join(
            f"{count:,} {reason}" for reason, count in sorted(self.rejected.items(), key=lambda r: -r[1])
        )
        lines = [
            f"{self.kept:,} of {self.asked:,} stories kept in {self.out}"
            + (f"; rejected: {reasons}" if reasons else "")
        ]
        if self.fresh:
            rate, length = self.tokens / self.seconds, self.tokens / self.fresh
            share = self.kept / max(self.asked, 1)
            hours = PAPER * length / rate / 3600
            lines.append(
                f"{self.fresh:,} stories of {length:.0f} tokens in {self.seconds:.0f} s, {rate:.0f} tokens/s: the paper's {PAPER:,} "
                f"would take {hours:,.0f} hours here"
                + (f", {hours / share:,.0f} until as many are kept" if 0 < share < 1 else "")
            )
        return "\n".join(lines)


def topics(count: int | None = None) -> list[tuple[str, str]]:
    """The first `count` of the 100 topics to write about, as (name, description): none of those that the shipped corpus is on."""
    rows = [(row["topic"], row["description"]) for row in corpus.table("topics100.csv")]
    if count is not None and not 1 <= count <= len(rows):
        raise ValueError(f"topics={count}: there are {len(rows)}")
    return rows[:count]


def write(
    lm: LanguageModel,
    out: str | os.PathLike,
    emotions: Sequence[str] | None = None,
    topics: int | Sequence[tuple[str, str]] = 12,
    per_topic: int = 1,
    rows: int = 64,
    temperature: float = 0.9,
    top_p: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> Summary:
    """Have the model write `per_topic` stories for each emotion on each topic, `rows` at a time, and keep what passes.

    Args:
      out: a JSONL file, which may hold part of the work already.
      emotions: by default the 171 of the study. Of another word, only the word itself is kept out of its stories.
      topics: how many of the 100 that come with jaxemo, or (name, description) pairs of your own.

    Rejected are refusals, stories that name their emotion, that are too short or repeat their words (see `quality.faults`) and
    near-duplicates of those kept. Raises ValueError for emotions without a name to check, topics of one name, or a store of
    other settings, weights, wording or descriptions; BlockingIOError for a store that is being written.
    """
    if emotions is None:
        emotions = [row["emotion"] for row in corpus.table("emotions.csv")]
    names = listed("emotions", emotions)
    subjects = _topics(topics) if isinstance(topics, int) else list(topics)
    if not names or not subjects or any(not isinstance(name, str) or not name.strip() for name in names):
        raise ValueError(f"emotions={emotions!r}, topics={topics!r}: at least one of each is needed")
    names = tuple(dict.fromkeys(name.strip() for name in names))
    abouts = dict(subjects)
    if len(abouts) < len(subjects):
        raise ValueError(f"topics={topics!r}: two have one name; give each its own")
    files.check_writable(out)
    wording = json.dumps([_prompt(lm, "EMOTION", "ABOUT"), str(lm.tokenizer.chat_template)])
    by = {
        "model": lm.source,
        "weights": params.fingerprint(lm.params)[:12],
        "dtype": str(lm.params["embed"].dtype),
        "prompt": hashlib.sha256(wording.encode()).hexdigest()[:12],
        "new_tokens": NEW_TOKENS,
        "seed": int(seed),
        "temperature": float(temperature),
        "top_p": float(top_p),
    }
    with open(out, "a+b") as file:
        files.lock(file, out)
        seen, done = quality.Seen(), set()
        kept: collections.Counter = collections.Counter()
        for record in _store(file, out):
            key = (record["emotion"], record["topic"], record["n"])
            if {**record["by"], "model": lm.source} != by:  # the same weights may lie elsewhere
                raise ValueError(f"{os.fspath(out)!r} was written with {record['by']}, not {by}; write elsewhere")
            if record["about"] != abouts.get(record["topic"], record["about"]):
                raise ValueError(f"{os.fspath(out)!r} has stories on {record['topic']!r} as {record['about']!r}, not "
                                 f"{abouts[record['topic']]!r}; give that topic another name, or write elsewhere")  # fmt: skip
            if key in done:
                raise ValueError(f"{os.fspath(out)!r} holds two stories {key}; take one of the lines out")
            done.add(key)
            kept[record["rejected"]] += 1
            if not record["rejected"]:
                seen.duplicate(str(len(done)), record["text"])
        jobs = [
            (name, *subject, n)
            for n in range(per_topic)
            for subject in subjects
            for name in names
            if (name, subject[0], n) not in done
        ]
        rows = max(min(rows, len(jobs)), 1)
        begin, tokens = time.monotonic(), 0
        with tqdm(
            total=len(done) + len(jobs), initial=len(done), unit="story", desc="stories", disable=not progress
        ) as bar:
            for at in range(0, len(jobs), rows):
                part = jobs[at : at + rows]
                filled = part + [part[-1]] * (rows - len(part))
                made = lm.generate(
                    [_prompt(lm, name, about) for name, _, about, _ in filled], None, NEW_TOKENS, temperature=temperature,
                    top_p=top_p, seed=[_seed(seed, name, topic, n) for name, topic, _, n in filled],
                )  # fmt: skip
                lines = []
                for (name, topic, about, n), text, length in zip(part, made.texts, made.lengths, strict=False):
                    story = corpus.Story(name, topic, _tidy(text, int(length) >= NEW_TOKENS))
                    reason = _reason(story, lm, seen, f"{name}/{topic}/{n}")
                    kept[reason] += 1
                    tokens += int(length)
                    lines.append(
                        {
                            "emotion": name,
                            "topic": topic,
                            "about": about,
                            "n": n,
                            "text": story.text,
                            "rejected": reason,
                            "tokens": int(length),
                            "by": by,
                        }
                    )
                files.append(file, lines)
                bar.update(len(part))
                bar.set_postfix_str(f"{kept[None]:,} kept, {tokens / (time.monotonic() - begin):.0f} tokens/s")
    rejected = {reason: count for reason, count in kept.items() if reason}
    return Summary(os.fspath(out), kept.total(), kept[None], rejected, len(jobs), tokens, time.monotonic() - begin)


_topics = topics


def _store(file, out) -> list[dict[str, Any]]:
    """What the store holds. Raises ValueError for a file that is no store."""
    found = files.records(file, out, "stories", [b'{"emotion": '])
    for number, record in enumerate(found, 1):
        lacking = {"emotion", "topic", "about", "n", "text", "rejected", "by"} - set(record)
        if lacking or not isinstance(record["by"], dict):
            raise ValueError(f"{os.fspath(out)!r}, line {number}: this is no store of stories; write elsewhere")
    return found


def _prompt(lm: LanguageModel, emotion: str, about: str):
    """What asks for a story, in the model's chat template or, for a base model, as a text to go on with."""
    if lm.tokenizer.chat_template:
        ask = (
            f"Write one paragraph of about 130 words: a scene about {about}, in which the main character feels {emotion} from "
            f"beginning to end. Let it show in what they do, say, think and notice. Do not write the word “{emotion}”, words "
            "related to it, or any other name for the feeling. No title and no comment: only the paragraph."
        )
        return [{"role": "user", "content": ask}]
    return (
        f"An exercise in fiction: a scene about {about}. The main character feels {emotion} throughout, which shows in what they "
        "do, say and notice; the feeling itself is never named.\n\n"
    )


def _seed(seed: int, *about) -> int:
    return int.from_bytes(hashlib.sha256(repr((seed, *about)).encode()).digest()[:4], "little") >> 1


def _tidy(text: str, unfinished: bool) -> str:
    """One paragraph without a title; what breaks off ends with its last whole sentence."""
    text = " ".join(TITLE.sub("", text, count=1).split())
    if unfinished and (ends := list(re.finditer(r"[.!?][\"'”’)]*(?= |\Z)", text))):
        text = text[: ends[-1].end()]
    return text


def _reason(story: corpus.Story, lm: LanguageModel, seen: quality.Seen, key: str) -> str | None:
    """The kind of fault for which a story is not kept, or None; a story that is kept is remembered."""
    if REFUSAL.match(story.text):
        return "refused"
    if found := quality.faults(story, lm.tokenizer.encode):
        return next(kind for sign, kind in KINDS.items() if sign in found[0])
    return "near-duplicate" if seen.duplicate(key, story.text) is not None else None


KINDS = {"names its emotion": "named the emotion", "fewer than": "too short", "repeats its words": "repetitive"}
