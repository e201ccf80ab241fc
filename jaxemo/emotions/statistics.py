"""The few statistics that the tests of the directions share, each SciPy's: intervals, and p values by permutation."""

import numpy as np
import scipy.stats


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a rate of `hits` in `n`."""
    found = scipy.stats.binomtest(int(hits), int(n)).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r `[..., K]` of each of the columns `y [n, K]` with `x [..., n]`."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(0)
    return (x @ y) / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True) * np.linalg.norm(y, axis=0), 1e-300)


def interval(x: np.ndarray, y: np.ndarray, seed: int = 0, draws: int = 5000) -> tuple[float, float]:
    """The 95 % bootstrap interval of Pearson's r of `x [n]` with `y [n]`, pairs drawn with replacement (percentiles)."""

    def r(x, y, axis=-1):
        x, y = x - x.mean(axis, keepdims=True), y - y.mean(axis, keepdims=True)
        return (x * y).sum(axis) / np.maximum(np.sqrt((x**2).sum(axis) * (y**2).sum(axis)), 1e-300)

    found = scipy.stats.bootstrap((x, y), r, paired=True, n_resamples=draws, method="percentile",
                                  rng=np.random.default_rng(seed)).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def best_match(x: np.ndarray, y: np.ndarray, seed: int = 0, draws: int = 10000) -> tuple[int, float]:
    """The column of `y [n, K]` with the largest |r| with `x [n]`, and the p of so large a largest |r| by chance.

    By permutation of `x`, each time with the best of the K columns, so the choice is paid for; with one column it is
    the ordinary two-sided p.
    """
    found = scipy.stats.permutation_test((x,), lambda x, axis=-1: np.abs(correlations(np.moveaxis(x, axis, -1), y)).max(-1),
                                         permutation_type="pairings", alternative="greater", vectorized=True,
                                         n_resamples=draws, rng=np.random.default_rng(seed))  # fmt: skip
    return int(np.abs(correlations(x, y)).argmax()), float(found.pvalue)
