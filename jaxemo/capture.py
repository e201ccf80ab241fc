"""Capture: what a forward pass returns besides logits, reduced inside the compiled pass.

Four sites of each layer can be read: `resid_pre` and `resid_post` (the residual stream before and after the block,
the latter after steering), `attn_out` and `mlp_out` (what the block adds to it). Each can be returned whole, as the
mean over selected tokens, as its norm, or as scores against directions; only what is asked for is computed.
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
from jaxemo.steering import resolve_layers
from jaxemo.tokens import Array, Selection, TokenBatch, spans, turns_of

SINK = 10.0  # a token whose norm is this many times its row's median is an attention sink and no measure of the stream
SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")
Layers = str | int | Sequence[int]  # "all" or layer numbers; the order given is the order returned


@dataclasses.dataclass(frozen=True, eq=False)
class Capture:
    """What to return. Each of the first four maps a site to the layers wanted, for example `{"resid_post": [3, 20]}`.

    Args:
      raw: activations as they are, `[n, B, T, D]` in the model's dtype.
      mean: float32 means over the tokens of `tokens`, `[n, B, D]`.
      norm: float32 Euclidean norms of every token, `[n, B, T]`.
      scores: float32 projections of every token on `directions`, `[n, B, T, E]`.
      directions: `[L, E, D]` for `scores`, taken as they are (unit length makes a score a length).
      tokens: the selection that `mean` runs over.
      dose: also return how far steering moved each token, ‖x' − x‖ / ‖x‖, at every layer, `[L, B, T]`.
    """

    raw: Mapping[str, Layers] = dataclasses.field(default_factory=dict)
    mean: Mapping[str, Layers] = dataclasses.field(default_factory=dict)
    norm: Mapping[str, Layers] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, Layers] = dataclasses.field(default_factory=dict)
    directions: Array | None = None
    tokens: Selection = "all"
    dose: bool = False


@flax.struct.dataclass
class Captured:
    """What came back: for each kind a dict from site to array (see Capture), in the order of the layers asked for."""

    raw: dict[str, jax.Array]
    mean: dict[str, jax.Array]
    norm: dict[str, jax.Array]
    scores: dict[str, jax.Array]
    dose: jax.Array | None


@flax.struct.dataclass
class LayerProbes:
    """What one layer needs (or all, with a leading L axis)."""

    slots: Mapping[str, Mapping[str, Array]]  # kind → site → [] int32: where its result goes, or -1
    directions: Any  # [E, D], or None where nothing is scored
    index: Array  # [] int32, the layer's number


@flax.struct.dataclass
class Probes:
    """A Capture as arrays. Which layers and tokens are read are values; how many layers is part of the program."""

    layers: LayerProbes
    spans: Array  # [B, P, 2] int32, the tokens of `mean`
    lengths: Array  # [B] int32
    counts: tuple[tuple[str, str, int], ...] = flax.struct.field(pytree_node=False)  # (kind, site, n)
    dose: bool = flax.struct.field(pytree_node=False)


def ordinary(norm: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Which of the tokens `real [B, T]` are no attention sinks, by their residual `norm [..., B, T]`.

    Sinks, mostly a row's first token, are many times as long as other tokens and say nothing of the text: a mean that counts
    them is a mean of little else. The median is the lower of two, so that one of two tokens can be told as a sink.
    """
    middle = np.broadcast_to((np.maximum(real.sum(-1), 1)[:, None] - 1) // 2, (*norm.shape[:-1], 1))
    median = np.take_along_axis(np.sort(np.where(real, norm, np.inf), axis=-1), middle, axis=-1)
    return real & (norm <= SINK * median)


KINDS = ("raw", "mean", "norm", "scores")


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
    directions = capture.directions
    if directions is not None and not capture.scores:
        raise ValueError("this Capture has directions but asks for no scores on them")
    if capture.scores and (directions is None or np.ndim(directions) != 3 or directions.shape[::2] != (L, D)):
        shape = "none" if directions is None else list(np.shape(directions))
        raise ValueError(f"Capture(scores=...) needs directions [L={L}, E, D={D}], got {shape}")
    rows = zip(np.asarray(batch.lengths).tolist(), turns_of(batch), strict=True) if capture.mean else ()
    found = [spans(capture.tokens, n, new_tokens, turns, row) for row, (n, turns) in enumerate(rows)] or [[]]
    P = 4  # a power of two, so that most selections keep the shape
    while max(map(len, found)) > P:
        P *= 2
    where = np.zeros((len(batch.lengths), P, 2), np.int32)
    for row, ranges in enumerate(found):
        where[row, : len(ranges)] = np.array(ranges, np.int32).reshape(-1, 2)
    layers = LayerProbes(slots, directions if capture.scores else None, np.arange(L, dtype=np.int32))
    return Probes(layers, where, np.asarray(batch.lengths, np.int32), tuple(counts), capture.dose)


def init(config: ModelConfig, probes: Probes, x: jax.Array) -> Captured:
    """Empty buffers for a pass over a residual stream like `x [B, T, D]`."""
    B, T, D = x.shape
    f32 = jnp.float32
    form = {"raw": ((B, T, D), x.dtype), "mean": ((B, D), f32), "norm": ((B, T), f32)}
    if probes.layers.directions is not None:
        form["scores"] = ((B, T, probes.layers.directions.shape[1]), f32)
    buffers: dict[str, dict] = {kind: {} for kind in KINDS}
    for kind, site, n in probes.counts:
        shape, dtype = form[kind]
        buffers[kind][site] = jnp.zeros((n, *shape), dtype)
    return Captured(**buffers, dose=jnp.zeros((config.n_layers, B, T), f32) if probes.dose else None)


def collect(
    probes: Probes, layer: LayerProbes, captured: Captured, sites: dict, positions: jax.Array, scores=None
) -> Captured:
    """Reduce one layer's `sites` (`[B, T, D]` each) and put the results where they belong.

    `scores [B, T, E]` of `resid_post`, where steering has made them already, are taken as they are.
    """

    def reduce(kind, site):
        x = sites[site]
        if kind == "raw":
            return x
        if kind == "scores":
            return kernels.project(x, layer.directions) if scores is None or site != "resid_post" else scores
        if kind == "norm":
            return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
        at = positions[:, :, None]
        weight = ((probes.spans[:, None, :, 0] <= at) & (at < probes.spans[:, None, :, 1])).any(-1)
        weight = (weight & (positions < probes.lengths[:, None])).astype(jnp.float32)  # [B, T]
        weight = weight / jnp.maximum(weight.sum(1, keepdims=True), 1)
        # Padding has weight 0, but 0 times a NaN there would not be 0.
        x32 = jnp.where(weight[..., None] > 0, x.astype(jnp.float32), 0)
        return jnp.einsum("btd,bt->bd", x32, weight, precision="highest")

    def put(buffer, slot, value):
        at = jnp.maximum(slot, 0)
        kept = lax.dynamic_index_in_dim(buffer, at, keepdims=False)
        return lax.dynamic_update_index_in_dim(buffer, jnp.where(slot >= 0, value.astype(buffer.dtype), kept), at, 0)

    buffers = {
        kind: {site: put(getattr(captured, kind)[site], slot, reduce(kind, site)) for site, slot in wanted.items()}
        for kind, wanted in layer.slots.items()
    }
    dose = captured.dose
    if dose is not None:
        before, after = sites["unsteered"].astype(jnp.float32), sites["resid_post"].astype(jnp.float32)
        ratio = jnp.linalg.norm(after - before, axis=-1) / jnp.maximum(jnp.linalg.norm(before, axis=-1), 1e-30)
        dose = put(dose, layer.index, ratio)
    return Captured(**buffers, dose=dose)
