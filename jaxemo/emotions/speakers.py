"""Whose emotion is it? Directions for the speaker who is speaking and for the one who listens (paper, "Other speakers").

In dialogues whose two speakers feel independently of each other, the residual stream over one speaker's words is averaged by what
that speaker feels ("present") and by what the other one feels ("other").
"""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxemo import tokens
from jaxemo.emotions import classification, corpus, methods, prompts, statistics
from jaxemo.emotions.vectors import EmotionVectors, listed
from jaxemo.language_model import LanguageModel

FOLDS = 3
NAMED = ("A", "B")  # the speakers of dialogues that do not name them


@dataclasses.dataclass(frozen=True)
class Speakers:
    """Directions of both kinds and how alike they are, from n readings (two of each dialogue) of E emotions.

    `present` and `other` `[L, E, D]` are differences of means, not scaled. `cosine [L, E]` is between an emotion's two;
    `cosine_mixed [L]` the mean between different emotions', `stories [L, 2, E]` with the directions of stories (NaN for emotions
    without). `hits [2, n]` says which present and other emotions are told right from directions of other dialogues at `layers`,
    one a fold, chosen within what is learnt from; `chance [2]` is what always guessing the commonest gets, and `shuffled [2, R]`
    what directions of permuted emotions get.
    """

    names: tuple[str, ...]
    layer: int
    present: np.ndarray
    other: np.ndarray
    cosine: np.ndarray
    cosine_mixed: np.ndarray
    stories: np.ndarray
    hits: np.ndarray
    layers: np.ndarray  # [2, FOLDS]
    chance: np.ndarray
    shuffled: np.ndarray

    def summary(self) -> str:
        n, at = self.hits.shape[1], self.layer
        lines = [
            f"speakers at layer {at}: cosine of present and other direction of the same emotion {self.cosine[at].mean():+.2f} "
            f"(± {self.cosine[at].std():.2f} over {len(self.names)} emotions), of different emotions {self.cosine_mixed[at]:+.2f}"
        ]
        for i, kind in enumerate(("present", "other")):
            low, high = statistics.wilson(int(self.hits[i].sum()), n)
            with_stories = (
                f"; cosine with stories' {np.nanmean(self.stories[at, i]):+.2f}"
                if np.isfinite(self.stories[at, i]).any()
                else ""
            )
            lines.append(
                f"  {kind:8s} emotion of {n} readings told right: {self.hits[i].mean():.1%} [{low:.1%}, {high:.1%}] (commonest "
                f"{self.chance[i]:.1%}, permuted emotions {self.shuffled[i].mean():.1%}, 95 % below {np.quantile(self.shuffled[i], 0.95):.1%})"
                f"{with_stories}"
            )  # fmt: skip
        return "\n".join(lines)


def speakers(
    lm: LanguageModel,
    dialogues: Sequence[Mapping] | None = None,
    vectors: EmotionVectors | None = None,
    layer: int | None = None,
    *,
    shuffles: int = 20,
    seed: int = 0,
    max_tokens: int = 2048,
    progress: bool = True,
) -> Speakers:
    """Extract and compare both kinds of directions, from dialogues of {"emotions": [first's, second's], "turns": [{"speaker":
    0 or 1, "text"}, ...]} and, if you like, "speakers": [first's name, second's]; by default the shipped ones.

    Counted are each speaker's turns once the other one has spoken. `layer` is what `summary` speaks of (default: four fifths of the way
    up); `vectors` are those of stories to compare with. Readings are told in thirds of the dialogues, learning from the other two.

    Raises ValueError for a dialogue in which a speaker says nothing after the other, or fewer than three dialogues an emotion.
    """
    dialogues = corpus.records("dialogues.jsonl") if dialogues is None else dialogues
    felt = [
        [listed("emotions", d["emotions"])[speaker] for d in dialogues for speaker in order]
        for order in ((0, 1), (1, 0))
    ]
    names = tuple(sorted(set(felt[0]) | set(felt[1])))
    x = readings(lm, dialogues, max_tokens, progress)
    y = np.array([[names.index(name) for name in one] for one in felt])  # [2, n]: the speaker's own, the other's
    fold = np.arange(len(dialogues)).repeat(2) % FOLDS
    for name, e in zip(names, range(len(names)), strict=True):
        if any((one[fold != f] == e).sum() < 2 for one in y for f in range(FOLDS)):
            raise ValueError(
                f"{name!r} is felt in too few dialogues: three at least, of which two can be learnt from at a time"
            )
    present, other = (methods.directions(x, one) for one in y)
    unit = [v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12) for v in (present, other)]
    cosines = np.einsum("led,lfd->lef", *unit)
    same = np.einsum("lee->le", cosines)
    E, L = len(names), lm.config.n_layers
    stories = np.full((L, 2, E), np.nan)
    for e, name in enumerate(names):
        if vectors is not None and name in vectors.names:
            stories[:, :, e] = np.einsum(
                "kld,ld->lk", np.stack(unit)[:, :, e], vectors.directions[:, vectors.index(name)]
            )
    told = [_told(x, one, fold) for one in y]
    rng = np.random.default_rng(seed)
    at = round(0.8 * L) if layer is None else layer
    return Speakers(
        names=names,
        layer=min(at, L - 1),
        present=present,
        other=other,
        cosine=same,
        cosine_mixed=(cosines.sum((1, 2)) - same.sum(1)) / max(1, E * (E - 1)),
        stories=stories,
        hits=np.stack([hits for hits, _ in told]),
        layers=np.stack([layers for _, layers in told]),
        chance=np.array([np.bincount(one).max() / len(one) for one in y]),
        shuffled=np.array([[_told(x, _shuffled(rng, one, fold), fold, fixed)[0].mean() for _ in range(shuffles)]
                           for one, (_, fixed) in zip(y, told, strict=True)]),
    )  # fmt: skip


