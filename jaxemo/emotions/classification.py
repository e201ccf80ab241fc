"""Can the emotion of texts be told from the directions? Texts that no extraction saw (paper, "Validation").

A text's score on a direction is the projection of its mean residual stream. Every direction has an offset of its own, so the
largest raw score says little: scores are standardised for each emotion over the texts of a fold, which has no labels to
learn from. The layer is chosen on all folds but one and used on that one, in turn, so that no text chooses its own layer; or
nothing is chosen, and standardised scores are averaged over the layers from a third of the way up, but the last eighth.

The family guessed is the one whose emotions together are likeliest, exp(2 z) taken as likelihood. (The 2, the layers averaged and
all that were chosen on topics left out of the training stories of SmolLM2-135M.)
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxemo.emotions import extraction, methods, statistics
from jaxemo.emotions.corpus import Corpus
from jaxemo.emotions.vectors import EmotionVectors, listed
from jaxemo.language_model import LanguageModel

TOP = 5
SHARPNESS = 2.0  # of exp(SHARPNESS · z), the likelihood of an emotion
AVERAGED = ", layers averaged"


@dataclasses.dataclass(frozen=True)
class Guesses:
    """One way of guessing, R times over (random directions are drawn many times): the `guess [R, n]` for each text, the `rank
    [R, n]` of the right answer, 0 the first, and whether the `family [R, n]` is right; `layers` says which layer each fold was
    read at, where one was chosen."""

    guess: np.ndarray
    rank: np.ndarray
    family: np.ndarray
    layers: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Classification:
    """Guesses at the emotion of n texts out of E `names`, by every method of `guesses`; the first is what is tested, the
    others are what it is measured by.

    `labels [n]` are the right answers, `folds [n]` name the fold of each text, `families [E]` the group of each emotion (""
    for all where there are none). `by_layer [L, 3]` has top-1, top-5 and family accuracy of the tested directions at each
    layer on all texts (for the figure: its maximum is no result; NaN where they have no directions).
    """

    corpus: str
    names: tuple[str, ...]
    families: tuple[str, ...]
    labels: np.ndarray
    folds: tuple[str, ...]
    guesses: dict[str, Guesses]
    by_layer: np.ndarray

    def rates(self, method: str) -> np.ndarray:
        """Top-1, top-5 and family accuracy, each as rate and 95 % interval, `[3, 3]`.

        The interval is Wilson's over texts, or holds 95 % of the draws where there are many.
        """
        g = self.guesses[method]
        hits = np.stack([g.rank == 0, g.rank < TOP, g.family])  # [3, R, n]
        R, n = g.rank.shape
        if R > 1:
            return np.array([[h.mean(), *np.quantile(h.mean(1), [0.025, 0.975])] for h in hits])
        return np.array([[h.mean(), *statistics.wilson(int(h.sum()), n)] for h in hits])

    @property
    def layer(self) -> int:
        """The layer at which the tested directions do best on all texts (top-5): for reading anything but these texts."""
        return int(np.nanargmax(self.by_layer[:, 1]))

    @property
    def confusion(self) -> np.ndarray:
        """How many texts of each emotion (rows) the tested directions take for each (columns), `[E, E]`."""
        counts = np.zeros((len(self.names), len(self.names)), int)
        np.add.at(counts, (self.labels, next(iter(self.guesses.values())).guess[0]), 1)
        return counts

    def summary(self) -> str:
        grouped = len(set(self.families)) > 1
        heads = ["top-1", f"top-{TOP}"] + ["family"] * grouped
        wide = max(map(len, self.guesses))
        lines = [
            f"{self.corpus}: {len(self.labels)} texts, {len(self.names)} emotions" + f", {len(set(self.families))} families" * grouped,
            " " * wide + "".join(f"  {head:>20s}" for head in heads),
        ]  # fmt: skip
        for name, g in self.guesses.items():
            rates = self.rates(name)[: len(heads)]
            cells = "".join(f"  {100 * rate:5.1f} % [{100 * low:4.1f}, {100 * high:4.1f}]" for rate, low, high in rates)
            where = ", ".join(f"{layer} for {fold}" for fold, layer in g.layers.items())
            draws = f"  {len(g.rank)} draws" if len(g.rank) > 1 else ""
            lines.append(f"{name:{wide}s}{cells}" + (f"  layer {where}" if where else "") + draws)
        return "\n".join(lines)


def family_hits(z: np.ndarray, labels: np.ndarray, families: Sequence[str]) -> np.ndarray:
    """Whether the family whose emotions are together likeliest is the right one, `[..., n]`, from scores `z [..., n, E]`."""
    of = np.unique(families, return_inverse=True)[1]
    likelihood = np.exp(SHARPNESS * (z - z.max(-1, keepdims=True)))
    return (likelihood @ np.eye(of.max() + 1)[of]).argmax(-1) == of[labels]


def ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many of the E others score above the right one, `[..., n]`, of `scores [..., n, E]`; a tie counts half.

    Half, so that a score that is the same for all is right by chance only. NaN is refused, as it would be right always.
    """
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite: those of a layer without directions cannot be ranked")
    own = np.take_along_axis(scores, np.broadcast_to(labels[:, None], (*scores.shape[:-1], 1)), -1)
    return (scores > own).sum(-1) + ((scores == own).sum(-1) - 1) / 2


