"""What studies are judged by: the effect of a direction over items, beside the effects of random directions (all SciPy's).

A direction and its negative are equally random, so the effects of random directions are spread evenly round zero. An effect is
theirs until it is too large: by Student's t with their root mean square as its scale. That it holds over items (its interval) is
not enough; any direction pushes some way.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

ALPHA, POWER = 0.05, 0.8


@dataclasses.dataclass(frozen=True)
class Effect:
    """What one dose of a direction does to a measure: the `mean` over items and its 95 % interval; how it lies among random
    directions, by t (`p`) and by `rank` ((1 + as large) / (1 + all))."""

    mean: float
    low: float
    high: float
    items: int
    p: float
    rank: float

    @property
    def interval(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    def __str__(self) -> str:
        return f"{self.interval}, p = {self.p:.2g}"


def slopes(doses: Sequence[float], values: np.ndarray) -> np.ndarray:
    """The least-squares slope `[n]` of each item's `values [doses, n]`: what one dose does to it."""
    d = np.asarray(doses, np.float64) - np.mean(doses)
    if not (d**2).sum() > 0:
        raise ValueError(f"doses {list(doses)} are all the same: there is no slope")
    return d @ np.asarray(values, np.float64) / (d**2).sum()


def effect(x: np.ndarray, random: np.ndarray) -> Effect:
    """The effect of a direction from its items' slopes `x [n]`, beside those of `random [R, n]` directions.

    Raises ValueError for fewer than 20 random directions.
    """
    random = np.asarray(random, np.float64)
    if random.ndim != 2 or len(random) < 20:
        raise ValueError(f"random directions {random.shape}: at least 20 are needed to judge an effect by")
    mean, low, high = interval(x)
    chance = random.mean(1)
    scale = math.sqrt((chance**2).mean())
    p = 2 * scipy.stats.t.sf(abs(mean) / scale, len(chance)) if scale else float(mean == 0)  # nothing ever moves
    rank = (1 + int((np.abs(chance) >= abs(mean)).sum())) / (1 + len(chance))
    return Effect(mean, low, high, len(x), float(p), rank)


def interval(x: np.ndarray) -> tuple[float, float, float]:
    """The mean of `x [n]` and its 95 % interval, by Student's t."""
    found = scipy.stats.ttest_1samp(np.asarray(x, np.float64), 0).confidence_interval(1 - ALPHA)
    return float(np.mean(x)), float(found.low), float(found.high)


def holm(p: Mapping[Any, float]) -> dict[Any, float]:
    """Holm's correction: the family's error stays below what each p is held to."""
    corrected, least = {}, 0.0
    for i, name in enumerate(sorted(p, key=lambda name: p[name])):
        least = max(least, min(1.0, (len(p) - i) * p[name]))
        corrected[name] = least
    return corrected


def detectable(random: np.ndarray, tests: int = 1) -> float:
    """The smallest effect that is found with a power of 80 %, given the slopes `[R, n]` of random directions: known before any
    other direction is looked at."""
    chance = np.asarray(random, np.float64).mean(1)
    R = len(chance)
    t = scipy.stats.t.isf(ALPHA / tests / 2, R) + scipy.stats.norm.isf(1 - POWER)
    return float(t * math.sqrt((chance**2).mean()))


def rollouts(difference: float = 0.1, rate: float = 0.5) -> int:
    """How many rollouts a cell takes to find that `difference` in a `rate` with a power of 80 % (two proportions, two-sided)."""
    low, high = rate - difference / 2, rate + difference / 2
    a, b = scipy.stats.norm.isf(ALPHA / 2), scipy.stats.norm.isf(1 - POWER)
    spread = a * math.sqrt(2 * rate * (1 - rate)) + b * math.sqrt(low * (1 - low) + high * (1 - high))
    return math.ceil((spread / difference) ** 2)


def verdict(effect: Effect, claimed: int) -> str:
    """Whether an effect bears out a claim about its sign: "replicates", "opposite" or "does not replicate"."""
    if effect.p < ALPHA and not effect.low <= 0 <= effect.high:
        return "replicates" if effect.mean * claimed > 0 else "opposite"
    return "does not replicate"


def partial(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """The mean over columns of the correlation of `x [n, E]` with `y [n, E]`, what `given [n, E]` explains taken out of both."""
    found = []
    for a, b, c in zip(x.T, y.T, given.T, strict=True):
        design = np.stack([np.ones_like(c), c], 1)
        a, b = (v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (a, b))
        found.append(float(np.corrcoef(a, b)[0, 1]) if a.any() and b.any() else 0.0)
    return float(np.mean(found))
