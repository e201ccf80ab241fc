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
    theta = keys.positive("rope_theta", theta)
    original = keys.positive("original_max_position_embeddings", max_positions)
    keys.ignore("partial_rotary_factor", "max_position_embeddings")
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(f"{where}: rope scaling {kind!r} is not supported; known: {', '.join(KINDS)}")
    try:
        with np.errstate(all="raise", under="ignore"):
            rope = Rope(dim, theta, **KINDS[kind](keys, dim, theta, original, max_positions))
    except CheckpointError:
        raise
    except (ArithmeticError, ValueError) as error:
        numbers = {"rope_theta": theta, **{name: v for name, v in scaling.items() if isinstance(v, int | float)}}
        shown = ", ".join(f"{name} {value}" for name, value in numbers.items())
        raise CheckpointError(f"{where}: rope scaling {kind!r} makes no frequencies of {shown} ({error})") from error
    keys.finish()
    return rope


def _plain(keys: Keys, dim, theta, original, max_positions) -> dict[str, Any]:
    keys.ignore("factor")
    return {}


def _linear(keys: Keys, dim, theta, original, max_positions) -> dict[str, Any]:
    return {"factors": (keys.positive("factor"),)}


def _dynamic(keys: Keys, dim, theta, original, max_positions) -> dict[str, Any]:
    return {"dynamic": keys.positive("factor"), "original": max_positions}


def _longrope(keys: Keys, dim, theta, original, max_positions) -> dict[str, Any]:
    factor = keys.positive("factor", max_positions / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "factors": keys.numbers("short_factor", dim // 2),
        "long_factors": keys.numbers("long_factor", dim // 2),
        "original": int(original),
        "scale": keys.positive("attention_factor", default),
    }


def _llama3(keys: Keys, dim, theta, original, max_positions) -> dict[str, Any]:
    factor, low, high = (keys.positive(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise keys.fault("high_freq_factor", f"expected a number above low_freq_factor, {low}")
    wavelength = 2 * np.pi * float(theta) ** (np.arange(0, dim, 2) / dim)
    kept = np.clip((original / wavelength - low) / (high - low), 0, 1)  # from divided (0) to left alone (1)
    return {"factors": tuple((1 / ((1 - kept) / factor + kept)).tolist())}


def _yarn(keys: Keys, dim, theta, original, max_positions) -> dict[str, Any]:
    if theta <= 1:
        raise CheckpointError(f"{keys.where}: rope scaling 'yarn' needs a rope_theta above 1, not {theta}")
    factor = keys.positive("factor", max_positions / original)
    fast, slow = keys.positive("beta_fast", 32.0), keys.positive("beta_slow", 1.0)
    mscale, mscale_all = keys.number("mscale", 0.0), keys.number("mscale_all_dim", 0.0)

    def sharpening(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    default = sharpening(mscale) / sharpening(mscale_all) if mscale and mscale_all else sharpening(1.0)
    scale = keys.positive("attention_factor", default)

    def pair_that_turns(times):  # the pair of dimensions that turns so often within the original length
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(fast), pair_that_turns(slow)
    if keys("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return {"factors": tuple((1 / (ramp / factor + (1 - ramp))).tolist()), "scale": scale}


KINDS = {
    "default": _plain, "none": _plain, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn,
    "longrope": _longrope, "su": _longrope,
}  # fmt: skip
