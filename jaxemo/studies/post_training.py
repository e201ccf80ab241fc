"""What did post-training do to the state before an answer (paper, "Post-training")? The same directions, read on a base model and on the
post-trained one.

Both read the same tokens, up to the last one before the answer in the post-trained model's own chat template. A score is standardised
by running neutral text, with each model's own mean and deviation over its tokens: a residual stream that grew, or moved wherever it
is, is no shift then. Not by neutral messages, since what changed before every answer is what is asked for.

Beside the emotions stand random directions, and contrasts between neutral texts, weighted at random: these are as much at home in the
model, and of no emotion. A shift is judged by whichever of the two moved more. Nothing is steered, nothing said of conduct, and nothing
kept on the way: a killed run begins anew.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from jaxemo import tokens
from jaxemo.capture import Capture
from jaxemo.emotions import corpus, extraction, prompts
from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.language_model import LanguageModel
from jaxemo.studies import records, statistics, store
from jaxemo.studies.choices import Claim

CLAIMS = tuple(
    Claim(f"post-training {verb} {name}", name, sign)
    for verb, sign, names in (
        ("raises", +1, ("brooding", "gloomy", "reflective")),
        ("lowers", -1, ("playful", "exuberant", "spiteful")),
    )
    for name in names
)
CONTROLS = 20  # of each kind, for each direction that is read
SHOWN = 8  # of all directions, at either end


@dataclasses.dataclass(frozen=True)
class Stream:
    """The residual stream of one model after one block: `before [n, D]` at the last token before an answer, the means `texts [m, D]` of
    neutral texts, and `mean [D]` and `covariance [D, D]` of their tokens."""

    before: np.ndarray
    texts: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of one claim: the `effect`, how much higher the direction stands before an answer after post-training, in standard
    deviations of neutral text (its p after Holm's correction over the claims); the same for each group of messages (`by`, mean and
    95 % interval); and the `cosine` of the two models' own directions, where both were given. None where there is no such direction."""

    claim: Claim
    effect: statistics.Effect | None
    by: dict[str, tuple[float, float, float]]
    cosine: float | None
    verdict: str


@dataclasses.dataclass(frozen=True)
class PostTraining:
    """The shift of every direction from `base` to `post`. `shift`, `low`, `high` `[E]` are those of `names`, mean over messages and 95 %
    interval, and `p [E]` those of so large a shift by chance, after Holm's correction over all of them. `moved` is how far neutral text
    itself moved along the directions (root mean square, taken out of the shifts), `chance` the root mean square shift of "random"
    directions and of "contrasts" between neutral texts. Where the base's own directions were given, `cosine [E]` is that of each with
    its namesake, and `others` what 95 % of those of different emotions stay below."""

    base: str
    post: str
    directions_of: str
    position: str
    messages: dict[str, int]
    names: tuple[str, ...]
    shift: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    rows: tuple[Row, ...]
    moved: float
    chance: dict[str, float]
    detectable: float
    cosine: np.ndarray | None
    others: float | None

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Claim, how it was read, effect, p and verdict, as text."""
        return [
            (row.claim.text, "before answer", row.effect.interval if row.effect else "not measured",
             f"{row.effect.p:.2g}" if row.effect else "", row.verdict)
            for row in self.rows
        ]  # fmt: skip

    def __str__(self) -> str:
        read = ", ".join(f"{n} {group}" for group, n in self.messages.items())
        chance = ", ".join(f"{kind} {rms:.3f}" for kind, rms in self.chance.items())
        lines = [
            f"post-training on {self.post}, against {self.base}: {read}, read at {self.position}, on directions of {self.directions_of}",
            f"in standard deviations of each model's own neutral text, which itself moved by {self.moved:.2f}; root mean square shift of "
            f"{chance}; found with a power of 80 %: {self.detectable:.3f}",
        ]
        if self.cosine is None:
            lines.append("whether the directions mean the same on both is not known: none of the base's own were given")
        else:
            least = int(self.cosine.argmin())
            lines.append(
                f"the two models' own directions: cosine {self.cosine.mean():+.2f} on average, least {self.cosine[least]:+.2f} "
                f"({self.names[least]}); of different emotions 95 % stay below {self.others:+.2f}"
            )
        for row in self.rows:
            more = "".join(
                f"; {group} {mean:+.3f} [{low:+.3f}, {high:+.3f}]" for group, (mean, low, high) in row.by.items()
            )
            more += f"; cosine {row.cosine:+.2f}" if row.cosine is not None else ""
            lines.append(f"  {row.claim.text}: {row.effect or 'not measured'}{more} -> {row.verdict}")
        order, shown = np.argsort(-self.shift), min(SHOWN, len(self.names) // 2)
        for what, some in (("highest", order[:shown]), ("lowest", order[::-1][:shown])):
            lines.append(f"{what} of {len(self.names)}:")
            lines += [f"  {self.shift[e]:+.3f} [{self.low[e]:+.3f}, {self.high[e]:+.3f}], p = {self.p[e]:.2g} {self.names[e]}"
                      for e in some]  # fmt: skip
        return "\n".join(lines)


def spread(stream: Stream, directions: np.ndarray) -> np.ndarray:
    """The standard deviations `[K]` of neutral tokens along `directions [K, D]`."""
    return np.sqrt(np.maximum(((directions @ stream.covariance) * directions).sum(1), 1e-24))


def standing(stream: Stream, directions: np.ndarray) -> np.ndarray:
    """How high each message stands on `directions [K, D]` before its answer, `[n, K]`, in standard deviations from the mean of the same
    model's neutral tokens."""
    return (stream.before - stream.mean) @ directions.T / spread(stream, directions)


