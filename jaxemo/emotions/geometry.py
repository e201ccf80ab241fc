"""How the directions lie to one another, and to what people say of the words (paper, "Geometry")."""

import dataclasses

import numpy as np
import scipy.cluster.hierarchy
import scipy.spatial.distance
import scipy.stats

from jaxemo.emotions import corpus
from jaxemo.emotions.vectors import EmotionVectors


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
    return np.array([rated.get(name, np.nan) for name in names])


def correlation(names, values, norm: str) -> tuple[float, int]:
    """Pearson's r of one value an emotion with the human norm, and the number of words that are rated.

    r is 0 where fewer than three are.
    """
    human = human_norms(names, norm)
    rated = np.isfinite(human)
    if rated.sum() < 3:
        return 0.0, int(rated.sum())
    return float(scipy.stats.pearsonr(np.asarray(values)[rated], human[rated])[0]), int(rated.sum())