def standardised(scores: np.ndarray, folds: Sequence[str]) -> np.ndarray:
    """`scores [..., n, E]` less their mean and by their standard deviation over the texts of the same fold, without labels."""
    folds_, out = np.asarray(folds), np.zeros(scores.shape)
    for fold in np.unique(folds_):
        of = scores[..., folds_ == fold, :].astype(np.float64)
        centred = of - of.mean(-2, keepdims=True)
        out[..., folds_ == fold, :] = centred / np.maximum(of.std(-2, keepdims=True), 1e-12)
    return out


def fold_names(labels: np.ndarray, topics: Sequence[str]) -> tuple[str, ...]:
    """The fold of each text: its topic, or one of two groups of topics where there are more than two.

    Where all topics are the same, the texts of each label go to two folds in turn.
    """
    known = sorted(set(topics))
    if len(known) == 2:
        return tuple(topics)
    if len(known) > 2:
        return tuple("ab"[known.index(topic) % 2] for topic in topics)
    seen: dict[int, int] = {}
    turns = []
    for label in labels.tolist():
        turns.append("ab"[seen.setdefault(label, 0) % 2])
        seen[label] += 1
    return tuple(turns)


def cross_fitted(
    z: np.ndarray, labels: np.ndarray, folds: Sequence[str], families: Sequence[str], layers: Sequence[int]
) -> Guesses:
    """Guesses from standardised `z [L, n, E]`, each fold at the one of `layers` with the best top-5 accuracy on the others.

    Ties go to the lower mean rank. With a single layer there is nothing to choose, and no layer is named.
    """
    rank = ranks(z, labels)  # [L, n]
    which, chosen = np.asarray(folds), {}
    at = np.zeros(len(labels), int)
    for fold in np.unique(which) if len(rank) > 1 else ():
        others = rank[:, which != fold]
        best = max(range(len(rank)), key=lambda i: ((others[i] < TOP).mean(), -others[i].mean()))
        at[which == fold], chosen[str(fold)] = best, int(layers[best])
    texts = np.arange(len(labels))
    z = z[at, texts]
    return Guesses(z.argmax(-1)[None], rank[at, texts][None], family_hits(z, labels, families)[None], chosen)


