"""Steering: interventions on the residual stream, as data.

At each layer, with unit directions `d_m`, coefficients `a, b` and the tokens they act on:

    s_m = x · d_m                          how far x reaches along the direction
    x'  = x + Σ_m (a_m − b_m · s_m) d_m    the intervention, after the block

*add* is (a, b) = (strength · norm, 0), *ablate* (0, 1), *clamp* to c (c, 1), *dampen* by β (0, β). All interventions
at a layer act at once on the same x. What does nothing has a = b = 0, which leaves x bit for bit as it was.

`Steering` is what a user holds, for one row; `resolve` turns one per row into `Interventions`, the arrays that enter
the compiled forward. New values in arrays of the same shape never recompile.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from jax import lax

from jaxemo import kernels
from jaxemo.config import ModelConfig
from jaxemo.tokens import Array, Selection, Span, TokenBatch, Turn, spans, turns_of

ADD, SET, DAMPEN = "add", "set", "dampen"  # `set` fixes the projection: clamp, or ablate at 0


def resolve_layers(layers: str | int | Sequence[int], n_layers: int) -> tuple[int, ...]:
    """Layer numbers from "all", a number or several (negative from the end); raises on unknown, double or no layers."""
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers={layers!r}; expected 'all' or layer numbers")
        return tuple(range(n_layers))
    given = np.atleast_1d(np.asarray(layers, object)).tolist()
    if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in given):
        raise ValueError(f"layers={layers!r}; expected 'all' or layer numbers")
    numbers = [int(i) for i in given]
    if not numbers:
        raise ValueError("no layers given: this would do nothing")
    for i in numbers:
        if not -n_layers <= i < n_layers:
            raise ValueError(f"layer {i} does not exist: the model's {n_layers} layers are 0 to {n_layers - 1}")
    found = tuple(i % n_layers for i in numbers)
    if len(set(found)) < len(found):
        raise ValueError(f"layers {numbers} name a layer twice")
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """One direction doing one thing. Arrays are per layer; `value` is 0 and `active` False where it does not act."""

    kind: str  # ADD, SET or DAMPEN
    directions: np.ndarray  # [L, D] float32, unit length
    value: np.ndarray  # [L] float32: a for ADD, the target projection for SET, β for DAMPEN
    active: np.ndarray  # [L] bool
    tokens: Selection

    def same_as(self, other: "Term") -> bool:
        return (
            (self.kind, self.tokens) == (other.kind, other.tokens)
            and np.array_equal(self.active, other.active)
            and np.array_equal(self.directions, other.directions)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Steering:
    """Interventions for one row. They add (`a + b`), and those that add vectors scale (`2 * a`, `-a`, `a - b`)."""

    terms: tuple[Term, ...] = ()
    keep_norm: bool = False  # rescale each steered token to the norm it had
    made_for: str = ""  # `ModelConfig.outline` of the model that the directions are of; "" is not known

    def __add__(self, other: "Steering") -> "Steering":
        if not isinstance(other, Steering):
            return NotImplemented
        if self.made_for and other.made_for and self.made_for != other.made_for:
            raise ValueError(f"directions of two models do not add: one is {self.made_for}, the other {other.made_for}")
        terms = list(self.terms)
        for term in other.terms:  # equal directions meet in one coefficient, so that v - v is exactly nothing
            twin = next((i for i, t in enumerate(terms) if t.kind == ADD and t.same_as(term)), None)
            if twin is None:
                terms.append(term)
            else:
                terms[twin] = dataclasses.replace(term, value=terms[twin].value + term.value)
        return Steering(tuple(terms), self.keep_norm or other.keep_norm, self.made_for or other.made_for)

    def __radd__(self, other: int) -> "Steering":
        return self if isinstance(other, int) and other == 0 else NotImplemented  # where `sum` begins

    def __mul__(self, factor: float) -> "Steering":
        if np.ndim(factor) or not is_numeric(np.asarray(factor)):
            return NotImplemented
        for term in self.terms:
            if term.kind != ADD:
                raise TypeError(f"only added vectors scale; this steering has a term of kind {term.kind!r}")
        terms = (dataclasses.replace(t, value=np.float32(factor) * t.value) for t in self.terms)
        return dataclasses.replace(self, terms=tuple(terms))

    __rmul__ = __mul__

    def __neg__(self) -> "Steering":
        return self * -1.0

    def __sub__(self, other: "Steering") -> "Steering":
        if not isinstance(other, Steering):
            return NotImplemented
        return self + -other


def lowest(steerings: Iterable[Steering | None]) -> int:
    """The lowest layer that any of them acts at: what lies below is the same for all. 0 where none acts."""
    active = [term.active for steering in steerings if steering is not None for term in steering.terms]
    return int(np.argmax(np.any(active, axis=0))) if active else 0


def is_numeric(array: np.ndarray) -> bool:
    """Whether it holds numbers, NumPy's own or others, such as bfloat16."""
    return array.dtype.kind not in "bOSUMm"


