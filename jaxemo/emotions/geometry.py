"""How the directions lie to one another, and to what people say of the words (paper, "Geometry").

Each result stands beside what chance gives: permuted ratings, shuffled families, random directions.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.cluster.hierarchy
import scipy.spatial.distance
import scipy.stats

from jaxemo.emotions import corpus, methods, statistics
from jaxemo.emotions.vectors import EmotionVectors, listed


def cosines(vectors: EmotionVectors, layer: int) -> np.ndarray:
    """Cosine similarity `[E, E]` of the directions after one layer."""
    return vectors.directions[layer] @ vectors.directions[layer].T


def cluster_order(similarity: np.ndarray) -> list[int]:
    """An order of the rows of a cosine matrix in which similar ones are neighbours (average linkage, best leaf order)."""
    distance = scipy.spatial.distance.squareform(np.clip(1 - similarity, 0, 2), checks=False)
    linkage = scipy.cluster.hierarchy.linkage(distance, "average", optimal_ordering=True)
    return scipy.cluster.hierarchy.leaves_list(linkage).tolist()


@dataclasses.dataclass(frozen=True)
class Components:
    """Principal components of the directions: `coordinates [E, n]` and the `share [n]` of variance each holds."""

    coordinates: np.ndarray
    share: np.ndarray


def components(vectors: EmotionVectors, layer: int, n: int = 2) -> Components:
    """The first `n` principal components of the directions after one layer.

    A component has no sign of its own: the first points to higher human valence where there are norms, the second to
    higher arousal.
    """
    x = vectors.directions[layer].astype(np.float64)
    x = x - x.mean(0)
    u, size, _ = np.linalg.svd(x, full_matrices=False)
    coordinates = u[:, :n] * size[:n]
    for column, norm in zip(range(n), ("valence", "arousal"), strict=False):
        if correlation(vectors.names, coordinates[:, column], norm)[0] < 0:
            coordinates[:, column] *= -1
    return Components(coordinates, size[:n] ** 2 / np.sum(size**2))


def human_norms(names, norm: str) -> np.ndarray:
    """Human ratings of the words, NaN for those not rated; `norm` is valence, arousal or dominance (1 to 9).

    Source: the Glasgow Norms (Scott, Keitel, Becirspahic, Yao and Sereno 2019).
    """
    rated = {row["emotion"]: float(row[f"{norm}_mean"]) for row in corpus.table("glasgow_norms.csv")}
    return np.array([rated.get(name, np.nan) for name in listed("names", names)])


def correlation(names, values, norm: str) -> tuple[float, int]:
    """Pearson's r of one value an emotion with the human norm, and the number of words that are rated.

    r is 0 where fewer than three are.
    """
    human = human_norms(names, norm)
    rated = np.isfinite(human)
    if rated.sum() < 3:
        return 0.0, int(rated.sum())
    return float(scipy.stats.pearsonr(np.asarray(values)[rated], human[rated])[0]), int(rated.sum())


@dataclasses.dataclass(frozen=True)
class Affect:
    """Do the main components order the words as people do? For each of `norms` (human ratings) over `rated` words.

    `expected` is the component that the paper finds it in, with Pearson's `r`, its 95 % bootstrap `interval` over words
    and `p` by permutation. `matrix [norms, n]` has r with each of the components, `best` the one of largest |r|, and
    `best_p` how often the best of n components is as good with permuted ratings. `share [n]` is of the variance, and
    `random_share [n]` the same of as many random directions.

    `decoded [norms, 3]` is r, with its interval, of the ratings with what ridge regression makes of the whole directions of words
    that it was not fitted on (ten folds): is it in the directions, if not in a main component? `random_decoded [norms]` is r for
    random directions; it tends to be below 0, as a fold is predicted by the mean of the others, which is lower where its own is higher.
    """

    layer: int
    norms: tuple[str, ...]
    rated: int
    expected: tuple[int, ...]
    r: np.ndarray
    interval: np.ndarray  # [norms, 2]
    p: np.ndarray
    matrix: np.ndarray
    best: np.ndarray
    best_p: np.ndarray
    share: np.ndarray
    random_share: np.ndarray
    decoded: np.ndarray
    random_decoded: np.ndarray

    def summary(self) -> str:
        lines = [
            f"PCA of the directions at layer {self.layer}; {self.rated} words rated by people",
            "  variance held by PC1, PC2, ...: " + "  ".join(f"{x:.0%}" for x in self.share)
            + "   (random directions: " + "  ".join(f"{x:.0%}" for x in self.random_share) + ")",
        ]  # fmt: skip
        for i, norm in enumerate(self.norms):
            low, high = self.interval[i]
            lines.append(
                f"  {norm:9s} PC{self.expected[i] + 1} r = {self.r[i]:+.2f} [{low:+.2f}, {high:+.2f}], permutation p = {self.p[i]:.4f};"
                f"  best of {len(self.share)}: PC{self.best[i] + 1}, |r| = {abs(self.matrix[i, self.best[i]]):.2f}, p = {self.best_p[i]:.4f};"
                f"  decoded r = {self.decoded[i, 0]:+.2f} [{self.decoded[i, 1]:+.2f}, {self.decoded[i, 2]:+.2f}]"
                f" (random directions {self.random_decoded[i]:+.2f})"
            )
        return "\n".join(lines)


def affect(vectors: EmotionVectors, layer: int, n: int = 5, seed: int = 0) -> Affect:
    """Principal components against human valence and arousal (paper, "Geometry": PC1 r = 0.81, PC2 r = 0.66).

    Raises ValueError where fewer than ten of the words are rated.
    """
    norms, expected = ("valence", "arousal"), (0, 1)
    human = np.stack([human_norms(vectors.names, norm) for norm in norms])
    rated = np.isfinite(human).all(0)
    if rated.sum() < 10:
        raise ValueError(
            f"{rated.sum()} of {len(rated)} words are rated by people (glasgow_norms.csv), at least 10 needed"
        )
    parts = components(vectors, methods.layer_of(vectors, layer), n)
    x, human = parts.coordinates[rated], human[:, rated]
    random = vectors.random(len(vectors.names), seed)
    predicted = _decoded(vectors.directions[layer][rated], human, seed)
    matrix = statistics.correlations(human, x)
    matches = [statistics.best_match(h, x, seed) for h in human]
    return Affect(
        layer=layer,
        norms=norms,
        rated=int(rated.sum()),
        expected=expected,
        r=matrix[np.arange(len(norms)), expected],
        interval=np.array([statistics.interval(h, x[:, k], seed) for h, k in zip(human, expected, strict=True)]),
        p=np.array([statistics.best_match(h, x[:, [k]], seed)[1] for h, k in zip(human, expected, strict=True)]),
        matrix=matrix,
        best=np.array([at for at, _ in matches]),
        best_p=np.array([p for _, p in matches]),
        share=parts.share,
        random_share=components(random, layer, n).share,
        decoded=np.array(
            [
                (scipy.stats.pearsonr(p, h).statistic, *statistics.interval(p, h, seed))
                for p, h in zip(predicted, human, strict=True)
            ]
        ),
        random_decoded=np.array(
            [
                scipy.stats.pearsonr(p, h).statistic
                for p, h in zip(_decoded(random.directions[layer][rated], human, seed), human, strict=True)
            ]
        ),
    )


def _decoded(x: np.ndarray, human: np.ndarray, seed: int) -> list[np.ndarray]:
    """What ridge regression on the other nine tenths of the directions `x [n, D]` predicts of each of the ratings `human [norms, n]`."""
    import sklearn.linear_model
    import sklearn.model_selection

    folds = sklearn.model_selection.KFold(10, shuffle=True, random_state=seed)
    ridge = sklearn.linear_model.RidgeCV(np.logspace(-2, 2, 9))
    return [sklearn.model_selection.cross_val_predict(ridge, x, ratings, cv=folds) for ratings in human]


@dataclasses.dataclass(frozen=True)
class Clusters:
    """k-means of the directions against the families of the words: `labels [E]`, and the adjusted Rand index (1 the same
    partition, 0 as chance). `p` is by permutation of the families, `shuffled` the 95th percentile of those."""

    names: tuple[str, ...]
    layer: int
    labels: np.ndarray
    families: tuple[str, ...]
    rand: float
    shuffled: float
    p: float

    def summary(self) -> str:
        lines = [f"k-means at layer {self.layer}, k = {self.labels.max() + 1}: adjusted Rand index to the {len(set(self.families))} families "
                 f"{self.rand:.2f} (95 % of shuffled families below {self.shuffled:.2f}; p = {self.p:.4f})"]  # fmt: skip
        for k in range(self.labels.max() + 1):
            lines.append("  " + ", ".join(name for name, of in zip(self.names, self.labels, strict=True) if of == k))
        return "\n".join(lines)


def clusters(
    vectors: EmotionVectors, layer: int, families: Sequence[str], k: int = 10, seed: int = 0, draws: int = 500
) -> Clusters:
    """k-means (scikit-learn, 20 starts) of the directions after one layer; `families [E]` is what each is compared with.

    The paper's ten families are clusters of this kind.
    """
    import sklearn.cluster
    import sklearn.metrics

    if not 2 <= k <= len(vectors.names) or len(listed("families", families)) != len(vectors.names):
        raise ValueError(
            f"k={k} clusters of {len(vectors.names)} directions with {len(families)} families: expected 2 to "
            f"{len(vectors.names)} clusters and a family for each direction"
        )
    found = sklearn.cluster.KMeans(k, n_init=20, random_state=seed).fit_predict(
        vectors.directions[methods.layer_of(vectors, layer)]
    )
    rng = np.random.default_rng(seed)
    of = np.unique(families, return_inverse=True)[1]
    rand = sklearn.metrics.adjusted_rand_score(of, found)
    chance = [sklearn.metrics.adjusted_rand_score(rng.permutation(of), found) for _ in range(draws)]
    return Clusters(vectors.names, layer, found, tuple(families), float(rand), float(np.quantile(chance, 0.95)),
                    float((1 + np.sum(np.array(chance) >= rand)) / (1 + draws)))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Similarity:
    """Do the layers arrange the emotions alike? Spearman's rho `[L, L]` of the cosines of all pairs of directions, and
    `random [R, L, L]` of as many random directions, drawn R times, that turn from layer to layer as these do. NaN at layers
    without directions."""

    rho: np.ndarray
    random: np.ndarray

    @property
    def overall(self) -> tuple[float, np.ndarray]:
        """The mean rho over pairs of layers, and that of each draw `[R]`."""
        i, j = np.triu_indices(len(self.rho), 1)
        return float(np.nanmean(self.rho[i, j])), np.nanmean(self.random[:, i, j], axis=1)

    def summary(self) -> str:
        there = np.flatnonzero(np.isfinite(np.diag(self.rho)))
        at = sorted({int(there[round(i * (len(there) - 1) / 4)]) for i in range(5)})
        random, (mean, means) = self.random.mean(0), self.overall
        lines = [
            f"similarity of layers (RSA, Spearman's rho); in brackets random directions that turn as these do, mean of {len(self.random)} draws",
            f"  mean over pairs of layers {mean:+.2f} (random directions {means.mean():+.2f}, largest of the draws {means.max():+.2f})",
            "  layer " + "".join(f"{j:14d}" for j in at),
        ]  # fmt: skip
        for i in at:
            lines.append(f"  {i:5d} " + "".join(f"{self.rho[i, j]:+.2f} ({random[i, j]:+.2f})".rjust(14) for j in at))
        return "\n".join(lines)


def similarity(vectors: EmotionVectors, seed: int = 0, draws: int = 20) -> Similarity:
    """Layer-by-layer similarity of the cosine matrices. Raises ValueError for fewer than three directions or two layers."""
    E = len(vectors.names)
    if E < 3:
        raise ValueError(f"{E} directions have no pattern of cosines; at least three are needed")
    if len(vectors.layers) < 2:
        raise ValueError("directions at a single layer are compared with none; at least two layers are needed")
    return Similarity(_rsa(vectors), np.stack([_rsa(vectors.random(E, seed + i)) for i in range(draws)]))


def _rsa(vectors: EmotionVectors) -> np.ndarray:
    pairs, L = np.triu_indices(len(vectors.names), 1), len(vectors.directions)
    ranks = [scipy.stats.rankdata(cosines(vectors, at)[pairs]) for at in vectors.layers]
    rho = np.full((L, L), np.nan)
    rho[np.ix_(vectors.layers, vectors.layers)] = np.corrcoef(ranks)  # Spearman's rho is Pearson's r of ranks
    return rho