def averaged(z: np.ndarray, layers: Sequence[int], L: int) -> np.ndarray:
    """Standardised `z [len(layers), n, E]` averaged over those of `layers` a third to seven eighths of the way up, `[1, n, E]`."""
    among = [i for i, layer in enumerate(layers) if L // 3 <= layer < L - L // 8] or list(range(len(layers)))
    return z[among].mean(0, keepdims=True)


def compare(
    corpus: str,
    names: Sequence[str],
    families: Sequence[str],
    labels: np.ndarray,
    folds: Sequence[str],
    scores: Mapping[str, np.ndarray],
    random: np.ndarray,
    layers: Sequence[int],
    L: int,
) -> Classification:
    """A Classification from arrays: `scores` of each method `[len(layers) or 1, n, E]`, the tested one first, and those of
    R draws of `random` directions `[R, len(layers), n, E]`. All are standardised here."""
    if len(set(folds)) < 2:
        raise ValueError(
            f"{corpus}: one fold cannot choose a layer for itself; give texts on two topics, or two of an emotion"
        )
    z = {name: standardised(of, folds) for name, of in scores.items()}
    guesses = {name: cross_fitted(of, labels, folds, families, layers) for name, of in z.items()}
    for name, of in z.items():
        if len(of) > 1:
            guesses[name + AVERAGED] = cross_fitted(averaged(of, layers, L), labels, folds, families, layers)
    drawn = [cross_fitted(standardised(of, folds), labels, folds, families, layers) for of in random]
    guess, right, family = (np.concatenate([getattr(g, field) for g in drawn]) for field in ("guess", "rank", "family"))
    guesses["random directions"] = Guesses(guess, right, family)
    guesses["majority"] = majority(labels, families)
    first = next(iter(z.values()))
    rank, by_layer = ranks(first, labels), np.full((L, 3), np.nan)
    hits = rank == 0, rank < TOP, family_hits(first, labels, families)
    by_layer[list(layers)] = np.stack([h.mean(-1) for h in hits], axis=-1)
    return Classification(corpus, tuple(names), tuple(families), labels, tuple(folds), guesses, by_layer)


def majority(labels: np.ndarray, families: Sequence[str]) -> Guesses:
    """Always the same guesses, those that are right most often: emotions by how frequent their family and they are."""
    of = np.unique(families, return_inverse=True)[1]
    count = np.bincount(labels, minlength=len(families))
    by_family = np.bincount(of, weights=count)
    order = np.lexsort((-count, of, -by_family[of]))
    rank = np.empty(len(families), int)
    rank[order] = np.arange(len(families))
    return Guesses(np.full((1, len(labels)), order[0]), rank[labels][None], (of[order[0]] == of[labels])[None])


def families_of(names: Sequence[str]) -> tuple[str, ...]:
    """The study's family of each name, or "" for all where one is no emotion of the study."""
    from jaxemo.emotions import corpus

    known = {row["emotion"]: row["family"] for row in corpus.table("emotions.csv")}
    names = listed("names", names)
    return tuple(known[name] for name in names) if set(names) <= set(known) else ("",) * len(names)


def _labels(names: Sequence[str], corpus: Corpus) -> np.ndarray:
    unknown = sorted({story.emotion for story in corpus.stories} - set(names))
    if unknown:
        raise ValueError(f"{corpus.name}: there are no directions for {', '.join(unknown[:5])}"
                         f"{' and others' if len(unknown) > 5 else ''}; leave their texts out")  # fmt: skip
    return np.array([names.index(story.emotion) for story in corpus.stories])


def table_means(lm: LanguageModel, texts: Sequence[str], skip: int, longest: int) -> np.ndarray:
    """Each text's mean token embedding `[n, 1, D]`, of the tokens that `extraction.pooled` counts: the model without layers."""
    table = np.asarray(lm.params["embed"], np.float32)
    return np.stack([table[lm.tokenizer.encode(text)[skip:longest]].mean(0) for text in texts])[:, None]


def word_scores(training: Sequence[str], labels: np.ndarray, texts: Sequence[str], classes: int) -> np.ndarray:
    """Bag of words: the log-probability `[n, classes]` of each class by TF-IDF and logistic regression (scikit-learn).

    Classes without training texts get the lowest.
    """
    import sklearn.feature_extraction.text
    import sklearn.linear_model

    bag = sklearn.feature_extraction.text.TfidfVectorizer(sublinear_tf=True, min_df=2)
    fitted = sklearn.linear_model.LogisticRegression(C=10, max_iter=300).fit(bag.fit_transform(training), labels)
    found = fitted.predict_log_proba(bag.transform(texts))
    out = np.full((len(texts), classes), found.min())
    out[:, fitted.classes_] = found
    return out


def classify(
    lm: LanguageModel,
    vectors: EmotionVectors,
    heldout: Corpus,
    training: Corpus,
    *,
    others: Mapping[str, EmotionVectors] | None = None,
    skip: int = extraction.SKIP,
    longest: int = extraction.LONGEST,
    random: int = 20,
    seed: int = 0,
    max_tokens: int = 2048,
    progress: bool = True,
) -> Classification:
    """The emotion of each text of `heldout`, any labelled corpus that `vectors` were not made from, by `vectors` and baselines.

    `others` are further vectors of the same emotions for the same table, by the name to list them under: of other methods (see
    `methods.extract`), or before denoising.

    Baselines: a bag of words and directions in the embedding table (the model without its layers), both from `training`, the
    stories that `vectors` were made from; `random` draws of random directions, at each layer; and always the same guess.

    Raises ValueError for a text that is in both corpora, an emotion without a direction, or texts that make no two folds.
    """
    if not heldout.stories:
        raise ValueError(f"{heldout.name}: no texts to classify")
    stories = [story for story in training.stories if story.emotion in vectors.names]
    both = {story.text for story in stories} & {story.text for story in heldout.stories}
    if both:
        raise ValueError(f"{heldout.name} and {training.name} share {len(both)} texts, such as {min(both)[:60]!r}")
    labels, topics = _labels(vectors.names, heldout), [story.topic for story in heldout.stories]
    texts, taught = (
        [story.text for story in heldout.stories],
        np.array([vectors.names.index(s.emotion) for s in stories]),
    )
    if len(set(taught.tolist())) < len(vectors.names):
        missing = [name for e, name in enumerate(vectors.names) if e not in taught]
        raise ValueError(
            f"{training.name}: no stories of {', '.join(missing[:5])}; it must be what the vectors were made from"
        )
    means = extraction.pooled(lm, texts, skip, max_tokens, progress, longest)[0]
    table = table_means(lm, texts, skip, longest)
    taught_table = methods.directions(table_means(lm, [s.text for s in stories], skip, longest), taught)
    layers, E = list(vectors.layers), len(vectors.names)
    compared = {"directions": vectors} | {name: v.select(vectors.names) for name, v in (others or {}).items()}
    for name, v in compared.items():
        if not set(layers) <= set(v.layers):
            raise ValueError(f"{name}: no directions at some of the layers {layers} of those that are tested")
    draws = (vectors.random(E, seed + draw) for draw in range(random))
    return compare(
        heldout.name,
        vectors.names,
        families_of(vectors.names),
        labels,
        fold_names(labels, topics),
        {
            **{name: methods.project(means, v.directions)[layers] for name, v in compared.items()},
            "bag of words": word_scores([s.text for s in stories], taught, texts, E)[None],
            "embedding table": methods.project(table, taught_table),
        },
        np.stack([methods.project(means, drawn.directions)[layers] for drawn in draws]),
        layers,
        len(vectors.directions),
    )
