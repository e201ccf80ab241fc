"""Ways of finding a direction for each emotion in activations, behind one function, so that they can be compared.

`jaxemo.emotions.extract` takes differences of means in a stream; the others here need all activations at once.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxemo.emotions import extraction
from jaxemo.emotions.corpus import Corpus
from jaxemo.emotions.vectors import EmotionVectors, listed
from jaxemo.language_model import LanguageModel

METHODS = ("difference", "pca", "probe", "whitened")


def directions(
    activations: np.ndarray, labels: np.ndarray, method: str = "difference", topics=None, l2: float = 1e-2
) -> np.ndarray:
    """One direction for each label and layer, `[L, E, D]` of any length, as `EmotionVectors.from_directions` takes them.

    Args:
      activations: `[n, L, D]`, such as `extraction.pooled` gives.
      labels: `[n]`, whole numbers from 0 to E − 1.
      method: "difference" of the mean from the mean of the other labels' means (the paper's); "pca", the first principal
        component of each text's differences from other labels' texts (on the same topic, if `topics [n]` are given), as in
        representation engineering (Zou et al. 2023); "probe", the weights of a multinomial logistic regression; or
        "whitened", the difference in the metric of the scatter within labels, shrunk (Fisher's discriminant; Ledoit and
        Wolf 2004), which discounts what varies between texts of the same emotion.
      l2: of the probe, λ in mean cross-entropy + λ/2 · ‖W‖², with activations scaled to a root mean square of one.

    Raises ValueError for an unknown method, activations of another shape or not finite, or a label without a text.
    """
    x, y = np.asarray(activations), np.asarray(labels)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    if x.ndim != 3 or y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer) or not np.isfinite(x).all():
        raise ValueError(
            f"activations [n, L, D], all finite, and whole numbers as labels [n] are needed, got {x.shape}, {y.shape}"
        )
    E = int(y.max()) + 1
    count = np.bincount(y, minlength=E)
    if E < 2 or not count.all():
        raise ValueError(
            f"labels must be 0 to E − 1, at least two, each of some text; none have {np.flatnonzero(count == 0).tolist()}"
        )
    groups = np.zeros(len(y), int) if topics is None else np.unique(topics, return_inverse=True)[1]
    found = {"difference": _difference, "pca": _pca, "probe": _probe, "whitened": _whitened}[method]
    return np.stack([found(x[:, at].astype(np.float64), y, E, groups, l2) for at in range(x.shape[1])])


def extract(
    lm: LanguageModel,
    corpus: Corpus,
    methods: Sequence[str] = METHODS,
    *,
    skip: int = extraction.SKIP,
    longest: int = extraction.LONGEST,
    max_tokens: int = 2048,
    progress: bool = True,
) -> dict[str, EmotionVectors]:
    """EmotionVectors of every method from the same activations of `corpus`, which are all in memory: `[stories, L, D]` float32."""
    methods = listed("methods", methods)
    x, norms = extraction.pooled(lm, [story.text for story in corpus.stories], skip, max_tokens, progress, longest)
    names = corpus.emotions
    labels = np.array([names.index(story.emotion) for story in corpus.stories])
    topics = [story.topic for story in corpus.stories]
    about = {"model": lm.source, "made_for": lm.config.outline, "corpus": corpus.name, "corpus_sha256": corpus.sha256,
             "stories": len(labels), "skip": skip, "longest": longest}  # fmt: skip
    found = {}
    for method in methods:
        d = directions(x, labels, method, topics)
        of = {name: d[:, e] for e, name in enumerate(names)}
        found[method] = EmotionVectors.from_directions(of, norms.mean(0), {**about, "method": method})
    return found


def project(activations: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Scores `[L, n, E]` of `activations [n, L, D]` on `directions [L, E, D]`."""
    return np.matmul(np.moveaxis(activations, 1, 0), np.moveaxis(directions, 1, 2))


def layer_of(vectors: EmotionVectors, layer: int | None) -> int:
    """`layer`, by default `vectors.layer`. Raises ValueError where there are no directions at it."""
    layer = vectors.layer if layer is None else layer
    if layer not in vectors.layers:
        raise ValueError(f"there are no directions at layer {layer}, only at {', '.join(map(str, vectors.layers))}")
    return layer


def _means(x, y, E):
    return np.stack([x[y == e].mean(0) for e in range(E)])


def _difference(x, y, E, *_):
    means = _means(x, y, E)
    return means - (means.sum(0) - means) / (E - 1)


def _pca(x, y, E, groups, _):
    out, average = np.zeros((E, x.shape[1])), {}
    for group in np.unique(groups):
        of = groups == group
        average[group] = [x[of & (y != e)].mean(0) if (of & (y != e)).any() else None for e in range(E)]
    for e in range(E):
        pairs = [x[i] - average[groups[i]][e] for i in np.flatnonzero(y == e) if average[groups[i]][e] is not None]
        if not pairs:
            raise ValueError(f"label {e} shares no topic with another label, so there are no differences to take")
        first = np.linalg.svd(np.stack(pairs), full_matrices=False)[2][0]
        out[e] = first * np.copysign(1, np.sum(np.stack(pairs) @ first))  # towards the emotion
    return out


def _whitened(x, y, E, groups, _):
    import sklearn.covariance

    means = _means(x, y, E)
    within = x - means[y]
    for group in np.unique(groups):
        within[groups == group] -= within[groups == group].mean(0)
    scale = np.sqrt(np.mean(within**2)) or 1.0
    scatter, _ = sklearn.covariance.ledoit_wolf(within / scale, assume_centered=True)
    return np.linalg.solve(scatter, (means - means.mean(0)).T).T


def _probe(x, y, E, _, l2):
    centred = x - x.mean(0)
    scale = np.sqrt(np.mean(centred**2)) or 1.0
    return np.asarray(_logistic(jnp.asarray(centred / scale, jnp.float32), jnp.asarray(y), E, l2)) / scale


@functools.partial(jax.jit, static_argnums=2)
def _logistic(x, y, E, l2, steps=500, tolerance=1e-5):
    """Weights `[E, D]` of a multinomial logistic regression with a free intercept, by L-BFGS from zero."""

    def loss(weights):
        w, b = weights
        logits = jnp.matmul(x, w.T, precision="highest") + b
        fit = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return fit + l2 / 2 * jnp.sum(w**2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        weights, state, _, n = carry
        value, grad = value_and_grad(weights, state=state)
        updates, state = solver.update(grad, state, weights, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(weights, updates), state, optax.tree.norm(grad), n + 1

    start = (jnp.zeros((E, x.shape[1])), jnp.zeros(E))
    weights, *_ = jax.lax.while_loop(
        lambda carry: (carry[3] < steps) & (carry[2] > tolerance), step, (start, solver.init(start), jnp.inf, 0)
    )
    return weights[0] - weights[0].mean(0)
