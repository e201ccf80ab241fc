"""Is the emotion that a message implies there before the model answers? (paper, "Validation": implicit prompts and numbers)

Read is the last token before the answer in the model's own chat template; for a model without one, the end of the text.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats
from tqdm import tqdm

from jaxemo import tokens
from jaxemo.capture import Capture
from jaxemo.emotions import classification, corpus, methods
from jaxemo.emotions.classification import Classification
from jaxemo.emotions.vectors import EmotionVectors, listed
from jaxemo.language_model import LanguageModel


def before_answer(
    lm: LanguageModel, prompts: Sequence[str], max_tokens: int = 2048, progress: bool = False
) -> tuple[np.ndarray, str]:
    """The residual stream `[n, L, D]` where the answer to each of the user's `prompts` begins, and what that position is:
    "before_answer", or "last" (the end of the text) where the model has no chat template."""
    prompts = listed("prompts", prompts)
    if lm.tokenizer.chat_template:
        where, chats = tokens.BEFORE_ANSWER, [[{"role": "user", "content": prompt}] for prompt in prompts]
        return read_rows(lm, tokens.encode(lm.tokenizer, chats), where, max_tokens, progress), where
    return read_rows(lm, tokens.encode(lm.tokenizer, list(prompts)), "last", max_tokens, progress), "last"


def read_rows(lm: LanguageModel, rows, selection: tokens.Selection, max_tokens: int, progress: bool) -> np.ndarray:
    """The mean residual stream `[n, L, D]` over the `selection` of each row of token ids, in batches of a single shape."""
    found = np.zeros((len(rows), lm.config.n_layers, lm.config.d_model))
    length = tokens.bucket(max(map(len, rows)))
    size = min(len(rows), max(1, max_tokens // length))
    wanted = Capture(mean={"resid_post": "all"}, tokens=selection)
    for at in tqdm(range(0, len(rows), size), unit="batch", desc="prompts", disable=not progress):
        part = list(rows[at : at + size])
        batch = tokens.pad(part + part[:1] * (size - len(part)), length)
        mean = np.asarray(lm.forward(batch, capture=wanted, logits=None).captured.mean["resid_post"])
        found[at : at + size] = np.moveaxis(mean, 0, 1)[: len(part)]
    return found


@dataclasses.dataclass(frozen=True)
class Implicit:
    """Prompts that imply an emotion, read on the directions of all the emotions implied.

    `z [E, E]` is the mean standardised score of each emotion's prompts (rows) on each direction (columns), each prompt at
    the layer of its fold; `hits` of its rows are largest on the diagonal, against `random_hits [R]` for random directions,
    and `p` is of the mean own score when the prompts' emotions are permuted. `guesses` holds each prompt's, with baselines.
    """

    position: str
    names: tuple[str, ...]
    z: np.ndarray
    hits: int
    random_hits: np.ndarray
    p: float
    guesses: Classification

    def summary(self) -> str:
        first, E = next(iter(self.guesses.guesses.values())), len(self.names)
        own, rest = self.z.diagonal().mean(), (self.z.sum() - self.z.trace()) / (E * (E - 1))
        return "\n".join([
            f"implicit prompts, read at {self.position}: {self.hits} of {E} emotions largest on the diagonal (random directions "
            f"{self.random_hits.mean():.1f}, 95 % below {np.quantile(self.random_hits, 0.95):.0f}); own z {own:+.2f}, others "
            f"{rest:+.2f}, permutation p = {self.p:.4f}; mean rank {first.rank.mean() + 1:.1f} of {E} (chance {(E + 1) / 2})",
            self.guesses.summary(),
        ])  # fmt: skip


def implicit(
    lm: LanguageModel,
    vectors: EmotionVectors,
    training: corpus.Corpus | None = None,
    records: Sequence[Mapping] | None = None,
    *,
    random: int = 100,
    seed: int = 0,
    max_tokens: int = 2048,
    progress: bool = True,
) -> Implicit:
    """Read prompts that imply an emotion: `records` of {"emotion", "prompt"}, by default the shipped ones.

    `training`, the stories that `vectors` were made from, teaches the bag-of-words and the embedding-table baseline, which are left
    out without it. Layers are chosen on one half of an emotion's prompts and used on the other.

    Raises ValueError for an emotion without a direction, or with fewer than two prompts.
    """
    records = corpus.records("implicit.jsonl") if records is None else records
    names = tuple(dict.fromkeys(record["emotion"] for record in records))
    few = [name for name in names if sum(record["emotion"] == name for record in records) < 2]
    if few or len(names) < 2:
        raise ValueError(
            f"two emotions at least, and two prompts of each are needed; there are fewer for {few or names}"
        )
    chosen, texts = vectors.select(names), [record["prompt"] for record in records]
    labels = np.array([names.index(record["emotion"]) for record in records])
    folds = classification.fold_names(labels, [""] * len(labels))
    x, position = before_answer(lm, texts, max_tokens, progress)
    layers, E = list(vectors.layers), len(names)
    drawn = np.stack([methods.project(x, vectors.random(E, seed + i).directions)[layers] for i in range(random)])
    scores = {"directions": methods.project(x, chosen.directions)[layers]}
    if training is not None:
        stories = [story for story in training.stories if story.emotion in names]
        taught, told = np.array([names.index(story.emotion) for story in stories]), [story.text for story in stories]
        table = methods.directions(classification.table_means(lm, told, 1, 10**6), taught)
        scores["bag of words"] = classification.word_scores(told, taught, texts, E)[None]
        scores["embedding table"] = methods.project(classification.table_means(lm, texts, 0, 10**6), table)
    guesses = classification.compare(
        "implicit prompts", names, ("",) * E, labels, folds, scores, drawn, layers, len(vectors.directions)
    )
    at = guesses.guesses["directions"].layers
    where = np.array([layers.index(at[fold]) if at else 0 for fold in folds])

    def by_emotion(of):
        z = classification.standardised(of, folds)[where, np.arange(len(labels))]  # [n, E]
        return z, np.stack([z[labels == e].mean(0) for e in range(E)])

    z, matrix = by_emotion(scores["directions"])
    tested = scipy.stats.permutation_test(
        (labels,), lambda of: z[np.arange(len(z)), of.astype(int)].mean(), permutation_type="pairings", vectorized=False,
        alternative="greater", n_resamples=5000, rng=np.random.default_rng(seed),
    )  # fmt: skip
    own = np.arange(E)
    hits = np.array([int((by_emotion(of)[1].argmax(1) == own).sum()) for of in drawn])
    return Implicit(position, names, matrix, int((matrix.argmax(1) == own).sum()), hits, float(tested.pvalue), guesses)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Templates whose emotion should rise or fall with a number, each with harmless counts of the same numbers as control.

    One entry for each of n pairs of a template and an emotion. `expected [n]` is +1 where it should rise and −1 where it should fall.
    `rho [n]` is Spearman's of score and number, `slope [n]` the change of score over the range of numbers (standard deviations
    of the scores of prompts); both times `expected`, so positive is right. `control_rho`, `control_slope [n]` are the means of
    the same over the controls, `random_slope [R, n]` those of random directions, `random_excess [R, n]` less their controls.
    `curves` holds a template's numbers and each emotion's scores on it and on its controls, for the figure.
    """

    layer: int
    position: str
    templates: tuple[str, ...]
    emotions: tuple[str, ...]
    expected: np.ndarray
    rho: np.ndarray
    control_rho: np.ndarray
    slope: np.ndarray
    control_slope: np.ndarray
    random_slope: np.ndarray
    random_excess: np.ndarray
    curves: dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]

    @property
    def excess(self) -> np.ndarray:
        """The slope `[n]` beyond the same numbers counting something harmless."""
        return self.slope - self.control_slope

    @property
    def p(self) -> float:
        """How often random directions, one for each emotion, have as large a mean excess."""
        return float((1 + np.sum(self.random_excess.mean(1) >= self.excess.mean())) / (1 + len(self.random_excess)))

    def summary(self) -> str:
        n = len(self.rho)
        lines = [
            f"number templates, read at {self.position}, layer {self.layer}: {n} pairs of template and emotion",
            f"  right sign: {(self.rho > 0).sum()} of {n} (in the same direction under a harmless count: {(self.control_rho > 0).sum()}; "
            f"random directions {(self.random_slope > 0).mean() * n:.1f})",
            f"  right sign beyond the harmless count: {(self.excess > 0).sum()} of {n} (random directions "
            f"{(self.random_excess > 0).sum(1).mean():.1f}, 95 % below {np.quantile((self.random_excess > 0).sum(1), 0.95):.0f})",
            f"  slope {self.slope.mean():+.2f}, harmless count {self.control_slope.mean():+.2f}, excess {self.excess.mean():+.2f}; random directions "
            f"{self.random_excess.mean():+.2f} ± {self.random_excess.mean(1).std():.2f}, p = {self.p:.3f}",
            "  template             emotion       expected    rho   control   slope   control   random sd",
        ]  # fmt: skip
        for i in range(n):
            lines.append(
                f"  {self.templates[i][:20]:20s} {self.emotions[i]:12s}  {'rises' if self.expected[i] > 0 else 'falls':8s}  {self.rho[i]:+.2f}"
                f"   {self.control_rho[i]:+.2f}   {self.slope[i]:+6.2f}    {self.control_slope[i]:+6.2f}      {self.random_slope[:, i].std():.2f}"
            )
        return "\n".join(lines)


