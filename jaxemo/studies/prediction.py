"""Does the reading before the answer predict the answer (paper: the assistant's emotion, not the user's)?

144 messages imply an emotion of the user; half of them ask for a reply of another tone. Read are the user's words and the last token
before the answer. The model's own answer is then judged by something that never saw the model: words, as they go with emotions in the
stories of the starter corpus. What the user's words alone predict is taken out of both sides.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import scipy.stats

from jaxemo import grid, tokens
from jaxemo.emotions import classification, corpus, prompts
from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.language_model import LanguageModel
from jaxemo.studies import records, statistics, store

NEW_TOKENS = 80
PERMUTATIONS = 2000


@dataclasses.dataclass(frozen=True)
class Prediction:
    """`r`: how the reading before the answer goes with the tone of the answer, mean over the emotions, the user's words held fixed; of
    `random [R]` directions; `p` when answers are dealt out anew among messages of one emotion. `user_r` is that of the user's words'
    reading. `told` are the shares of messages whose user's emotion is told, by where it is read and what reply is asked for; `less` is
    how much lower the user's emotion stands before the answer than in the user's words where another tone is asked for (mean
    difference of standardised scores, 95 % interval).
    """

    model: str
    position: str
    messages: int
    words: float
    r: float
    user_r: float
    random: np.ndarray
    p: float
    told: dict[str, float]
    less: tuple[float, float, float]
    verdicts: dict[str, str]

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Claim, how it was read, effect, p and verdict, as text."""
        predicts, whose = self.verdicts.items()
        return [(predicts[0], "own answers", f"r = {self.r:+.3f}", f"{self.p:.2g}", predicts[1]),
                (whose[0], "before answer", "{:+.3f} [{:+.3f}, {:+.3f}]".format(*self.less), "", whose[1])]  # fmt: skip

    def __str__(self) -> str:
        told = "; ".join(f"{where} {share:.0%}" for where, share in self.told.items())
        lines = [
            f"prediction on {self.model}: {self.messages} messages, answers of {self.words:.0f} words, read at {self.position}",
            f"  the reading before the answer and the answer's tone, the user's words held fixed: r = {self.r:+.3f} (p = {self.p:.2g}; "
            f"random directions at most {self.random.max():+.3f}); the reading of the user's words {self.user_r:+.3f}",
            f"  the user's emotion is told, of 12: {told}",
            "  before the answer it stands {:+.2f} [{:+.2f}, {:+.2f}] against the user's words, more so where another tone is asked for".format(
                *self.less
            ),
        ]
        return "\n".join(lines + [f"  {claim} -> {said}" for claim, said in self.verdicts.items()])


def judge(
    before: np.ndarray, user: np.ndarray, answer: np.ndarray, words: np.ndarray, labels: np.ndarray, same: np.ndarray,
    random: Sequence[np.ndarray], seed: int = 0,
) -> dict:  # fmt: skip
    """From the readings before the answer and of the user's words `[n, E]`, the tones of answer and message `[n, E]`, the user's
    emotions `labels [n]`, which replies are to have the `same` tone, and `random` readings before the answer."""
    z = {"before the answer": scipy.stats.zscore(before), "in the user's words": scipy.stats.zscore(user)}
    r = statistics.partial(before, answer, words)
    rng, dealt = np.random.default_rng(seed), []
    for _ in range(PERMUTATIONS):
        order = np.arange(len(labels))
        for label in np.unique(labels):
            at = np.flatnonzero(labels == label)
            order[at] = rng.permutation(at)
        dealt.append(statistics.partial(before, answer[order], words))
    p = (1 + sum(x >= r for x in dealt)) / (1 + PERMUTATIONS)
    by_chance = np.array([statistics.partial(x, answer, words) for x in random])
    told = {f"{where}, {what}": float((s.argmax(1) == labels)[group].mean())
            for where, s in z.items() for what, group in (("same tone", same), ("another tone", ~same))}  # fmt: skip
    gap = z["before the answer"] - z["in the user's words"]
    gap = gap[np.arange(len(labels)), labels]
    test = scipy.stats.ttest_ind(gap[~same], gap[same], equal_var=False)
    interval = test.confidence_interval(1 - statistics.ALPHA)
    less = (float(gap[~same].mean() - gap[same].mean()), float(interval.low), float(interval.high))
    verdicts = {
        "the reading before the answer predicts its tone beyond the user's words":
            "replicates" if p < statistics.ALPHA and r > by_chance.max() else "does not replicate",
        "before the answer stands the assistant's tone, not the user's":
            "replicates" if less[2] < 0 else "does not replicate",
    }  # fmt: skip
    return {
        "r": r,
        "user_r": statistics.partial(user, answer, words),
        "random": by_chance,
        "p": p,
        "told": told,
        "less": less,
        "verdicts": verdicts,
    }


def study(
    lm: LanguageModel,
    vectors: EmotionVectors,
    out: str | os.PathLike,
    random: int = 20,
    rows: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Prediction:
    """Read, answer and judge; the answers are kept in `out`/prediction.jsonl. Raises ValueError for a model without a chat template:
    what comes before an answer would mean nothing."""
    if not lm.tokenizer.chat_template:
        raise ValueError(
            f"{lm.source or 'this model'} has no chat template, so there is no place before an answer to read"
        )
    place = pathlib.Path(out)
    place.mkdir(parents=True, exist_ok=True)
    items = records("prediction.jsonl")
    chats = [[{"role": "user", "content": item["text"]}] for item in items]
    answers = grid.sweep(lm, chats, {"none": None}, max_new_tokens=NEW_TOKENS, rows=rows, out=place / "prediction.jsonl",
                         progress=progress).texts[0, :, 0].tolist()  # fmt: skip
    ids, names = tokens.encode(lm.tokenizer, chats), list(corpus.DISPLAY)
    stream = {
        where: prompts.read_rows(lm, ids, where, 2048, progress)[:, vectors.layer]
        for where in (tokens.BEFORE_ANSWER, "user")
    }
    directions = vectors.select(names).directions[vectors.layer].T
    chance = [vectors.random(len(names), seed=seed + k).directions[vectors.layer].T for k in range(random)]
    stories = [story for story in corpus.starter().stories if story.emotion in names]
    taught = np.array([names.index(story.emotion) for story in stories])
    tone, said = (
        classification.word_scores([story.text for story in stories], taught, texts, len(names))
        for texts in (answers, [item["text"] for item in items])
    )
    found = judge(
        stream[tokens.BEFORE_ANSWER] @ directions, stream["user"] @ directions, tone, said,
        np.array([names.index(item["emotion"]) for item in items]), np.array([item["reply"] == "same" for item in items]),
        [stream[tokens.BEFORE_ANSWER] @ of for of in chance], seed,
    )  # fmt: skip
    words = float(np.mean([len(answer.split()) for answer in answers]))
    result = Prediction(
        lm.source or lm.config.family, f"{tokens.BEFORE_ANSWER}, layer {vectors.layer}", len(items), words, **found
    )
    store.save(result, place, "prediction")
    return result
