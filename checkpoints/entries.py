"""What tables of tensors are made of: entries, and what may be done to a tensor on its way to a weight.

A table says for every weight of `params.describe` from which tensor it comes and what is done to it. `{i}` stands for
the layer's number and `{x}` for an expert's. Weights that the model does not have are passed over, so families share
tables; every tensor of a checkpoint must be used, and every weight of the model found (see `convert`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxemo.config import ModelConfig

Transform = Callable[[ModelConfig, np.ndarray], np.ndarray]
Part = Callable[[ModelConfig], tuple[int, int]]  # a range of rows: the first, and the one after the last


def linear(config: ModelConfig, w: np.ndarray) -> np.ndarray:
    """Stored `[out, in]`, kept `[in, out]`; vectors as they are."""
    return w.T if w.ndim == 2 else w


class Entry(NamedTuple):
    source: str  # the tensor's name
    transform: Transform = linear
    shared: bool = False  # the tensor is another weight's as well


Table = Mapping[str, Entry | tuple[Entry, ...]]  # several: whichever the checkpoint has


def named(
    names: Mapping[str, str], before: str = "", transform: Transform = linear, shared: bool = False
) -> dict[str, Entry]:
    """Entries for weights and for their biases, from the tensors' names less `before` and the ending."""
    return {
        f"{weight}{bias}": Entry(f"{before}{source}.{ending}", transform, shared)
        for weight, source in names.items()
        for bias, ending in (("", "weight"), ("_bias", "bias"))
    }


# ---- transforms ------------------------------------------------------------------------------------------------------


def same(config: ModelConfig, w: np.ndarray) -> np.ndarray:
    return w


def swap(config: ModelConfig, w: np.ndarray) -> np.ndarray:
    """Every expert's matrix, stored `[out, in]`, kept `[in, out]`."""
    return np.swapaxes(w, -1, -2)


def one_plus(config: ModelConfig, w: np.ndarray) -> np.ndarray:
    """Gemma stores its norms' gains less one."""
    return 1 + w.astype(np.float32)


def halves(config: ModelConfig, w: np.ndarray) -> np.ndarray:
    """Queries or keys `[heads · H, ...]` whose rotary pairs are neighbours, put so that pairs are half apart."""
    R = max((kind.rope.dim for kind in config.attention if kind.rope), default=0)
    order = np.concatenate([np.arange(0, R, 2), np.arange(1, R, 2), np.arange(R, config.head_dim)])
    return linear(config, w.reshape(-1, config.head_dim, *w.shape[1:])[:, order].reshape(w.shape))


def rows(part: Part, finish: Transform = linear) -> Transform:
    """A range of a fused matrix's output rows."""
    return lambda config, w: finish(config, w[slice(*part(config))])


def q_rows(c: ModelConfig) -> tuple[int, int]:
    return 0, c.n_heads * c.head_dim


def k_rows(c: ModelConfig) -> tuple[int, int]:
    return c.n_heads * c.head_dim, (c.n_heads + c.n_kv_heads) * c.head_dim


def v_rows(c: ModelConfig) -> tuple[int, int]:
    return (c.n_heads + c.n_kv_heads) * c.head_dim, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim


def gate_rows(c: ModelConfig) -> tuple[int, int]:
    return 0, c.d_ff


def up_rows(c: ModelConfig) -> tuple[int, int]:
    return c.d_ff, 2 * c.d_ff


def third(j: int) -> Transform:
    """Queries, keys or values of GPT-2's fused `[in, 3 · out]`."""
    return lambda config, w: np.split(w, 3, axis=-1)[j]


def third_of_head(j: int) -> Transform:
    """Queries, keys or values of GPT-NeoX's fused rows, `[N, 3, H]`."""

    def take(c: ModelConfig, w: np.ndarray) -> np.ndarray:
        split = w.reshape(c.n_heads, 3, c.head_dim, *w.shape[1:])[:, j]
        return linear(c, split.reshape(-1, *w.shape[1:]))

    return take
