"""How each model family's checkpoints are laid out: tables from their names to ours, nothing else.

A table row is (source pattern, target path, transform). `{i}` in a pattern stands for the layer's number. Every tensor
of a checkpoint must match exactly one row and every weight of the model must be filled exactly once.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxemo.config import ModelConfig


class CheckpointError(ValueError):
    """A checkpoint that is damaged or not understood. The message names the file and what in it is at fault."""


class Row(NamedTuple):
    source: str
    target: tuple[str, ...]  # ("layers", "wq") is that weight of layer i
    transform: Callable[[ModelConfig, np.ndarray], np.ndarray]  # float32 array as stored → the shape `describe` says


def _same(config, w):
    return w


def _linear(config, w):
    return w.T  # stored [out, in]


def _q(config, w):
    return w.T.reshape(config.d_model, config.n_heads, config.head_dim)


def _kv(config, w):
    return w.T.reshape(config.d_model, config.n_kv_heads, config.head_dim)


def _out(config, w):
    return w.T.reshape(config.n_heads, config.head_dim, config.d_model)


def _unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of the rows of q and k: from interleaved rotary pairs back to halves."""
    return w.reshape(heads, -1, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


LLAMA_GGUF = (
    Row("token_embd.weight", ("embed",), _same),
    Row("output_norm.weight", ("final_norm",), _same),
    Row("output.weight", ("unembed",), _same),
    Row("blk.{i}.attn_norm.weight", ("layers", "attn_norm"), _same),
    Row("blk.{i}.attn_q.weight", ("layers", "wq"), lambda c, w: _q(c, _unpermute(w, c.n_heads))),
    Row("blk.{i}.attn_k.weight", ("layers", "wk"), lambda c, w: _kv(c, _unpermute(w, c.n_kv_heads))),
    Row("blk.{i}.attn_v.weight", ("layers", "wv"), _kv),
    Row("blk.{i}.attn_output.weight", ("layers", "wo"), _out),
    Row("blk.{i}.ffn_norm.weight", ("layers", "mlp_norm"), _same),
    Row("blk.{i}.ffn_gate.weight", ("layers", "w_gate"), _linear),
    Row("blk.{i}.ffn_up.weight", ("layers", "w_up"), _linear),
    Row("blk.{i}.ffn_down.weight", ("layers", "w_down"), _linear),
)

# Keys under "llama." in a GGUF that are read below, and those that may stand there without changing the computation.
_LLAMA_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count",
    "attention.key_length", "attention.value_length", "vocab_size",
}  # fmt: skip


def llama_gguf_config(where: str, meta: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """ModelConfig from a GGUF's metadata (`general.architecture = llama`) and tensor shapes; refuses unknown keys."""
    keys = {key.removeprefix("llama."): value for key, value in meta.items() if key.startswith("llama.")}
    scaling = keys.pop("rope.scaling.type", "none")
    if scaling != "none":
        raise CheckpointError(f"{where}: rope scaling {scaling!r} is not supported")
    if unknown := sorted(set(keys) - _LLAMA_KEYS):
        raise CheckpointError(f"{where}: unknown configuration keys {', '.join('llama.' + key for key in unknown)}")

    def need(key):
        if key not in keys:
            raise CheckpointError(f"{where}: the configuration key llama.{key} is missing")
        return keys[key]

    n_heads, d_model = need("attention.head_count"), need("embedding_length")
    head_dim = keys.get("attention.key_length", d_model // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            raise CheckpointError(f"{where}: llama.{key} is {keys[key]} but the head size is {head_dim}")
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{where}: the tensor token_embd.weight is missing")
    vocab_size = shapes["token_embd.weight"][0]
    if keys.get("vocab_size", vocab_size) != vocab_size:
        raise CheckpointError(f"{where}: llama.vocab_size is {keys['vocab_size']}, the embedding has {vocab_size} rows")
    try:
        return ModelConfig(
            family="llama",
            vocab_size=vocab_size,
            d_model=d_model,
            n_layers=need("block_count"),
            n_heads=n_heads,
            n_kv_heads=keys.get("attention.head_count_kv", n_heads),
            head_dim=head_dim,
            d_ff=need("feed_forward_length"),
            max_positions=need("context_length"),
            norm_eps=need("attention.layer_norm_rms_epsilon"),
            rope_theta=keys.get("rope.freq_base", 10000.0),
            tie_embeddings="output.weight" not in shapes,
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error


class Family(NamedTuple):
    config: Callable[[str, Mapping[str, Any], Mapping[str, tuple[int, ...]]], ModelConfig]
    table: tuple[Row, ...]


GGUF = {"llama": Family(llama_gguf_config, LLAMA_GGUF)}