def steer(
    kind: str,
    directions: np.ndarray,
    value: np.ndarray | float,
    layers: str | int | Sequence[int] = "all",
    tokens: Selection = "all",
    keep_norm: bool = False,
) -> Steering:
    """One intervention along `directions [L, D]` (any length; only their direction counts) with `value` per layer."""
    directions, values = np.asarray(directions), np.asarray(value)
    for what, array in (("directions", directions), ("value", values)):
        if not is_numeric(array):
            raise TypeError(f"{kind}: {what} are numbers, not {array.dtype}")
    directions = directions.astype(np.float32)
    if directions.ndim != 2:
        raise ValueError(f"directions must be [L, D], one a layer, not {list(directions.shape)}")
    n_layers = len(directions)
    active = np.zeros(n_layers, bool)
    active[list(resolve_layers(layers, n_layers))] = True
    lengths = np.linalg.norm(directions.astype(np.float64), axis=1, keepdims=True)
    bad = ~np.isfinite(lengths[:, 0]) | (active & (lengths[:, 0] == 0))
    if bad.any():
        raise ValueError(f"the direction at layers {np.flatnonzero(bad).tolist()} is zero or not finite")
    if values.shape not in ((), (n_layers,)):
        raise ValueError(f"{kind}: a number or one for each of {n_layers} layers, not {list(values.shape)}")
    values = np.broadcast_to(values.astype(np.float32), (n_layers,))
    if not np.isfinite(values[active]).all():
        raise ValueError(f"{kind} has a value that is not finite")
    unit = np.where(lengths > 0, directions / np.maximum(lengths, 1e-300), 0).astype(np.float32)
    if not isinstance(tokens, str | slice):
        tokens = np.atleast_1d(tokens).tolist()  # selections are compared
    term = Term(kind, unit, np.where(active, values, np.float32(0)), active, tokens)
    return Steering((term,), keep_norm)


def add(directions, amount, layers="all", tokens="all", keep_norm=False) -> Steering:
    """Add `amount` (in the residual stream's own units, a number or one per layer) of each unit direction."""
    return steer(ADD, directions, amount, layers, tokens, keep_norm)


def ablate(directions, layers="all", tokens="all", keep_norm=False) -> Steering:
    """Project the direction out of the residual stream. Several ablated together leave no part of their span."""
    return steer(SET, directions, 0.0, layers, tokens, keep_norm)


def clamp(directions, value, layers="all", tokens="all", keep_norm=False) -> Steering:
    """Set the projection onto the direction to `value`, whatever it was."""
    return steer(SET, directions, value, layers, tokens, keep_norm)


def dampen(directions, beta, layers="all", tokens="all", keep_norm=False) -> Steering:
    """Shrink the projection onto the direction by the fraction `beta` (1 is ablation, negative amplifies)."""
    return steer(DAMPEN, directions, beta, layers, tokens, keep_norm)


def check_made_for(config: ModelConfig, made_for: str) -> None:
    """Refuse directions of another model: where they have the same size, nothing else would show it."""
    if made_for and made_for != config.outline:
        raise ValueError(
            f"these directions were made for another model, {made_for}; this one is {config.outline}. Extract them here, or "
            "take them over with EmotionVectors.from_directions(...) if that is meant"
        )


# ---- arrays ----------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class LayerInterventions:
    """What one layer needs (or all layers, with a leading L axis). M is the number of distinct directions in use."""

    bank: Any  # [M, D] float32 unit directions
    a: Any  # [B, M] float32
    b: Any  # [B, M] float32
    keep_norm: Any  # [B] bool
    acts: Any  # [] bool: whether anything acts here, if only with strength 0; else the layer is passed over


