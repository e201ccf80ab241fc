"""Model families as GGUF files have them: their metadata in the words of `config.json`, and one table of names.

llama.cpp's converter has done some of the work already: fused gates are split, Gemma's norms have their 1 added, and
the rotary pairs of some families are neighbours.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxemo.checkpoints import families
from jaxemo.checkpoints.families import Entry, Table, _k_rows, _q_rows, _v_rows, halves, rows, same
from jaxemo.checkpoints.keys import CheckpointError

from jaxemo.config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]

# A key behind the architecture's name, and the key of config.json that means the same.
KEYS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "vocab_size": "vocab_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "rope.freq_base": "rope_theta",
    "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size", "use_parallel_residual": "use_parallel_residual",
    "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
SCALING = {
    "type": "rope_type", "factor": "factor", "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow",
}  # fmt: skip


def _swap(config: ModelConfig, w: np.ndarray) -> np.ndarray:
    return np.swapaxes(w, -1, -2)


_NAMES = {
    "attn_norm": "attn_norm", "attn_post_norm": "post_attention_norm", "mlp_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "router": "ffn_gate_inp", "w_gate": "ffn_gate", "w_up": "ffn_up",
    "w_down": "ffn_down",
}  # fmt: skip
PLAIN: dict[str, Entry | tuple[Entry, ...]] = {
    "embed": Entry("token_embd.weight", same),
    "pos_embed": Entry("position_embd.weight", same),
    "unembed": Entry("output.weight", same),
    "unembed_bias": Entry("output.bias"),
    "final_norm": Entry("output_norm.weight"),
    "final_norm_bias": Entry("output_norm.bias"),
    "sinks": Entry("blk.{i}.attn_sinks.weight"),
    **{name: Entry("blk.{i}." + source + ".weight") for name, source in _NAMES.items()},
    **{f"{name}_bias": Entry("blk.{i}." + source + ".bias") for name, source in _NAMES.items()},
}
LLAMA = {
    **PLAIN,
    **{
        f"w{p}{b}": Entry(f"blk.{{i}}.attn_{p}.{'bias' if b else 'weight'}", halves)
        for p in "qk"
        for b in ("", "_bias")
    },
}
_FUSED = {
    f"w{p}{b}": Entry(f"blk.{{i}}.attn_qkv.{'bias' if b else 'weight'}", rows(part))
    for p, part in (("q", _q_rows), ("k", _k_rows), ("v", _v_rows))
    for b in ("", "_bias")
}
FUSED = {**PLAIN, **_FUSED}
PHI3 = {
    **FUSED,
    "w_gate": Entry("blk.{i}.ffn_up.weight", rows(lambda c: (0, c.d_ff))),
    "w_up": Entry("blk.{i}.ffn_up.weight", rows(lambda c: (c.d_ff, 2 * c.d_ff))),
}


def _moe(table: Table) -> Table:
    """Experts in one tensor, or one by one as older files have them."""
    return {
        **table,
        **{f"w_{p}": (Entry(f"blk.{{i}}.ffn_{p}_exps.weight", _swap), Entry(f"blk.{{i}}.ffn_{p}.{{x}}.weight"))
           for p in ("gate", "up", "down")},
        **{f"w_{p}_bias": Entry(f"blk.{{i}}.ffn_{p}_exps.bias", same) for p in ("gate", "up", "down")},
    }  # fmt: skip


class Architecture(NamedTuple):
    family: str  # the model_type whose reader in `families` takes over
    table: Table
    fixed: Callable[[dict[str, Any], Shapes], dict[str, Any]] = lambda config, shapes: {}  # what the file does not say


def _gemma_scale(layers_27b: int):
    """Gemma 2 and 3 scale queries by the head size, but the 27 B models by the width per head."""

    def fixed(c: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
        large = c.get("num_hidden_layers") == layers_27b
        scalar = c["hidden_size"] / c["num_attention_heads"] if large else c.get("head_dim", 256)
        return {"query_pre_attn_scalar": float(scalar)}

    return fixed


def _gpt2(c: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    names = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
             "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
             "layer_norm_eps": "layer_norm_epsilon"}  # fmt: skip
    return {new: c.pop(old) for old, new in names.items() if old in c} | {"activation_function": "gelu_new"}


def _starcoder2(c: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    return {"norm_epsilon": c.pop("layer_norm_eps", 1e-5), "hidden_act": "gelu_pytorch_tanh"}


def _gpt_oss(c: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    c["intermediate_size"] = c.pop("moe_intermediate_size", c.get("intermediate_size"))
    scaling = c.get("rope_scaling") or {}
    return {"rope_scaling": {**scaling, "truncate": False}} if scaling.get("rope_type") == "yarn" else {}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", LLAMA),
    "qwen2": Architecture("qwen2", PLAIN),
    "qwen3": Architecture("qwen3", PLAIN),
    "qwen3moe": Architecture("qwen3_moe", _moe(PLAIN), lambda c, s: {"norm_topk_prob": True}),
    "smollm3": Architecture("smollm3", LLAMA),
    "gemma": Architecture("gemma", PLAIN),
    "gemma2": Architecture("gemma2", PLAIN, _gemma_scale(46)),
    "gemma3": Architecture("gemma3_text", PLAIN, _gemma_scale(62)),
    "phi3": Architecture("phi3", PHI3),
    "olmo2": Architecture("olmo2", PLAIN),
    "gpt2": Architecture("gpt2", FUSED, _gpt2),
    "gptneox": Architecture("gpt_neox", FUSED),
    "granite": Architecture("granite", LLAMA),
    "gpt-oss": Architecture(
        "gpt_oss", {**_moe(PLAIN), "mlp_norm": Entry("blk.{i}.post_attention_norm.weight")}, _gpt_oss
    ),
    "starcoder2": Architecture("starcoder2", PLAIN, _starcoder2),
}


def config_from_gguf(
    where: str, meta: Mapping[str, Any], shapes: Shapes, read: Callable[[str], np.ndarray]
) -> tuple[ModelConfig, Table, tuple[str, ...]]:
    """The ModelConfig of a GGUF, the table of its tensors, and those that have been used up (a pattern each).

    Raises CheckpointError for an unknown architecture or key.
    """
    name = meta.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{where}: architecture {name!r} is not supported; known: {known}")
    architecture = ARCHITECTURES[name]
    given = {key.removeprefix(f"{name}."): value for key, value in meta.items() if key.startswith(f"{name}.")}
    config: dict[str, Any] = {new: given.pop(old) for old, new in KEYS.items() if old in given}
    for key in ("context_length", "embedding_length", "block_count", "attention.head_count"):
        if KEYS[key] not in config:
            raise CheckpointError(f"{where}: the configuration key {name}.{key} is missing")
    if not {"rms_norm_eps", "layer_norm_eps"} & set(config):
        raise CheckpointError(f"{where}: the configuration key {name}.attention.layer_norm_rms_epsilon is missing")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if not all(isinstance(n, int) and n > 0 for n in (heads, width)):
        raise CheckpointError(f"{where}: {heads} heads of a model of width {width} cannot be")
    head_dim = config.setdefault("head_dim", width // heads)
    if not isinstance(head_dim, int):
        raise CheckpointError(f"{where}: {name}.attention.key_length is {head_dim!r}, not one head size")

    if given.pop("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{where}: {name}.attention.value_length is not the head size {head_dim}")
    rotated = given.pop("rope.dimension_count", head_dim)
    scaling = {new: given.pop(f"rope.scaling.{old}") for old, new in SCALING.items() if f"rope.scaling.{old}" in given}
    given.pop("rope.scaling.finetuned", None)
    if scaling.get("rope_type") == "none":
        scaling = {}
    used = []
    if "rope_factors_short.weight" in shapes and "rope_factors_long.weight" in shapes:
        factors = {f"{k}_factor": read(f"rope_factors_{k}.weight").astype(float).tolist() for k in ("short", "long")}
        scaling = {**scaling, **factors}
        used += [r"rope_factors_(short|long)\.weight"]
    if name in ("gpt2", "starcoder2"):
        given.pop("rope.scaling", None)
    if name != "gpt2":
        if not isinstance(rotated, int) or not 0 < rotated <= head_dim:
            raise CheckpointError(f"{where}: {name}.rope.dimension_count is {rotated!r}, the head size {head_dim}")
        config["partial_rotary_factor"] = rotated / head_dim
        config |= {"rope_scaling": scaling} if scaling else {}
    else:
        config.pop("head_dim")
    if given:
        unknown = ", ".join(f"{name}.{key}" for key in sorted(given))
        raise CheckpointError(f"{where}: unknown configuration keys {unknown}")

    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{where}: the tensor token_embd.weight is missing")
    rows_ = shapes["token_embd.weight"][0]
    if config.setdefault("vocab_size", rows_) != rows_:
        raise CheckpointError(f"{where}: vocab_size is {config['vocab_size']}, the embedding has {rows_} rows")
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config |= architecture.fixed(config, shapes)
    family, table = architecture.family, architecture.table
    if family == "llama" and "num_local_experts" in config:
        family, table = "mixtral", _moe(table)
    biased = {p for p in "qko" if f"blk.0.attn_{'output' if p == 'o' else p}.bias" in shapes}
    if biased and family in ("llama", "granite", "qwen3", "olmo2", "gemma", "mixtral"):
        config["attention_bias"] = True
    shown = {new: f"{name}.{old}" for old, new in KEYS.items()}
    built = families.config_from_hf(where, {"model_type": family, **config}, shown)

    if "rope_freqs.weight" in shapes:  # Llama 3's scaling, worked out
        factors = tuple(read("rope_freqs.weight").astype(float).tolist())
        try:
            kinds = tuple(
                dataclasses.replace(kind, rope=kind.rope and dataclasses.replace(kind.rope, factors=factors))
                for kind in built.attention
            )
        except ValueError as error:
            raise CheckpointError(f"{where}: rope_freqs.weight: {error}") from error
        built = dataclasses.replace(built, attention=kinds)
        used += [r"rope_freqs\.weight"]
    return built, table, tuple(used)
