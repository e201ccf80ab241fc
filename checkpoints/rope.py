"""How configurations describe rescaled rotary embeddings, as the numbers of a `jaxemo.config.Rope`.

linear     every frequency divided by one factor (Chen et al. 2023)
dynamic    theta grows with the row's length ("NTK-aware")
llama3     long wavelengths divided, short ones kept, a ramp between (Llama 3.1)
yarn       the same idea by rotations completed within the original length, and sharper attention (Peng et al. 2023)
longrope   searched divisors for every frequency, one set for short rows and one for long (Ding et al. 2024)
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxemo.checkpoints.keys import CheckpointError, Keys

from jaxemo.config import Rope


def read(where: str, scaling: Mapping[str, Any], dim: int, theta: float, max_positions: int) -> Rope:
    """The Rope of `dim` rotated dimensions that `scaling` (`rope_scaling` or `rope_parameters`) asks for.

    `max_positions` is the model's longest row, which some scalings compare with. Raises CheckpointError.
    """
    keys = Keys(where, scaling, "rope scaling")
    old, kind = keys("type", None), keys("rope_type", None)
    kind = kind or old or "default"
    theta = keys.number("rope_theta", theta)
    original = keys.whole("original_max_position_embeddings", max_positions)
    keys.ignore("partial_rotary_factor", "max_position_embeddings", "rope_theta")
    frequency = float(theta) ** (-np.arange(0, dim, 2) / dim)
    extra: dict[str, Any]
    if kind in ("default", "none"):
        extra = {}
        keys.ignore("factor")
    elif kind == "linear":
        extra = {"factors": (keys.number("factor"),)}
    elif kind == "dynamic":
        extra = {"dynamic": keys.number("factor"), "original": max_positions}
    elif kind == "llama3":
        factors = _llama3(
            frequency, keys.number("factor"), keys.number("low_freq_factor"), keys.number("high_freq_factor"), original
        )
        extra = {"factors": factors}
    elif kind == "yarn":
        extra = _yarn(keys, theta, dim, original, max_positions)
    elif kind in ("longrope", "su"):
        factor = keys.number("factor", max_positions / original)
        default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        extra = {
            "factors": keys.numbers("short_factor", dim // 2),
            "long_factors": keys.numbers("long_factor", dim // 2),
            "original": original,
            "scale": keys.number("attention_factor", default),
        }
    else:
        raise CheckpointError(f"{where}: rope scaling {kind!r} is not supported")
    keys.finish()
    try:
        return Rope(dim, theta, **extra)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _llama3(frequency, factor, low, high, original) -> tuple[float, ...]:
    wavelength = 2 * np.pi / frequency
    kept = (original / wavelength - low) / (high - low)  # 0 and below: divided; 1 and above: kept
    kept = np.clip(kept, 0, 1)
    return tuple((1 / ((1 - kept) / factor + kept)).tolist())


def _yarn(keys: Keys, theta: float, dim: int, original: int, max_positions: int) -> dict[str, Any]:
    factor = keys.number("factor", max_positions / original)
    fast, slow = keys.number("beta_fast", 32.0) or 32.0, keys.number("beta_slow", 1.0) or 1.0
    mscale, mscale_all = keys.number("mscale", 0.0), keys.number("mscale_all_dim", 0.0)

    def sharpening(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    default = sharpening(mscale) / sharpening(mscale_all) if mscale and mscale_all else sharpening(1.0)
    scale = keys.number("attention_factor", default)

    def pair_that_turns(times):  # the pair of dimensions that turns so often within the original length
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(fast), pair_that_turns(slow)
    if keys("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return {"factors": tuple((1 / (ramp / factor + 1 - ramp)).tolist()), "scale": scale}
