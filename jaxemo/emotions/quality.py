"""Is a corpus fit to extract from? What can be checked by program: leakage, length, repetition, balance.

A story must not name its emotion, must be long enough to be read from the 50th token on, and must resemble no other; every
emotion must have as many stories on a topic as every other, so that topics cancel.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

import datasketch
import numpy as np

from jaxemo.emotions.corpus import Story, leak

WORDS, TOKENS = 90, 115  # a story has at least as many
RUN, SHARED = 7, 3  # a run of 7 words stands in at most 3 stories
OPENING, OPENED = 3, 3  # the first 3 words, likewise
NAMED = 0.01  # the share of stories in which one name may stand
ALIKE = 0.5  # the Jaccard similarity of two stories' word triples from which they are near-duplicates
VARIED = 0.5  # a story's types by its tokens, at least
PERMUTATIONS = 128
TITLES = re.compile(
    "mr|mrs|miss|ms|dr|doctor|sir|madam|lady|lord|uncle|aunt|auntie|mum|mummy|mam|mama|dad|daddy|papa|father|mother|sister|brother|"
    "nurse|captain|sergeant|granny|gran|grandma|grandpa|nan|god|monday|tuesday|wednesday|thursday|friday|saturday|sunday|january|"
    "february|march|april|may|june|july|august|september|october|november|december|christmas|easter|english|french|german|"
    "spanish|italian|turkish|polish|greek|irish|welsh|norwegian|portuguese",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Quality:
    """`problems` names each story at fault and why; `figures` are what the corpus is like."""

    problems: tuple[str, ...]
    figures: dict[str, float]

    def __str__(self) -> str:
        lines = [f"{name:44s} {value:>10,.2f}".rstrip("0").rstrip(".") for name, value in self.figures.items()]
        return "\n".join([*lines, f"{'problems':44s} {len(self.problems):>10,}", *self.problems])


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())


def runs_of(text: str, n: int) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def names_of(text: str) -> set[str]:
    """Words with a capital inside a sentence: mostly names of people and places."""
    found = set(re.findall(r"(?<=[\w,;:] )[A-Z][^\W\d_]{2,}", text))
    return {name for name in found if not TITLES.fullmatch(name)}


def signature(text: str) -> datasketch.MinHash:
    """The MinHash of a text's word triples."""
    made = datasketch.MinHash(PERMUTATIONS)
    made.update_batch([" ".join(run).encode() for run in runs_of(text, 3)])
    return made


class Seen:
    """Texts met so far, by which a near-duplicate is known (locality-sensitive hashing of MinHashes)."""

    def __init__(self):
        self._index = datasketch.MinHashLSH(ALIKE, PERMUTATIONS)
        self._signatures: dict[str, datasketch.MinHash] = {}

    def duplicate(self, key: str, text: str) -> str | None:
        """The key of an earlier text that this one nearly repeats; where there is none, this one is remembered as `key`."""
        own = signature(text)
        for other in sorted(self._index.query(own)):
            if own.jaccard(self._signatures[other]) >= ALIKE:
                return other
        self._index.insert(key, own)
        self._signatures[key] = own
        return None


def faults(story: Story, encode: Callable[[str], Sequence[int]]) -> list[str]:
    """What is wrong with one story by itself; `encode` makes tokens of it."""
    words = words_of(story.text)
    found = []
    if (named := leak(story.emotion, story.text)) is not None:
        found.append(f"names its emotion: {named!r}")
    if len(story.text.split()) < WORDS:
        found.append(f"{len(story.text.split())} words, fewer than {WORDS}")
    if (tokens := len(encode(story.text))) < TOKENS:
        found.append(f"{tokens} tokens, fewer than {TOKENS}")
    if words and len(set(words)) / len(words) < VARIED:
        found.append(f"repeats its words: {len(set(words))} different ones of {len(words)}")
    return found


def check(stories: Iterable[Story], encode: Callable[[str], Sequence[int]]) -> Quality:
    """Every fault of a corpus that a program can find. `encode` makes tokens of a text, as `lm.tokenizer.encode` does."""
    stories = list(stories)
    label = [f"{story.emotion}, {story.topic or 'no topic'} ({i + 1})" for i, story in enumerate(stories)]
    problems, seen = [], Seen()
    shared: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
    opened: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
    named: dict[str, list[int]] = collections.defaultdict(list)
    for i, story in enumerate(stories):
        problems += [f"{label[i]}: {fault}" for fault in faults(story, encode)]
        if (other := seen.duplicate(str(i), story.text)) is not None:
            problems.append(f"{label[i]}: nearly repeats {label[int(other)]}")
        for run in runs_of(story.text, RUN):
            shared[run].append(i)
        opened[tuple(words_of(story.text)[:OPENING])].append(i)
        for name in names_of(story.text):
            named[name].append(i)
    for run, at in shared.items():
        if len(at) > SHARED:
            problems.append(f"{' '.join(run)!r} stands in {len(at)} stories, the first {label[at[0]]}")
    for opening, at in opened.items():
        if len(at) > OPENED:
            problems.append(f"{len(at)} stories begin with {' '.join(opening)!r}, the first {label[at[0]]}")
    for name, at in named.items():
        if len(at) > max(SHARED, NAMED * len(stories)):
            problems.append(f"{name!r} stands in {len(at)} stories, the first {label[at[0]]}")
    cells = collections.Counter((story.emotion, story.topic) for story in stories)
    emotions, topics = ({key[i] for key in cells} for i in (0, 1))
    usual = collections.Counter(cells.values()).most_common(1)[0][0] if cells else 0
    for emotion in sorted(emotions):
        for topic in sorted(topics):
            if cells[emotion, topic] != usual:
                problems.append(f"{emotion}, {topic}: {cells[emotion, topic]} stories where others have {usual}")

    lengths = [len(story.text.split()) for story in stories]
    words = [words_of(story.text) for story in stories]
    every = collections.Counter(word for story in words for word in story)
    figures = {
        "stories": len(stories),
        "emotions": len(emotions),
        "topics": len(topics),
        "words": sum(lengths),
        "words a story, median": float(np.median(lengths)) if lengths else 0.0,
        "words a story, fewest": min(lengths, default=0),
        "words a story, most": max(lengths, default=0),
        "tokens a story, fewest": min((len(encode(story.text)) for story in stories), default=0),
        "different words": len(every),
        "types by tokens in a story, mean": float(np.mean([len(set(w)) / max(len(w), 1) for w in words])) if words else 0.0,
        "7-word runs in more than one story": sum(len(at) > 1 for at in shared.values()),
        "stories that share an opening, most": max(map(len, opened.values()), default=0),
        "stories that share a name, most": max(map(len, named.values()), default=0),
    }  # fmt: skip
    return Quality(tuple(problems), figures)
