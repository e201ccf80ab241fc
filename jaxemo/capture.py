"""Capture: what a forward pass returns besides logits, reduced inside the compiled pass.

Four sites of each layer can be read: `resid_pre` and `resid_post` (the residual stream before and after the block,
the latter after steering), `attn_out` and `mlp_out` (what the block adds to it). Each can be returned whole, as its norm, as
scores against directions, or as a mean of these over selected tokens; only what is asked for is computed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxemo import kernels
from jaxemo.config import ModelConfig
from jaxemo.kernels.project_pool.reference import selected
from jaxemo.steering import resolve_layers
from jaxemo.tokens import Array, Selection, TokenBatch, spans, turns_of

SINK = 10.0  # a token whose norm is this many times its row's median is an attention sink and no measure of the stream
SINKS = 4  # in a row, at most: the longest
SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")
Layers = str | int | Sequence[int]  # "all" or layer numbers; the order given is the order returned


@dataclasses.dataclass(frozen=True, eq=False)
class Capture:
    """What to return. Each of the kinds maps a site to the layers wanted, for example `{"resid_post": [3, 20]}`.

    Args:
      raw: activations as they are, `[n, B, T, D]` in the model's dtype.
      norm: float32 Euclidean norms of every token, `[n, B, T]`.
      scores: float32 scores of every token on `directions`, `[n, B, T, E]`.
      mean, mean_norm: float32 means of activations `[n, B, D]` and of norms `[n, B]` over the tokens of `tokens`.
      pooled: float32 means of scores over those tokens, `[n, B, E]`.
      top: the `k` tokens of the batch that score highest on each direction: scores and places, both `[n, E, k]`, where a
        place is `row * T + position` (-1 where fewer than k tokens are selected).
      directions: `[L, E, D]`. Scores are projections on them as they are (unit length makes a score a length).
      centre: `[L, D]`, taken from every activation before it is scored.
      cosine: whether activations are scored at unit length: unit directions make a score a cosine.
      offset, scale: `[L, E]`; a score becomes (score - offset) * scale, for example standard deviations from neutral text.
      tokens: the selection that `mean`, `mean_norm`, `pooled` and `top` run over.
      sinks: whether that counts attention sinks (see `ordinary`).
      dose: also return how far steering moved each token, ‖x' − x‖ / ‖x‖, at every layer, `[L, B, T]`.
    """

    raw: Mapping[str, Layers] = dataclasses.field(default_factory=dict)
    norm: Mapping[str, Layers] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, Layers] = dataclasses.field(default_factory=dict)
    mean: Mapping[str, Layers] = dataclasses.field(default_factory=dict)
    mean_norm: Mapping[str, Layers] = dataclasses.field(default_factory=dict)
    pooled: Mapping[str, Layers] = dataclasses.field(default_factory=dict)
    top: Mapping[str, Layers] = dataclasses.field(default_factory=dict)
    directions: Array | None = None
    centre: Array | None = None
    cosine: bool = False
    offset: Array | None = None
    scale: Array | None = None
    k: int = 8
    tokens: Selection = "all"
    sinks: bool = True
    dose: bool = False


KINDS = ("raw", "norm", "scores", "mean", "mean_norm", "pooled", "top")
SCORED = ("scores", "pooled", "top")
SELECTED = ("mean", "mean_norm", "pooled", "top")


@flax.struct.dataclass
class Captured:
    """What came back: for each kind a dict from site to array (see Capture), in the order of the layers asked for."""

    raw: dict[str, jax.Array]
    norm: dict[str, jax.Array]
    scores: dict[str, jax.Array]
    mean: dict[str, jax.Array]
    mean_norm: dict[str, jax.Array]
    pooled: dict[str, jax.Array]
    top: dict[str, tuple[jax.Array, jax.Array]]
    dose: jax.Array | None


@flax.struct.dataclass
class LayerProbes:
    """What one layer needs (or all, with a leading L axis)."""

    slots: Mapping[str, Mapping[str, Array]]  # kind → site → [] int32: where its result goes, or -1
    directions: Any  # [E, D], or None where nothing is scored
    adjust: Mapping[str, Any]  # centre [D], offset [E] and scale [E] of the scores; only those given
    index: Array  # [] int32, the layer's number


@flax.struct.dataclass
class Probes:
    """A Capture as arrays. Which layers and tokens are read are values; how many layers is part of the program."""

    layers: LayerProbes
    spans: Array  # [B, P, 2] int32, the selected tokens
    lengths: Array  # [B] int32
    counts: tuple[tuple[str, str, int], ...] = flax.struct.field(pytree_node=False)  # (kind, site, n)
    cosine: bool = flax.struct.field(pytree_node=False)
    k: int = flax.struct.field(pytree_node=False)
    sinks: bool = flax.struct.field(pytree_node=False)
    dose: bool = flax.struct.field(pytree_node=False)


def ordinary(spans: jax.Array, norm: jax.Array, lengths: jax.Array) -> jax.Array:
    """`spans [B, P, 2]` without the attention sinks among them, `[B, P * (SINKS + 1), 2]`; as they were, if nothing else is left.

    Sinks, mostly a row's first token, are many times as long as other tokens and say nothing of the text: a mean that counts
    them is a mean of little else. Here they are the tokens whose `norm [B, T]` is more than `SINK` times the median of their
    row (the lower of two middle ones, so that one of two tokens can be told as a sink), at most `SINKS` in a row.
    """
    B, T = norm.shape
    norm = jnp.where(jnp.arange(T) < lengths[:, None], norm, jnp.inf)
    middle = jnp.take_along_axis(jnp.sort(norm, axis=1), (jnp.maximum(lengths, 1)[:, None] - 1) // 2, axis=1)
    above, at = lax.top_k(jnp.where(jnp.isfinite(norm) & (norm > SINK * middle), norm, -1.0), min(SINKS, T))
    at = jnp.sort(jnp.where(above > 0, at, T), axis=1).astype(jnp.int32)  # T where there are fewer
    gaps = jnp.stack([jnp.pad(at + 1, ((0, 0), (1, 0))), jnp.pad(at, ((0, 0), (0, 1)), constant_values=T)], axis=-1)
    first = jnp.maximum(spans[:, :, None, 0], gaps[:, None, :, 0]).reshape(B, -1)
    stop = jnp.minimum(spans[:, :, None, 1], gaps[:, None, :, 1]).reshape(B, -1)
    left = (first < jnp.minimum(stop, lengths[:, None])).any(1)[:, None, None]
    whole = jnp.pad(spans, ((0, 0), (0, first.shape[1] - spans.shape[1]), (0, 0)))
    return jnp.where(left, jnp.stack([first, stop], axis=-1), whole)


def resolve(config: ModelConfig, capture: Capture, batch: TokenBatch, new_tokens: int = 0) -> Probes:
    """The arrays for a batch. Raises ValueError for unknown sites or layers, an empty selection, or wrong directions."""
    if not isinstance(capture, Capture):
        raise TypeError(f"capture is {type(capture).__name__}, not a jaxemo.Capture")
    L, D = config.n_layers, config.d_model
    slots: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in KINDS}
    counts = []
    for kind in KINDS:
        wanted = getattr(capture, kind)
        if not isinstance(wanted, Mapping):
            raise TypeError(
                f'Capture({kind}={wanted!r}): expected sites and layers, for example {{"resid_post": [3, 20]}}'
            )
        for site, layers in wanted.items():
            if site not in SITES:
                raise ValueError(f"Capture({kind}=...): unknown site {site!r}; sites are {', '.join(SITES)}")
            numbers = resolve_layers(layers, L)
            slots[kind][site] = np.full(L, -1, np.int32)
            slots[kind][site][list(numbers)] = np.arange(len(numbers))
            counts.append((kind, site, len(numbers)))
    if not counts and not capture.dose:
        raise ValueError("this Capture asks for nothing")
    scored = next((kind for kind in SCORED if getattr(capture, kind)), None)
    directions = capture.directions
    if scored is None:
        for name in ("directions", "centre", "offset", "scale", "cosine"):
            if getattr(capture, name) is not None and getattr(capture, name) is not False:
                raise ValueError(f"this Capture has {name} but asks for no scores")
    elif directions is None or np.ndim(directions) != 3 or directions.shape[::2] != (L, D):
        shape = "none" if directions is None else list(np.shape(directions))
        raise ValueError(f"Capture({scored}=...) needs directions [L={L}, E, D={D}], got {shape}")
    adjust = {}
    E = 0 if directions is None else directions.shape[1]
    for name, letter, size in (("centre", "D", D), ("offset", "E", E), ("scale", "E", E)):
        array = getattr(capture, name)
        if array is not None and np.shape(array) != (L, size):
            raise ValueError(f"Capture({name}=...) needs {name} [L={L}, {letter}], got {list(np.shape(array))}")
        if array is not None:
            adjust[name] = np.asarray(array, np.float32)
    if isinstance(capture.k, bool) or not isinstance(capture.k, int | np.integer) or capture.k < 1:
        raise ValueError(f"Capture(k={capture.k!r}): expected a whole number of tokens, at least 1")
    chosen = any(getattr(capture, kind) for kind in SELECTED)
    rows = zip(np.asarray(batch.lengths).tolist(), turns_of(batch), strict=True) if chosen else ()
    found = [spans(capture.tokens, n, new_tokens, turns, row) for row, (n, turns) in enumerate(rows)] or [[]]
    P = 4  # a power of two, so that most selections keep the shape
    while max(map(len, found)) > P:
        P *= 2
    where = np.zeros((len(batch.lengths), P, 2), np.int32)
    for row, ranges in enumerate(found):
        where[row, : len(ranges)] = np.array(ranges, np.int32).reshape(-1, 2)
    layers = LayerProbes(slots, directions if scored else None, adjust, np.arange(L, dtype=np.int32))
    lengths = np.asarray(batch.lengths, np.int32)
    return Probes(
        layers, where, lengths, tuple(counts), bool(capture.cosine), int(capture.k), bool(capture.sinks), capture.dose
    )


def init(config: ModelConfig, probes: Probes, x: jax.Array) -> Captured:
    """Empty buffers for a pass over a residual stream like `x [B, T, D]`."""
    B, T, D = x.shape
    E = 0 if probes.layers.directions is None else probes.layers.directions.shape[1]
    shapes = {
        "raw": (B, T, D),
        "norm": (B, T),
        "scores": (B, T, E),
        "mean": (B, D),
        "mean_norm": (B,),
        "pooled": (B, E),
    }
    buffers: dict[str, dict] = {kind: {} for kind in KINDS}
    for kind, site, n in probes.counts:
        if kind == "top":
            shape = (n, E, probes.k)
            buffers[kind][site] = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
        else:
            buffers[kind][site] = jnp.zeros((n, *shapes[kind]), x.dtype if kind == "raw" else jnp.float32)
    return Captured(**buffers, dose=jnp.zeros((config.n_layers, B, T), jnp.float32) if probes.dose else None)


def projected(probes: Probes, layer: LayerProbes) -> Any:
    """The directions `[E, D]` on which plain projections of every layer's `resid_post` are asked for, which steering makes on its
    way, or None."""
    every = ("scores", "resid_post", len(probes.layers.index)) in probes.counts
    plain = every and not layer.adjust and not probes.cosine
    return layer.directions if plain else None


def collect(
    probes: Probes, layer: LayerProbes, captured: Captured, sites: dict, positions: jax.Array, scores=None
) -> Captured:
    """Reduce one layer's `sites` (`[B, T, D]` each) and put the results where they belong.

    `scores [B, T, E]` are those of `resid_post`, where steering has made them already (see `projected`).
    """

    def norm(site):
        return jnp.linalg.norm(sites[site].astype(jnp.float32), axis=-1)

    def selection(site):  # spans within this pass: padding and, where asked for, sinks left out
        spans = jnp.minimum(probes.spans, probes.lengths[:, None, None]) - positions[:, :1, None]
        return spans if probes.sinks else ordinary(spans, norm(site), probes.lengths - positions[:, 0])

    def mean(x, site):  # of x [B, T, ...] over the selected tokens
        here = selected(selection(site), jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
        weight = here / jnp.maximum(here.sum(1, keepdims=True), 1).astype(jnp.float32)
        x = x.reshape(*x.shape[:2], -1).astype(jnp.float32)
        x = jnp.where(here[..., None], x, 0)  # not only by its weight: 0 times a NaN is not 0
        return jnp.einsum("btd,bt->bd", x, weight, precision="highest")

    def reduce(kind, site):
        x, adjust = sites[site], dict(layer.adjust, cosine=probes.cosine)
        if kind == "raw":
            return x
        if kind == "norm":
            return norm(site)
        if kind == "mean":
            return mean(x, site)
        if kind == "mean_norm":
            return mean(norm(site), site)[:, 0]
        if kind == "pooled":
            return kernels.project_pool(x, layer.directions, selection(site), **adjust)
        if kind == "top":
            return kernels.top_tokens(x, layer.directions, selection(site), **adjust, k=probes.k)
        return kernels.project(x, layer.directions, **adjust) if scores is None or site != "resid_post" else scores

    def put(buffer, slot, value):
        return lax.dynamic_update_index_in_dim(buffer, value.astype(buffer.dtype), slot, 0)

    buffers: dict[str, dict] = {kind: dict(getattr(captured, kind)) for kind in KINDS}
    for kind, site, n in probes.counts:
        slot = layer.slots[kind][site]

        def reduced(before, kind=kind, site=site, slot=slot):
            return jax.tree.map(lambda buffer, value: put(buffer, slot, value), before, reduce(kind, site))

        before = buffers[kind][site]  # a layer that is not asked for costs nothing
        every = n == len(probes.layers.index)
        buffers[kind][site] = reduced(before) if every else lax.cond(slot >= 0, reduced, lambda x: x, before)
    dose = captured.dose
    if dose is not None:
        before, after = sites["unsteered"].astype(jnp.float32), sites["resid_post"].astype(jnp.float32)
        ratio = jnp.linalg.norm(after - before, axis=-1) / jnp.maximum(jnp.linalg.norm(before, axis=-1), 1e-30)
        dose = put(dose, layer.index, ratio)
    return Captured(**buffers, dose=dose)