def numbers(
    lm: LanguageModel,
    vectors: EmotionVectors,
    layer: int | None = None,
    records: Sequence[Mapping] | None = None,
    *,
    random: int = 100,
    seed: int = 0,
    max_tokens: int = 2048,
    progress: bool = True,
) -> Numbers:
    """Fill numbers into templates and follow the emotions named for them, at `layer` (by default `vectors.layer`).

    `records`, by default the shipped ones, are {"name", "kind": "dose" or "control", "template" with "{n}", "values", "rises",
    "falls"}. A dose is compared with the controls that name it in "of", or else with those of the same values, or else with all. `expected` times the
    slope being positive counts as right; it counts for something only beyond the control and beyond random directions.

    Raises ValueError for a template without "{n}", fewer than three values, or no dose or no control.
    """
    records = corpus.records("numbers.jsonl") if records is None else records
    layer = methods.layer_of(vectors, layer)
    for record in records:
        if record["kind"] not in ("dose", "control") or "{n}" not in record["template"] or len(record["values"]) < 3:
            raise ValueError(
                f'number template {record["name"]!r}: a "dose" or "control" with "{{n}}" in it and at least three values'
            )
    doses, controls = ([r for r in records if r["kind"] == kind] for kind in ("dose", "control"))
    named = [
        (d, e, sign) for d in doses for key, sign in (("rises", 1), ("falls", -1)) for e in listed(key, d.get(key, ()))
    ]
    if not named or not controls:
        raise ValueError(
            "number templates need a dose that names emotions, and a control that counts something harmless"
        )
    filled = [r["template"].replace("{n}", str(value)) for r in records for value in r["values"]]
    x, position = before_answer(lm, filled, max_tokens, progress)
    names = tuple(dict.fromkeys(e for _, e, _ in named))
    chosen = [vectors.select(names), *(vectors.random(len(names), seed + i) for i in range(random))]
    d = np.stack([v.directions[layer] for v in chosen])  # [1 + R, E, D]
    scores = np.moveaxis(x[:, layer] @ np.moveaxis(d, 1, 2), 1, 0)  # [prompts, 1 + R, E]
    scores = scores / np.maximum(scores.std(0), 1e-12)
    start = np.cumsum([0, *(len(r["values"]) for r in records)])
    of = {id(r): scores[a:b] for r, a, b in zip(records, start, start[1:], strict=False)}

    def slope(record, e):  # [1 + R]: by least squares on the number's rank, over the whole range
        rank = scipy.stats.rankdata(record["values"])
        rank = (rank - rank.mean()) / (rank.max() - rank.min())
        return rank @ of[id(record)][..., e] / (rank @ rank)

    def rho(record, e):
        found = scipy.stats.spearmanr(record["values"], of[id(record)][:, 0, e]).statistic
        return found if np.isfinite(found) else 0.0

    rows = []
    curves: dict[str, tuple[np.ndarray, dict[str, np.ndarray]]] = {}
    for dose, emotion, sign in named:
        e = names.index(emotion)
        same = [c for c in controls if c.get("of") == dose["name"]]
        same = same or [c for c in controls if list(c["values"]) == list(dose["values"])] or controls
        beside = np.mean([slope(c, e) for c in same], axis=0)
        rows.append(
            (sign, sign * rho(dose, e), sign * np.mean([rho(c, e) for c in same]), sign * slope(dose, e), sign * beside)
        )
        if dose["name"] not in curves:
            curves[dose["name"]] = np.asarray(dose["values"]), {}
        curves[dose["name"]][1][emotion] = of[id(dose)][:, 0, e]
        alike = [of[id(c)][:, 0, e] for c in same if len(c["values"]) == len(dose["values"])]
        if alike:
            curves[dose["name"]][1][f"{emotion}, control"] = np.mean(alike, axis=0)
    expected, found, control, slopes, besides = (np.array(column) for column in zip(*rows, strict=True))
    return Numbers(
        layer=layer,
        position=position,
        templates=tuple(dose["name"] for dose, _, _ in named),
        emotions=tuple(emotion for _, emotion, _ in named),
        expected=expected,
        rho=found,
        control_rho=control,
        slope=slopes[:, 0],
        control_slope=besides[:, 0],
        random_slope=slopes[:, 1:].T,
        random_excess=(slopes - besides)[:, 1:].T,
        curves=curves,
    )
