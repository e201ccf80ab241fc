"""The parameters of a model, described before they exist.

`describe(config)` is a tree of `Leaf`s: shape, logical axes and initialiser of every weight. Loading, random
initialisation, checking and sharding are maps over that tree.

A model's layers come in one of two layouts, and the forward pass follows whichever it is given:
- *separate*: `params["layers"]` is a tuple of L dicts. XLA:CPU reads each weight where it lies.
- *stacked*: `params["layers"]` is one dict whose leaves have a leading layer axis, and the layers are a `lax.scan`.
  One compiled layer serves all: the layout for GPU and TPU.
"""

import dataclasses
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxemo.config import ModelConfig
from jaxemo.quantise import Quantised

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One weight before it exists. `axes` names each dimension for sharding; `fan_in` scales the random initialiser."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fan_in: int = 0  # 0: initialised to the constant `fill`
    fill: float = 1.0
    exact: bool = False  # kept in float32 whatever the model's type: a few numbers that everything passes through


def describe(config: ModelConfig) -> Params:
    """The tree of `Leaf`s of a model, layers separate. Projections are stored `[in, out]`, heads split out.

    A model is what stands here: the forward pass applies a norm, a bias or a gate where there is one.
    """
    size = {
        "embed": config.d_model, "heads": config.n_heads, "kv_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "ff": config.d_ff, "vocab": config.vocab_size, "experts": config.n_experts, "positions": config.max_positions,
    }  # fmt: skip

    def leaf(*axes: str, **kwargs) -> Leaf:
        return Leaf(tuple(size[axis] for axis in axes), axes, **kwargs)

    def norm(name: str, *axes: str) -> Params:
        bias = {f"{name}_bias": leaf(*axes, fill=0.0, exact=True)} if "norm" in config.biases else {}
        return {name: leaf(*axes, exact=True), **bias}

    def projection(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], many=(), exact=False) -> Params:
        fan_in = math.prod(size[axis] for axis in inputs)
        bias = {f"{name}_bias": leaf(*many, *outputs, fill=0.0, exact=exact)} if name in config.biases else {}
        return {name: leaf(*many, *inputs, *outputs, fan_in=fan_in, exact=exact), **bias}

    embed, ff, many = ("embed",), ("ff",), ("experts",) if config.n_experts else ()
    layer = {
        **projection("wq", embed, ("heads", "head_dim")),
        **projection("wk", embed, ("kv_heads", "head_dim")),
        **projection("wv", embed, ("kv_heads", "head_dim")),
        **projection("wo", ("heads", "head_dim"), embed),
        **(projection("router", embed, many, exact=True) if many else {}),
        **(projection("w_gate", embed, ff, many) if config.gated else {}),
        **projection("w_up", embed, ff, many),
        **projection("w_down", ff, embed, many),
    }
    for name in config.norms:
        layer |= norm(name, "embed")
    if config.qk_norm:
        layer["q_norm"], layer["k_norm"] = {
            "head": (leaf("head_dim", exact=True), leaf("head_dim", exact=True)),
            "all": (leaf("heads", "head_dim", exact=True), leaf("kv_heads", "head_dim", exact=True)),
        }[config.qk_norm]
    if config.attn_sinks:
        layer["sinks"] = leaf("heads", fill=0.0, exact=True)
    tree: Params = {"embed": leaf("vocab", "embed", fan_in=config.d_model), **norm("final_norm", "embed")}
    if config.learned_positions:
        tree["pos_embed"] = leaf("positions", "embed", fan_in=config.d_model)
    if not config.tie_embeddings:
        tree["unembed"] = leaf("vocab", "embed", fan_in=config.d_model)
    if "unembed" in config.biases:
        tree["unembed_bias"] = leaf("vocab", fill=0.0)
    tree["layers"] = tuple(dict(layer) for _ in range(config.n_layers))
    return tree


def is_leaf(node) -> bool:
    return isinstance(node, Leaf)


def dtype_of(leaf: Leaf, dtype):
    return jnp.float32 if leaf.exact else dtype


def init(config: ModelConfig, seed: int = 0, dtype=jnp.float32) -> Params:
    """Random weights, layers separate: normal with variance 1/fan_in, norm gains one, biases zero."""
    leaves, treedef = jax.tree.flatten(describe(config), is_leaf=is_leaf)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def make(leaf: Leaf, key):
        kind = dtype_of(leaf, dtype)
        if not leaf.fan_in:
            return jnp.full(leaf.shape, leaf.fill, kind)
        return (jax.random.normal(key, leaf.shape, jnp.float32) / math.sqrt(leaf.fan_in)).astype(kind)

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


def fingerprint(params: Params) -> str:
    """Tells weights from others: a hash of the first row of every weight, as it is held, in either layout."""
    layers = params["layers"]
    if is_stacked(params):
        firsts = jax.tree.map(lambda leaf: np.asarray(leaf[:, :1]), layers)
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], firsts) for i in range(len(jax.tree.leaves(firsts)[0]))]
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path({**params, "layers": list(layers)}):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape[1:]}".encode())
        digest.update(np.asarray(leaf[:1]).tobytes())
    return digest.hexdigest()


def count(config: ModelConfig) -> int:
    """Number of weights."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(describe(config), is_leaf=is_leaf))


def check(config: ModelConfig, params: Params) -> None:
    """Raise ValueError, naming every leaf that is missing, unexpected or of another shape than `describe` says."""
    expected, _ = jax.tree.flatten_with_path(describe(config), is_leaf=is_leaf)
    found = dict(jax.tree.flatten_with_path(unstacked_shapes(params), is_leaf=lambda n: isinstance(n, Quantised))[0])
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