def _shuffled(rng, labels, fold):
    """Labels permuted within each fold, so that each keeps every label often enough to learn it."""
    out = labels.copy()
    for f in np.unique(fold):
        out[fold == f] = rng.permutation(out[fold == f])
    return out


def _told(x, labels, fold, layers=None) -> tuple[np.ndarray, np.ndarray]:
    """Which of the readings `x [n, L, D]` are told right `[n]`, and at which layer for each fold.

    A fold's layer is the one at which directions learnt from the next fold tell the one after it best.
    """

    def right(learnt, asked, at=slice(None)):
        known = np.unique(labels[learnt])
        d = methods.directions(x[learnt][:, at], np.searchsorted(known, labels[learnt]))
        z = classification.standardised(methods.project(x[asked][:, at], d), [""] * asked.sum())
        return known[z.argmax(-1)] == labels[asked]  # [L, asked]

    hits, chosen = np.zeros(len(labels), bool), np.zeros(FOLDS, int)
    for f in range(FOLDS):
        others = [fold == (f + i) % FOLDS for i in (1, 2)]
        if layers is None:
            found = right(others[0], others[1]).mean(1) + right(others[1], others[0]).mean(1)
            chosen[f] = found.argmax()
        else:
            chosen[f] = layers[f]
        hits[fold == f] = right(others[0] | others[1], fold == f, slice(chosen[f], chosen[f] + 1))[0]
    return hits, chosen


def readings(
    lm: LanguageModel, dialogues: Sequence[Mapping], max_tokens: int = 2048, progress: bool = False
) -> np.ndarray:
    """The mean residual stream `[2 n, L, D]` over each speaker's turns after the first turn: of the first dialogue's first
    speaker, its second, and so on."""
    rows = [_encoded(lm, dialogue) for dialogue in dialogues]
    both = [prompts.read_rows(lm, rows, f"speaker {speaker}", max_tokens, progress) for speaker in (0, 1)]
    return np.stack(both, axis=1).reshape(-1, *both[0].shape[1:])


def _encoded(lm: LanguageModel, dialogue: Mapping) -> tokens.Ids:
    """The dialogue as lines of "Name: words", its token ids knowing whose words they are (the names are nobody's)."""
    text, places = "", []
    for i, turn in enumerate(dialogue["turns"]):
        text += ("\n" if i else "") + dialogue.get("speakers", NAMED)[turn["speaker"]] + ":"
        start = len(text)
        text += " " + turn["text"].strip()
        if i:
            places.append((turn["speaker"], start, len(text)))
    if {speaker for speaker, *_ in places} != {0, 1}:
        raise ValueError(f"a dialogue needs both speakers after its first turn: {text[:80]!r}")
    encoded = lm.tokenizer.backend.encode(text, add_special_tokens=False)
    starts, stops = [a for a, _ in encoded.offsets], [b for _, b in encoded.offsets]
    ahead = len(lm.tokenizer.prefix)
    ids = tokens.Ids([*lm.tokenizer.prefix, *encoded.ids])
    ids.turns = tuple(
        tokens.Turn(f"speaker {s}", ahead + bisect.bisect_right(stops, a), ahead + bisect.bisect_left(starts, b))
        for s, a, b in places
    )
    return ids