def controls(stream: Stream, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Directions `[count, D]` of no emotion: "random" ones, and "contrasts" between neutral texts, weighted at random."""
    rng, (m, D) = np.random.default_rng(seed), stream.texts.shape
    drawn, weights = rng.standard_normal((count, D)), rng.standard_normal((count, m))
    return {"random": drawn, "contrasts": weights @ (stream.texts - stream.texts.mean(0))}


def judge(
    base: Stream,
    post: Stream,
    names: Sequence[str],
    directions: np.ndarray,
    groups: Sequence[str],
    claims: Sequence[Claim] = CLAIMS,
    own: np.ndarray | None = None,
    seed: int = 0,
) -> dict:
    """What the streams of both models say of the shifts along `directions [E, D]` (see PostTraining, whose fields are returned).

    `groups [n]` names that of each message; `own [E, D]` are the base's own directions, if they are known.
    """
    names = list(names)
    difference = standing(post, directions) - standing(base, directions)  # [n, E]
    by_chance = {
        kind: (standing(post, of).mean(0) - standing(base, of).mean(0))[:, None]
        for kind, of in controls(post, CONTROLS * len(names), seed).items()
    }
    chance = {kind: float(np.sqrt((of**2).mean())) for kind, of in by_chance.items()}
    random = by_chance[max(chance, key=lambda kind: chance[kind])]  # the harder to beat
    effects = {name: statistics.effect(difference[:, e], random) for e, name in enumerate(names)}
    cosine = others = None
    if own is not None:
        both = directions @ own.T
        cosine, others = both.diagonal().copy(), float(np.quantile(both[~np.eye(len(names), dtype=bool)], 0.95))
    named = statistics.holm({claim.emotion: effects[claim.emotion].p for claim in claims if claim.emotion in effects})
    rows = []
    for claim in claims:
        if claim.emotion not in effects:
            rows.append(Row(claim, None, {}, None, "uninformative: there is no direction of that name"))
            continue
        e = names.index(claim.emotion)
        effect = dataclasses.replace(effects[claim.emotion], p=named[claim.emotion])
        by = {group: statistics.interval(difference[np.asarray(groups) == group, e]) for group in dict.fromkeys(groups)}
        said, alike = statistics.verdict(effect, claim.sign), None
        if cosine is not None and others is not None:
            alike = float(cosine[e])
            if alike <= others:
                said = f"uninformative: the base's own direction is another (cosine {alike:+.2f})"
        rows.append(Row(claim, effect, by, alike, said))
    p = statistics.holm({name: effect.p for name, effect in effects.items()})
    moved = (post.mean - base.mean) @ directions.T / spread(post, directions)
    return {
        "names": tuple(names),
        "shift": np.array([effects[name].mean for name in names]),
        "low": np.array([effects[name].low for name in names]),
        "high": np.array([effects[name].high for name in names]),
        "p": np.array([p[name] for name in names]),
        "rows": tuple(rows),
        "moved": float(np.sqrt((moved**2).mean())),
        "chance": chance,
        "detectable": statistics.detectable(random, len(named) or 1),
        "cosine": cosine,
        "others": others,
    }


def check(base: LanguageModel, post: LanguageModel, chats: Sequence, texts: Sequence[str]) -> None:
    """Raise ValueError, naming the difference, unless both models have one outline and read `chats` and `texts` as the same tokens, and
    there is a place before an answer."""
    if base.config.outline != post.config.outline:
        raise ValueError(
            f"the base has {base.config.outline}; the post-trained model {post.config.outline}: directions can be read on both only where "
            "one was made from the other"
        )
    if not post.tokenizer.chat_template:
        raise ValueError(
            f"{post.source or 'the post-trained model'} has no chat template, so there is no place before an answer to read"
        )
    known = [{i: token for token, i in lm.tokenizer.backend.get_vocab().items()} for lm in (base, post)]
    if other := [i for i in sorted(known[0].keys() | known[1].keys()) if known[0].get(i) != known[1].get(i)]:
        here, there = (of.get(other[0]) for of in known)
        raise ValueError(
            f"the tokenizers differ in {len(other)} tokens: {other[0]} is {here!r} for the base and {there!r} for the post-trained model"
        )
    for text in [*map(post.tokenizer.render, chats), *texts]:
        ids = [lm.tokenizer.backend.encode(text, add_special_tokens=False).ids for lm in (base, post)]
        if ids[0] != ids[1]:
            raise ValueError(f"the tokenizers cut a text in other places: {text[:60]!r}")


def read(
    lm: LanguageModel,
    chats: Sequence,
    neutral: Sequence[Sequence[int]],
    layer: int,
    max_tokens: int = 2048,
    progress: bool = True,
) -> Stream:
    """The Stream of one model after block `layer`, from the token ids of `chats` and of `neutral` texts.

    Of these, tokens from `extraction.SKIP` on are counted, as where vectors are calibrated.
    """
    before = prompts.read_rows(lm, chats, tokens.BEFORE_ANSWER, max_tokens, progress)[:, layer]
    D, count = lm.config.d_model, 0
    total, square, texts = np.zeros(D), np.zeros((D, D)), np.zeros((len(neutral), D))
    wanted = Capture(raw={"resid_post": [layer]})
    with tqdm(total=len(neutral), unit="text", desc="neutral text", disable=not progress) as bar:
        for indices, batch in tokens.length_batches(neutral, max_tokens):
            found = np.asarray(lm.forward(batch, capture=wanted, logits=None).captured.raw["resid_post"])[0]
            for j, i in enumerate(indices):
                x = found[j, extraction.SKIP : len(neutral[i])].astype(np.float64)
                texts[i] = x.mean(0)
                total, square, count = total + x.sum(0), square + x.T @ x, count + len(x)
            bar.update(len(indices))
    mean = total / count
    return Stream(before, texts, mean, square / count - np.outer(mean, mean))


def study(
    base: LanguageModel,
    post: LanguageModel,
    vectors: EmotionVectors,
    out: str | os.PathLike,
    base_vectors: EmotionVectors | None = None,
    items: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PostTraining:
    """Read both models and judge; the result is kept in `out`/post-training.json and .txt.

    `vectors`, mostly the post-trained model's, are read on both at `vectors.layer`; `base_vectors` are the base's own, extracted in the
    same way, and tell whether they are the same there. `items` are the user's messages by group, by default those of the study of
    prediction and the questions of the shipped neutral texts.

    Raises ValueError for models of another outline or tokenizer, a post-trained model without a chat template, vectors of another
    model, or `base_vectors` without one of the names.
    """
    place = pathlib.Path(out)
    place.mkdir(parents=True, exist_ok=True)
    items = items or {
        "messages": [item["text"] for item in records("prediction.jsonl")],
        "neutral questions": [item["user"] for item in corpus.records("neutral.jsonl")],
    }
    layer, texts = vectors.layer, list(corpus.shipped().neutral)
    groups = [group for group, of in items.items() for _ in of]
    chats = [[{"role": "user", "content": text}] for of in items.values() for text in of]
    check(base, post, chats, texts)
    for lm, of in ((post, vectors), (base, base_vectors)):
        if of is not None:
            lm.check_directions(of, layer)
    own = None if base_vectors is None else base_vectors.select(vectors.names).directions[layer].astype(np.float64)
    # The post-trained model's tokenizer writes for both: a base may have no template, or another beginning of a text.
    asked = tokens.encode(post.tokenizer, chats)
    longest = min(extraction.LONGEST, post.config.max_positions)
    neutral = [row for text in texts if len(row := post.tokenizer.encode(text)[:longest]) > extraction.SKIP]
    before, after = (read(lm, asked, neutral, layer, progress=progress) for lm in (base, post))
    directions = vectors.directions[layer].astype(np.float64)
    found = judge(before, after, vectors.names, directions, groups, own=own, seed=seed)
    result = PostTraining(
        base.source or base.config.family, post.source or post.config.family,
        str(vectors.provenance.get("model") or "a model not named"), f"{tokens.BEFORE_ANSWER}, layer {layer}",
        {group: len(of) for group, of in items.items()}, **found,
    )  # fmt: skip
    store.save(result, place, "post-training")
    return result
