"""The parameters of a model, described before they exist.

`describe(config)` is a tree of `Leaf`s: shape, logical axes and initialiser of every weight. Loading, random
initialisation, checking and sharding are maps over that tree.

A model's layers come in one of two layouts, and the forward pass follows whichever it is given:
- *separate*: `params["layers"]` is a tuple of L dicts. XLA:CPU reads each weight where it lies.
- *stacked*: `params["layers"]` is one dict whose leaves have a leading layer axis, and the layers are a `lax.scan`.
  One compiled layer serves all: the layout for GPU and TPU.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxemo.config import ModelConfig

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One weight before it exists. `axes` names each dimension for sharding; `fan_in` scales the random initialiser."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fan_in: int = 0  # 0: initialised to ones (norm gains)


def describe(config: ModelConfig) -> Params:
    """The tree of `Leaf`s of a model, layers separate. Projections are stored `[in, out]`, heads split out."""
    D, N, K, H, F, V = (
        config.d_model, config.n_heads, config.n_kv_heads, config.head_dim, config.d_ff, config.vocab_size,
    )  # fmt: skip
    layer = {
        "attn_norm": Leaf((D,), ("embed",)),
        "wq": Leaf((D, N, H), ("embed", "heads", "head_dim"), D),
        "wk": Leaf((D, K, H), ("embed", "kv_heads", "head_dim"), D),
        "wv": Leaf((D, K, H), ("embed", "kv_heads", "head_dim"), D),
        "wo": Leaf((N, H, D), ("heads", "head_dim", "embed"), N * H),
        "mlp_norm": Leaf((D,), ("embed",)),
        "w_gate": Leaf((D, F), ("embed", "ff"), D),
        "w_up": Leaf((D, F), ("embed", "ff"), D),
        "w_down": Leaf((F, D), ("ff", "embed"), F),
    }
    tree: Params = {
        "embed": Leaf((V, D), ("vocab", "embed"), D),
        "layers": tuple(dict(layer) for _ in range(config.n_layers)),
        "final_norm": Leaf((D,), ("embed",)),
    }
    if not config.tie_embeddings:
        tree["unembed"] = Leaf((V, D), ("vocab", "embed"), D)
    return tree


def is_leaf(node) -> bool:
    return isinstance(node, Leaf)


def init(config: ModelConfig, seed: int = 0, dtype=jnp.float32) -> Params:
    """Random weights, layers separate: normal with variance 1/fan_in, norm gains one."""
    leaves, treedef = jax.tree.flatten(describe(config), is_leaf=is_leaf)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def make(leaf: Leaf, key):
        if not leaf.fan_in:
            return jnp.ones(leaf.shape, dtype)
        return (jax.random.normal(key, leaf.shape, jnp.float32) / math.sqrt(leaf.fan_in)).astype(dtype)

    return jax.tree.unflatten(treedef, [make(leaf, key) for leaf, key in zip(leaves, keys, strict=True)])


def is_stacked(params: Params) -> bool:
    return isinstance(params["layers"], dict)


def stack(params: Params) -> Params:
    """The same weights with one leading layer axis on every leaf of `params["layers"]` (for `lax.scan`)."""
    if is_stacked(params):
        return params
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}


def unstack(params: Params) -> Params:
    """The same weights with layers as a tuple of dicts."""
    if not is_stacked(params):
        return params
    layers = params["layers"]
    count = jax.tree.leaves(layers)[0].shape[0]
    return {**params, "layers": tuple(jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(count))}


def count(config: ModelConfig) -> int:
    """Number of weights."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(describe(config), is_leaf=is_leaf))


def check(config: ModelConfig, params: Params) -> None:
    """Raise ValueError, naming every leaf that is missing, unexpected or of another shape than `describe` says."""
    expected, _ = jax.tree.flatten_with_path(describe(config), is_leaf=is_leaf)
    found = dict(jax.tree.flatten_with_path(unstacked_shapes(params))[0])
    faults = []
    for path, leaf in expected:
        shape = found.pop(path, None)
        if shape is None:
            faults.append(f"{jax.tree_util.keystr(path)} is missing")
        elif shape.shape != leaf.shape:
            faults.append(f"{jax.tree_util.keystr(path)} has shape {shape.shape}, expected {leaf.shape}")
    faults += [f"{jax.tree_util.keystr(path)} is not a weight of this model" for path in found]
    if faults:
        raise ValueError("these weights do not fit the model's configuration: " + "; ".join(faults))


def unstacked_shapes(params: Params) -> Params:
    return jax.eval_shape(unstack, params)
