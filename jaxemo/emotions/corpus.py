"""The corpus: stories in which a character feels an emotion that is never named, and neutral texts.

The shipped corpus was written for this project (CC0): a story for each of 171 emotions on each of the same 12 everyday
topics, so that the topic cancels, and neutral exchanges on those topics. Any corpus in the same form will do.
"""

import csv
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import os
import re
from typing import NamedTuple

DISPLAY = ("happy", "inspired", "loving", "proud", "calm", "desperate", "angry", "guilty", "sad", "afraid", "nervous",
           "surprised")  # fmt: skip  # the twelve that the paper's tests and figures use


class Story(NamedTuple):
    emotion: str
    topic: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """`stories` labelled by emotion and topic, and `neutral` texts. `name` goes into every result made from it."""

    name: str
    stories: tuple[Story, ...]
    neutral: tuple[str, ...]

    @property
    def emotions(self) -> tuple[str, ...]:
        """The emotions, in order of first appearance."""
        return tuple(dict.fromkeys(story.emotion for story in self.stories))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([self.stories, self.neutral]).encode()).hexdigest()


def data(name: str) -> str:
    """The text of a data file shipped with this package."""
    return (importlib.resources.files("jaxemo.emotions") / "data" / name).read_text(encoding="utf-8")


def table(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(data(name).splitlines()))


def records(name: str) -> list[dict]:
    """The records of a JSONL file shipped with this package."""
    return [json.loads(line) for line in data(name).splitlines()]


@functools.cache
def family(emotion: str) -> str:
    """Which of the study's ten families one of its 171 emotions belongs to. Raises ValueError for another word."""
    families = {row["emotion"]: row["family"] for row in table("emotions.csv")}
    if emotion not in families:
        raise ValueError(f"{emotion!r} is none of the {len(families)} emotions of the study; see data/emotions.csv")
    return families[emotion]


@functools.cache
def shipped() -> Corpus:
    """The corpus that comes with jaxemo: 171 emotions, each on the same 12 topics."""
    return Corpus("jaxemo corpus", _stories("data/stories.jsonl", data("stories.jsonl")), _neutral())


@functools.cache
def starter() -> Corpus:
    """24 of its emotions with a second story on each topic: quick to extract from, and less noisy."""
    second = _stories("data/second_stories.jsonl", data("second_stories.jsonl"))
    names = {story.emotion for story in second}
    first = tuple(story for story in shipped().stories if story.emotion in names)
    return Corpus("jaxemo starter corpus", first + second, _neutral())


@functools.cache
def heldout() -> Corpus:
    """Stories of all 171 emotions on two other topics, to test directions on; no extraction sees them."""
    return Corpus("jaxemo held-out stories", _stories("data/heldout.jsonl", data("heldout.jsonl")), ())


def _neutral() -> tuple[str, ...]:
    return tuple(f"{record['user']}\n\n{record['assistant']}" for record in records("neutral.jsonl"))


def named(name: str | os.PathLike) -> Corpus:
    """A corpus that comes with jaxemo, "shipped", "starter" or "heldout", or one of your own by its path (see `load`)."""
    own = {"shipped": shipped, "starter": starter, "heldout": heldout}
    return own[str(name)]() if str(name) in own else load(name)


def load(path: str | os.PathLike) -> Corpus:
    """Stories of your own: one JSON object a line with "emotion", "text" and, if you like, "topic".

    Neutral texts are the lines whose emotion is "neutral"; lines with a reason why they were "rejected", as `jaxemo stories`
    writes them, are left out. Raises ValueError naming the line at fault.
    """
    with open(path, encoding="utf-8") as file:
        stories = _stories(os.fspath(path), file.read())
    neutral = tuple(story.text for story in stories if story.emotion == "neutral")
    return Corpus(os.path.basename(path), tuple(s for s in stories if s.emotion != "neutral"), neutral)


def _stories(where: str, text: str) -> tuple[Story, ...]:
    stories = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON strings may hold what else splitlines() breaks at
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if record.get("rejected"):
                continue
            story = Story(record["emotion"], record.get("topic", ""), record["text"])
            assert all(isinstance(field, str) for field in story) and story.emotion and story.text
        except (ValueError, KeyError, AttributeError, TypeError, AssertionError) as error:
            raise ValueError(f'{where}, line {number}: expected {{"emotion": ..., "text": ...}}') from error
        stories.append(story)
    if not stories:
        raise ValueError(f"{where}: no stories in it")
    return tuple(stories)


@functools.cache
def _families() -> dict[str, re.Pattern]:
    return {r["emotion"]: re.compile(rf"\b(?:{r['pattern']})\b", re.IGNORECASE) for r in table("word_families.csv")}


def leak(emotion: str, text: str) -> str | None:
    """The first word of `text` that names `emotion` through a relative of its word, or None.

    Knows the 171 words of the study; for another word only the word itself counts.
    """
    pattern = _families().get(emotion) or re.compile(rf"\b{re.escape(emotion)}\b", re.IGNORECASE)
    found = pattern.search(text)
    return found.group() if found else None