@flax.struct.dataclass
class Interventions:
    """Everything that steers one batch: per-layer arrays, and where each row's direction acts."""

    layers: LayerInterventions  # leaves with a leading L axis
    spans: Array  # [B, M, 2] int32: absolute positions start <= t < stop


def apply(steering: Interventions, layer: LayerInterventions, x: jax.Array, start: jax.Array, directions=None):
    """The formula above, at one layer: `x [B, T, D]`, whose first tokens lie at positions `start [B]`, in float32.

    Returns x' in x's type, and its float32 scores `[B, T, E]` on `directions [E, D]`, from the same pass (None without).
    """

    def act(x):
        return kernels.steer_project(
            x, layer.bank, layer.a, layer.b, steering.spans, start, layer.keep_norm, directions
        )

    def pass_over(x):
        return x, None if directions is None else kernels.project(x, directions)

    return lax.cond(layer.acts, act, pass_over, x)


Slots = dict[tuple[bytes, int], int]  # a direction's bytes and which of a row's uses of it → its number in the bank


class Entry(NamedTuple):
    """What one slot of the bank does in one row."""

    directions: np.ndarray  # [L, D]
    a: np.ndarray  # [L]
    b: np.ndarray  # [L]
    active: np.ndarray  # [L] bool
    span: Span


def resolve(
    config: ModelConfig, steering: Steering | Sequence[Steering | None] | None, batch: TokenBatch, new_tokens: int = 0
) -> Interventions:
    """The arrays for a batch, from one steering for all rows or a list with one (or None) a row.

    Equal directions share a slot of the bank and the number of slots is a power of two, at least 4, so that most
    changes keep the shape. Raises ValueError for a wrong number of rows, a direction of another model's size, or a
    selection that names no token of its row.
    """
    if isinstance(steering, str) or not (steering is None or isinstance(steering, Steering | Sequence)):
        raise TypeError(f"steering is {type(steering).__name__}, not a Steering (as `vectors.steer(name, strength)` makes one) or a "
                        "list with one (or None) a row")  # fmt: skip
    lengths = [int(n) for n in np.asarray(batch.lengths)]
    rows = [steering] * len(lengths) if steering is None or isinstance(steering, Steering) else list(steering)
    if len(rows) != len(lengths):
        raise ValueError(f"{len(rows)} steerings for {len(lengths)} rows; give one for all or one (or None) a row")
    known: dict[Any, list[Entry]] = {}
    found = []
    for i, (given, length, turns) in enumerate(zip(rows, lengths, turns_of(batch), strict=True)):
        key = (id(given), length, turns)
        if key not in known:
            known[key] = entries(config, given, length, turns, new_tokens, i)
        found.append(known[key])
    slots: Slots = {}
    numbers = [assign(row, slots) for row in found]
    arrays = arrange(config, rows, found, numbers, room(slots))
    return join(arrays, arrays.layers, bank(config, slots))


def split(interventions: Interventions) -> tuple[Interventions, LayerInterventions]:
    """What each row has of its own, and what all rows share."""
    one = interventions.layers
    own = LayerInterventions(None, one.a, one.b, one.keep_norm, None)
    return Interventions(own, interventions.spans), LayerInterventions(one.bank, None, None, None, one.acts)


def join(own: Interventions, shared: LayerInterventions, bank=None) -> Interventions:
    """Both again; with a `bank`, that one."""
    rows = own.layers
    layers = LayerInterventions(shared.bank if bank is None else bank, rows.a, rows.b, rows.keep_norm, shared.acts)
    return Interventions(layers, own.spans)


def entries(
    config: ModelConfig,
    spec: Steering | None,
    length: int,
    turns: Sequence[Turn],
    new_tokens: int,
    row: int | None = None,
) -> list[Entry]:
    """What `spec` does in a row of `length` prompt tokens, `turns` and up to `new_tokens` more. Errors as `resolve`."""
    if spec is None:
        return []
    if not isinstance(spec, Steering):
        raise TypeError(f"the steering of row {row} is {type(spec).__name__}, not a Steering or None")
    check_made_for(config, spec.made_for)
    for term in spec.terms:
        if term.directions.shape != (config.n_layers, config.d_model):
            raise ValueError(f"directions of shape {list(term.directions.shape)} do not fit a model with "
                             f"{config.n_layers} layers of width {config.d_model} (row {row})")  # fmt: skip
    return _row_entries(spec, functools.partial(spans, length=length, new_tokens=new_tokens, turns=turns, row=row))


