"""Grids of conditions for a sweep, with the controls that go with them."""

import itertools
from collections.abc import Sequence
from typing import Any

from jaxemo.emotions.vectors import EmotionVectors
from jaxemo.steering import Steering

OPERATIONS = ("add", "ablate", "clamp", "dampen")


def conditions(
    vectors: EmotionVectors,
    emotions: Sequence[str],
    strengths: Sequence[float] = (0.1,),
    layers: Sequence = (None,),
    tokens: Sequence = ("all",),
    operations: Sequence[str] = ("add",),
    random: int = 3,
    seed: int = 0,
) -> dict[str, Steering | None]:
    """Every emotion with every strength, layers, tokens and operation, beside `random` directions in its place, and "none".

    Args:
      strengths: for "add" the fraction of the mean residual norm, for "clamp" the projection in that unit, for "dampen" the
        fraction taken away; "ablate" has none.
      layers: each as `EmotionVectors.steer` takes them: a number, several, "all", or None for the directions' own layer.
      tokens: selections.

    Raises ValueError for an unknown emotion or operation, and without any.
    """
    if any(isinstance(axis, str) or not len(axis) for axis in (emotions, strengths, layers, tokens, operations)):
        raise ValueError("emotions, strengths, layers, tokens and operations are lists of at least one each")
    if unknown := [name for name in operations if name not in OPERATIONS]:
        raise ValueError(f"unknown operation {unknown[0]!r}; there are {', '.join(OPERATIONS)}")
    controls = vectors.random(random, seed) if random else None
    of = [(vectors, name) for name in emotions] + ([(controls, name) for name in controls.names] if controls else [])
    made: dict[str, Steering | None] = {"none": None}
    for (which, name), operation, strength, where, selection in itertools.product(
        of, operations, strengths, layers, tokens
    ):
        kinds: dict[str, Any] = {
            "add": which.steer,
            "clamp": which.clamp,
            "dampen": which.dampen,
            "ablate": which.ablate,
        }
        amount = () if operation == "ablate" else (strength,)
        at = [vectors.layer] if where is None else where  # a control acts where the emotions do
        text = at if isinstance(at, str) else ",".join(map(str, at)) if hasattr(at, "__iter__") else at
        label = " ".join([name, operation, *(f"{x:+g}" for x in amount), f"layers={text}", f"tokens={selection}"])
        made[label] = kinds[operation](name, *amount, layers=at, tokens=selection)
    return made
