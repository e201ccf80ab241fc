"""EmotionVectors: one unit direction an emotion and layer, with what turns it into steering and readings."""

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from jaxemo import files, steering
from jaxemo.steering import Steering
from jaxemo.tokens import Selection

FORMAT = "jaxemo emotion vectors, version 1"


def listed(what: str, names: Iterable[str]) -> tuple[str, ...]:
    """`names` as a tuple. Raises ValueError where they are a single string, whose letters would be taken for them."""
    if isinstance(names, str):
        raise ValueError(f"{what}={names!r}: expected a list, of one perhaps: [{names!r}]")
    return tuple(names)


def reading_layer(layers: Sequence[int], n_layers: int) -> int:
    """Which of `layers` is read and steered by default: nearest to four fifths of the way up (chosen on SmolLM2-135M)."""
    return min(layers, key=lambda layer: (abs(layer - min(n_layers - 1, round(0.8 * n_layers))), layer))


@dataclasses.dataclass(frozen=True, eq=False)
class EmotionVectors:
    """Directions `[L, E, D]` of unit length for `names [E]`, after each block of one model.

    `residual_norm [L]` is the mean length of the residual stream there, the unit of strength. Both are 0 at layers that have
    no directions. `neutral_mean` and `neutral_std` `[L, E]` are the scores of neutral tokens, against which a score is
    standardised (0 and 1 where they were not measured). `provenance` says what it was all made from; `raw` are the same
    directions before denoising; `measured` holds arrays that tell how good they are (see `extract`).
    """

    names: tuple[str, ...]
    directions: np.ndarray
    residual_norm: np.ndarray
    neutral_mean: np.ndarray
    neutral_std: np.ndarray
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    raw: "EmotionVectors | None" = None
    measured: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        L, E, _ = shape = self.directions.shape
        if len(listed("names", self.names)) != E or len(set(self.names)) != E:
            raise ValueError(f"{len(self.names)} names (each once) for {E} directions")
        if self.residual_norm.shape != (L,) or {self.neutral_mean.shape, self.neutral_std.shape} != {(L, E)}:
            raise ValueError(f"residual_norm must be [{L}], neutral_mean and neutral_std [{L}, {E}]")
        there = self.directions.any((1, 2))
        norms = self.residual_norm[there]
        if not (np.isfinite(self.directions).all() and there.any() and (np.isfinite(norms) & (norms > 0)).all()):
            raise ValueError("directions must be finite and residual norms positive")
        length = np.linalg.norm(self.directions[there], axis=-1)
        if np.abs(length - 1).max() > 1e-3:
            raise ValueError(
                f"directions {list(shape)} must have unit length; they run from {length.min()} to {length.max()}"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have directions."""
        return tuple(np.flatnonzero(self.directions.any((1, 2))).tolist())

    @property
    def layer(self) -> int:
        """The layer that is read and steered by default (see `reading_layer`)."""
        return reading_layer(self.layers, len(self.directions))

    @property
    def made_for(self) -> str:
        """`ModelConfig.outline` of the model that they are of, where that is known."""
        return self.provenance.get("made_for", "")

    def index(self, name: str) -> int:
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(self.names)}"
            raise ValueError(f"no direction named {name!r}; {hint}")
        return self.names.index(name)

    def _made(self, kind, name: str, value: tuple, layers, *how) -> Steering:
        here = self.layers
        wanted = [self.layer] if layers is None else steering.resolve_layers(layers, len(self.directions))
        lacking = sorted(set(wanted) - set(here))
        if lacking:
            raise ValueError(
                f"there are no directions at layers {lacking}: these vectors were extracted at {list(here)}"
            )
        return dataclasses.replace(
            kind(self.directions[:, self.index(name)], *value, wanted, *how), made_for=self.made_for
        )

    def _norms(self, share, what: str) -> np.ndarray:
        if np.ndim(share) or not steering.is_numeric(np.asarray(share)) or not np.isfinite(np.float64(share)):
            raise ValueError(f"{what}={share!r}: expected a finite number, the fraction of the mean residual norm")
        return share * self.residual_norm

    def steer(
        self, name: str, strength: float, layers=None, tokens: Selection = "all", keep_norm: bool = False
    ) -> Steering:
        """Add the direction. `strength` is a fraction of the mean residual norm at each of `layers` (default: `layer`).

        One mid-late layer takes 0.1 to 0.5; a band of layers proportionally less.
        """
        return self._made(steering.add, name, (self._norms(strength, "strength"),), layers, tokens, keep_norm)

    def ablate(self, name: str, layers="all", tokens: Selection = "all", keep_norm: bool = False) -> Steering:
        """Project the direction out (by default at every layer). Summed ablations remove their common span."""
        return self._made(steering.ablate, name, (), layers, tokens, keep_norm)

    def clamp(
        self, name: str, value: float, layers=None, tokens: Selection = "all", keep_norm: bool = False
    ) -> Steering:
        """Set the projection onto the direction to `value` times the mean residual norm."""
        return self._made(steering.clamp, name, (self._norms(value, "value"),), layers, tokens, keep_norm)

    def dampen(
        self, name: str, beta: float, layers="all", tokens: Selection = "all", keep_norm: bool = False
    ) -> Steering:
        """Shrink the projection onto the direction by the fraction `beta`."""
        return self._made(steering.dampen, name, (beta,), layers, tokens, keep_norm)

    def random(self, count: int, seed: int = 0) -> "EmotionVectors":
        """`count` random unit directions with the same residual norms: the control that every steering result needs.

        From layer to layer they turn as much as the directions here do on average, so that over a band of layers they add
        up to as much.
        """
        if not isinstance(count, int | np.integer) or count < 1:
            raise ValueError(f"count={count!r}: expected a whole number of random directions, at least 1")
        L, E, D = self.directions.shape
        cosines = np.einsum("led,med->lm", self.directions, self.directions, dtype=np.float64) / E
        size, turns = np.linalg.eigh(cosines)
        root = turns * np.sqrt(np.maximum(size, 0))  # root @ root.T is the mean cosine between layers
        root[~self.directions.any((1, 2))] = 0
        drawn = root @ np.random.default_rng(seed).standard_normal((count, L, D))
        names = {f"random-{i}": of_layers for i, of_layers in enumerate(drawn)}
        return EmotionVectors.from_directions(
            names, self.residual_norm, {"random_seed": seed, "made_for": self.made_for}
        )

    def select(self, names: Sequence[str]) -> "EmotionVectors":
        """Only these directions, in this order."""
        if not listed("names", names):
            raise ValueError("names=[]: expected a list of at least one name")
        at = [self.index(name) for name in names]
        return dataclasses.replace(
            self,
            names=tuple(names),
            directions=self.directions[:, at],
            neutral_mean=self.neutral_mean[:, at],
            neutral_std=self.neutral_std[:, at],
            raw=self.raw and self.raw.select(names),
            measured={name: array[..., at] for name, array in self.measured.items()},
        )

    def standardise(self, scores: np.ndarray, layer: int) -> np.ndarray:
        """Scores `[..., E]` read at `layer`, as standard deviations from the mean of neutral tokens."""
        L, E = self.neutral_mean.shape
        (at,) = steering.resolve_layers(layer, L)
        if np.shape(scores)[-1:] != (E,):
            raise ValueError(f"scores {list(np.shape(scores))} are not [..., {E}], one for each direction")
        return (scores - self.neutral_mean[at]) / self.neutral_std[at]

    @classmethod
    def from_directions(
        cls,
        directions: Mapping[str, np.ndarray],
        residual_norm: np.ndarray,
        provenance: Mapping[str, Any] | None = None,
    ) -> "EmotionVectors":
        """Anyone's vectors: `{name: [L, D]}` of any length, and the model's mean residual norms `[L]`.

        A layer at which all are zero has no directions. Raises ValueError where only some are.
        """
        if not isinstance(directions, Mapping) or not directions:
            raise ValueError(
                f"directions are {{name: array [L, D], ...}}, at least one, not {type(directions).__name__}"
            )
        shapes = {name: np.shape(array) for name, array in directions.items()}
        if len(set(shapes.values())) > 1 or len(next(iter(shapes.values()))) != 2:
            raise ValueError(f"directions must all be [L, D], one row a layer; got {shapes}")
        stacked = np.stack([np.asarray(array, np.float64) for array in directions.values()], axis=1)
        length = np.linalg.norm(stacked, axis=-1, keepdims=True)
        there = (length != 0).any(1, keepdims=True)
        faulty = ~np.isfinite(length) | ((length == 0) & (there | ~there.any()))
        if faulty.any():
            layer, e, _ = np.argwhere(faulty)[0]
            raise ValueError(f"the direction of {list(directions)[e]!r} at layer {layer} is zero or not finite")
        unit = (stacked / np.where(there, length, 1)).astype(np.float32)
        shape = unit.shape[:2]
        return cls(tuple(directions), unit, np.asarray(residual_norm, np.float32), np.zeros(shape, np.float32),
                   np.ones(shape, np.float32), dict(provenance or {}))  # fmt: skip

    def save(self, path: str | os.PathLike) -> None:
        """Write one `.safetensors` file, the same bytes for the same vectors; names and provenance are in its metadata."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        if self.raw is not None:
            arrays |= {f"raw.{name}": getattr(self.raw, name) for name in _ARRAYS}
        arrays |= {f"measured.{name}": array for name, array in self.measured.items()}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        metadata = {"format": FORMAT, "names": json.dumps(self.names), "provenance": json.dumps(self.provenance)}
        files.write_atomically(path, _ordered(safetensors.numpy.save(arrays, metadata)))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "EmotionVectors":
        """Read what `save` wrote. Raises FileNotFoundError where there is no file, ValueError for any other."""
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{os.fspath(path)!r} is no file; `jaxemo extract -o FILE` makes one")
        try:
            with safetensors.safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, expected {FORMAT!r}")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            about = {"names": tuple(json.loads(metadata["names"])), "provenance": json.loads(metadata["provenance"])}
            own = {name: arrays[name] for name in _ARRAYS}
            raw = {name: arrays[f"raw.{name}"] for name in _ARRAYS if f"raw.{name}" in arrays}
            measured = {
                name.removeprefix("measured."): array for name, array in arrays.items() if name.startswith("measured.")
            }
            return cls(**about, **own, raw=cls(**about, **raw) if raw else None, measured=measured)
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)} is not a file of emotion vectors: {error}") from error


def _ordered(data: bytes) -> bytes:
    """A safetensors file with its metadata in order of names; the library writes them in an order that varies."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


_ARRAYS = ("directions", "residual_norm", "neutral_mean", "neutral_std")