def assign(row: Sequence[Entry], slots: Slots) -> list[int]:
    """The slot of each of a row's entries, added to `slots` where it is not there yet.

    A row may use one direction over several spans: each needs a slot of its own, which other rows share.
    """
    numbers: list[int] = []
    for entry in row:
        copy, direction = 0, entry.directions.tobytes()
        while (number := slots.setdefault((direction, copy), len(slots))) in numbers:
            copy += 1
        numbers.append(number)
    return numbers


def room(slots: Slots) -> int:
    """The size M of a bank with `slots`."""
    return max(4, 1 << (len(slots) - 1).bit_length()) if slots else 4


def bank(config: ModelConfig, slots: Slots) -> np.ndarray:
    """The directions of `slots`, `[L, M, D]`."""
    found = np.zeros((config.n_layers, room(slots), config.d_model), np.float32)
    for (direction, _), number in slots.items():
        found[:, number] = np.frombuffer(direction, np.float32).reshape(config.n_layers, -1)
    return found


def arrange(config: ModelConfig, rows, found, numbers, M: int) -> Interventions:
    """The arrays of a batch without the bank, from each row's Steering, its entries and their slots, of `M`."""
    L, B = config.n_layers, len(rows)
    a, b, keep_norm = np.zeros((L, B, M), np.float32), np.zeros((L, B, M), np.float32), np.zeros((L, B), bool)
    where, acts = np.zeros((B, M, 2), np.int32), np.zeros(L, bool)
    for row, (spec, of_row, slots) in enumerate(zip(rows, found, numbers, strict=True)):
        if spec is not None and spec.keep_norm:
            keep_norm[:, row] = np.any([term.active for term in spec.terms], axis=0)
        for entry, slot in zip(of_row, slots, strict=True):
            a[:, row, slot], b[:, row, slot], where[row, slot] = entry.a, entry.b, entry.span
            acts |= entry.active
    return Interventions(LayerInterventions(None, a, b, keep_norm, acts), where)


def _row_entries(spec: Steering, spans_of: Callable[[Selection], list[Span]]):
    """One row's Entry for every slot it needs."""
    made: list[Entry] = []
    fixed = []
    for term in spec.terms:
        found = spans_of(term.tokens)
        if term.kind == SET:
            fixed += [(span, term) for span in found]
            continue
        a, b = (term.value, 0 * term.value) if term.kind == ADD else (0 * term.value, term.value)
        made += [Entry(term.directions, a, b, term.active, span) for span in found]
    # Projections that are set together must not undo one another: between any two bounds the same terms act, and
    # their directions are made orthonormal there.
    bounds = sorted({bound for span, _ in fixed for bound in span})
    for start, stop in itertools.pairwise(bounds):
        acting = [term for span, term in fixed if span.start <= start and stop <= span.stop]
        made += [Entry(*slot, Span(start, stop)) for slot in _orthonormal(acting)]
    return made


def _orthonormal(terms: Sequence[Term]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(directions [L, D], a [L], b [L], active [L]) such that all of `terms`' projections are set at once."""
    if len(terms) < 2:
        return [(t.directions, t.value, t.active.astype(np.float32), t.active) for t in terms]
    L, D = terms[0].directions.shape
    directions = np.zeros((len(terms), L, D), np.float32)
    a, b = np.zeros((2, len(terms), L), np.float32)
    for layer in range(L):
        acting = [t for t in terms if t.active[layer]]
        if not acting:
            continue
        rows = np.stack([t.directions[layer] for t in acting]).astype(np.float64)
        target = np.array([t.value[layer] for t in acting], np.float64)
        u, size, basis = np.linalg.svd(rows, full_matrices=False)
        rank = int((size > 1e-5 * size[0]).sum())
        goal = (u[:, :rank].T @ target) / size[:rank]
        reached = rows @ basis[:rank].T @ goal
        if not np.allclose(reached, target, rtol=1e-4, atol=1e-6):
            raise ValueError(f"at layer {layer} the same direction is set to different values: {target.tolist()}")
        directions[:rank, layer], a[:rank, layer], b[:rank, layer] = basis[:rank], goal, 1
    return [(directions[j], a[j], b[j], b[j] > 0) for j in range(len(terms)) if b[j].any()]
