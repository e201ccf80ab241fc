"""Model families as GGUF files have them: their metadata in the words of `config.json`, and one table of names.

llama.cpp's converter has done some of the work already: fused gates are split, Gemma's norms have their 1 added, and
the rotary pairs of some families are neighbours. It also leaves things out, which llama.cpp itself then assumes; what is
assumed here in their place is what the published models have, and stands in ARCHITECTURES. Of two things it leaves out
nothing is known: sliding windows of Mistral, Mixtral, Qwen and StarCoder 2, which therefore do not slide here (nor in
llama.cpp), and a theta that grows with the row's length.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxemo.checkpoints import families
from jaxemo.checkpoints.entries import (
    Entry,
    Table,
    Transform,
    gate_rows,
    halves,
    k_rows,
    linear,
    named,
    q_rows,
    rows,
    same,
    swap,
    up_rows,
    v_rows,
)
from jaxemo.checkpoints.hf_configs import FULL, MOST_LAYERS, SLIDING
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
    "attn_factor": "attention_factor", "yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}  # fmt: skip
SCALINGS = ("none", "linear", "yarn", "longrope")

# ---- tables ----------------------------------------------------------------------------------------------------------


def _qkv(turn: Transform = linear, fused: bool = False) -> Table:
    """Queries, keys and values: a tensor each, or all in one. `fused` is the form that the architecture usually has;
    `turn` is done to queries and keys."""
    table: dict[str, tuple[Entry, ...]] = {}
    for p, part in (("q", q_rows), ("k", k_rows), ("v", v_rows)):
        finish = linear if p == "v" else turn
        for bias, end in (("", "weight"), ("_bias", "bias")):
            own = Entry(f"blk.{{i}}.attn_{p}.{end}", finish)
            shared = Entry(f"blk.{{i}}.attn_qkv.{end}", rows(part, finish))
            table[f"w{p}{bias}"] = (shared, own) if fused else (own, shared)
    return table


_NAMES = {
    "attn_norm": "attn_norm", "attn_post_norm": "post_attention_norm", "mlp_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm", "wo": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "router": "ffn_gate_inp", "w_gate": "ffn_gate", "w_up": "ffn_up", "w_down": "ffn_down",
}  # fmt: skip
PLAIN: dict[str, Entry | tuple[Entry, ...]] = {
    **named({"embed": "token_embd", "pos_embed": "position_embd", "unembed": "output"}, transform=same),
    **named({"final_norm": "output_norm"}),
    **named(_NAMES, "blk.{i}."),
    "sinks": Entry("blk.{i}.attn_sinks.weight"),
    **_qkv(),
}
NEIGHBOURS = {**PLAIN, **_qkv(halves)}
FUSED = {**PLAIN, **_qkv(fused=True)}
_PARALLEL = named({"mlp_norm": "attn_norm"}, "blk.{i}.", shared=True)  # attention and MLP share one norm
_GATE_UP = {
    "w_gate": Entry("blk.{i}.ffn_up.weight", rows(gate_rows)),
    "w_up": Entry("blk.{i}.ffn_up.weight", rows(up_rows)),
}
_POST = {"mlp_norm": Entry("blk.{i}.post_attention_norm.weight")}  # after attention, that is, and before the MLP


def _moe(table: Table) -> Table:
    """Experts in one tensor, or one by one as older files have them."""
    return {
        **table,
        **{f"w_{p}": (Entry(f"blk.{{i}}.ffn_{p}_exps.weight", swap), Entry(f"blk.{{i}}.ffn_{p}.{{x}}.weight"))
           for p in ("gate", "up", "down")},
        **{f"w_{p}_bias": Entry(f"blk.{{i}}.ffn_{p}_exps.bias", same) for p in ("gate", "up", "down")},
    }  # fmt: skip


# ---- what the files do not say ---------------------------------------------------------------------------------------


class Architecture(NamedTuple):
    family: str  # the model_type whose reader in `families` takes over
    table: Table
    fixed: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}  # keys that the file leaves to the reader
    renamed: Mapping[str, str] = {}  # values of KEYS that this family has other names for


def _gemma_scale(c: dict[str, Any], layers_27b: int) -> dict[str, Any]:
    """Gemma 2 and 3 scale queries by the head size, but the models of 27 B by the width per head."""
    large = c["num_hidden_layers"] == layers_27b
    return {"query_pre_attn_scalar": c["hidden_size"] / c["num_attention_heads"] if large else c["head_dim"]}


def _gemma2(c: dict[str, Any]) -> dict[str, Any]:
    # The first files lack these.
    defaults = {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return {name: c.get(name, value) for name, value in defaults.items()} | _gemma_scale(c, 46)


def _gpt_oss(c: dict[str, Any]) -> dict[str, Any]:
    scaling, width = c["rope_scaling"], c.get("moe_intermediate_size", c.get("intermediate_size"))
    exact = {"truncate": False} if scaling.get("rope_type") == "yarn" else {}
    return {"rope_scaling": {**scaling, **exact}, "intermediate_size": width, "moe_intermediate_size": None}


_GPT2 = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
         "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
         "layer_norm_eps": "layer_norm_epsilon"}  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", NEIGHBOURS),  # Mistral too; and Mixtral, if there are experts
    "mistral3": Architecture("llama", NEIGHBOURS),  # the part of Mistral Small 3.1 and 3.2 that reads
    "smollm3": Architecture("smollm3", NEIGHBOURS),  # every fourth layer without rotation
    "granite": Architecture(
        "granite", NEIGHBOURS, lambda c: {"attention_multiplier": c.get("attention_multiplier", c["head_dim"] ** -0.5)}
    ),
    "qwen2": Architecture("qwen2", PLAIN),
    "qwen3": Architecture("qwen3", PLAIN),
    "qwen3moe": Architecture("qwen3_moe", _moe(PLAIN), lambda c: {"norm_topk_prob": True}),
    "gemma": Architecture("gemma", PLAIN),
    "gemma2": Architecture("gemma2", PLAIN, _gemma2),
    "gemma3": Architecture("gemma3_text", PLAIN, lambda c: _gemma_scale(c, 62)),
    "phi2": Architecture("phi", {**PLAIN, **_PARALLEL}, lambda c: {"hidden_act": "gelu_new"}),
    "phi3": Architecture("phi3", {**FUSED, **_GATE_UP}),
    "olmo2": Architecture("olmo2", PLAIN),  # OLMo 3, if there is a window
    "olmoe": Architecture(
        "olmoe", _moe(PLAIN), lambda c: {"norm_topk_prob": False}, renamed={"num_local_experts": "num_experts"}
    ),
    "gpt2": Architecture("gpt2", FUSED, lambda c: {"activation_function": "gelu_new"}, _GPT2),
    "gptneox": Architecture("gpt_neox", FUSED, lambda c: {"hidden_act": "gelu"}),
    "gpt-oss": Architecture("gpt_oss", {**_moe(PLAIN), **_POST}, _gpt_oss),
    "starcoder2": Architecture(
        "starcoder2",
        PLAIN,
        lambda c: {"hidden_act": "gelu_pytorch_tanh", "use_bias": False},
        renamed={"layer_norm_eps": "norm_epsilon"},
    ),
    "cohere2": Architecture("cohere2", {**NEIGHBOURS, **_PARALLEL}, renamed={"logits_scaling": "logit_scale"}),
    "glm4": Architecture("glm4", {**NEIGHBOURS, **_GATE_UP}),
    "seed_oss": Architecture("seed_oss", {**PLAIN, **_POST}),
}

# ---- reading ---------------------------------------------------------------------------------------------------------


def config_from_gguf(
    where: str, meta: Mapping[str, Any], shapes: Shapes, read: Callable[[str], np.ndarray]
) -> tuple[ModelConfig, Table, tuple[str, ...]]:
    """The ModelConfig of a GGUF, the table of its tensors, and those that have been used up (a pattern each).

    Raises CheckpointError for an unknown architecture or key, and for one part of a split file.
    """
    name = meta.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{where}: architecture {name!r} is not supported; known: {known}")
    if (parts := meta.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(f"{where}: this is one part of a model in {parts} files (split.count); join them with llama.cpp's "
                              "`llama-gguf-split --merge`")  # fmt: skip
    architecture = ARCHITECTURES[name]
    family, table = architecture.family, architecture.table
    given = {key.removeprefix(f"{name}."): value for key, value in meta.items() if key.startswith(f"{name}.")}
    config: dict[str, Any] = {new: given.pop(old) for old, new in KEYS.items() if old in given}
    for key in ("context_length", "embedding_length", "block_count", "attention.head_count"):
        if KEYS[key] not in config:
            raise CheckpointError(f"{where}: the configuration key {name}.{key} is missing")
    if not {"rms_norm_eps", "layer_norm_eps"} & set(config):
        raise CheckpointError(f"{where}: the configuration key {name}.attention.layer_norm_rms_epsilon is missing")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if not all(isinstance(n, int) and 0 < n < 1 << 32 for n in (heads, width)):
        raise CheckpointError(f"{where}: {heads} heads of a model of width {width} cannot be")
    head_dim = config.setdefault("head_dim", width // heads)
    if not isinstance(head_dim, int) or not 0 < head_dim < 1 << 32:
        raise CheckpointError(f"{where}: {name}.attention.key_length is {head_dim!r}, not one head size")
    if given.pop("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{where}: {name}.attention.value_length is not the head size {head_dim}")
    for key in ("num_local_experts", "num_experts_per_tok", "sliding_window"):
        if config.get(key) == 0:  # another way to say that there are none
            del config[key]
    if "sliding_window" in config and "attention.sliding_window_pattern" in given:
        pattern = given.pop("attention.sliding_window_pattern")
        config["layer_types"] = _layer_types(where, name, pattern, config["num_hidden_layers"])
    if family == "llama" and "num_local_experts" in config:
        family, table = "mixtral", _moe(table)
    if family == "olmo2" and "sliding_window" in config:
        family = "olmo3"

    used: list[str] = []
    freqs = None
    if family == "gpt2":
        del config["head_dim"]
    else:
        freqs = _rope(where, name, family, config, given, shapes, read, used)
        config["attention_bias"] = False  # what has a bias is seen from the tensors, below
    if given:
        unknown = ", ".join(f"{name}.{key}" for key in sorted(given))
        raise CheckpointError(f"{where}: unknown configuration keys {unknown}")

    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{where}: the tensor token_embd.weight is missing")
    rows_ = shapes["token_embd.weight"][0]
    if config.setdefault("vocab_size", rows_) != rows_:
        raise CheckpointError(f"{where}: vocab_size is {config['vocab_size']}, the embedding has {rows_} rows")
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config |= architecture.fixed(config)
    renamed = {key: architecture.renamed.get(key, key) for key in config}
    shown = {renamed.get(new, new): f"{name}.{old}" for old, new in KEYS.items()}
    raw = {"model_type": family, **{renamed[key]: value for key, value in config.items()}}
    built = families.config_from_hf(where, raw, shown)

    biased = [weight for weight in ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down", "router")
              if weight not in built.biases and _is_there(table[f"{weight}_bias"], built.n_layers, shapes)]  # fmt: skip
    built = dataclasses.replace(built, biases=(*built.biases, *biased))
    if freqs is not None:
        try:
            kinds = tuple(
                dataclasses.replace(kind, rope=kind.rope and dataclasses.replace(kind.rope, factors=freqs))
                for kind in built.attention
            )
        except ValueError as error:
            raise CheckpointError(f"{where}: rope_freqs.weight: {error}") from error
        built = dataclasses.replace(built, attention=kinds)
    return built, table, tuple(used)


def _layer_types(where: str, name: str, pattern: Any, layers: Any) -> list[str]:
    """Which layers slide: by a truth value each, or all but every `pattern`-th."""
    if isinstance(layers, int) and 0 < layers <= MOST_LAYERS:
        if type(pattern) is int and pattern >= 0:
            pattern = [pattern == 0 or i % pattern < pattern - 1 for i in range(layers)]
        if isinstance(pattern, list) and len(pattern) == layers and all(slides in (0, 1) for slides in pattern):
            return [SLIDING if slides else FULL for slides in pattern]
    raise CheckpointError(f"{where}: {name}.attention.sliding_window_pattern is neither a whole number nor a truth value for "
                          "each layer")  # fmt: skip


def _rope(
    where: str,
    name: str,
    family: str,
    config: dict[str, Any],
    given: dict[str, Any],
    shapes: Shapes,
    read: Callable[[str], np.ndarray],
    used: list[str],
) -> tuple[float, ...] | None:
    """Move the keys of the rotary embedding from `given` to `config`, and add to `used` the tensors that belong to it.

    Returns the divisors of all frequencies, if the file has them worked out (so for Llama 3's scaling).
    """
    head_dim, theta = config["head_dim"], config.setdefault("rope_theta", 10000.0)
    rotated = given.pop("rope.dimension_count", head_dim)
    if not isinstance(rotated, int) or not 0 < rotated <= head_dim:
        raise CheckpointError(f"{where}: {name}.rope.dimension_count is {rotated!r}, the head size {head_dim}")
    # The family's reader multiplies again and rounds down.
    config["partial_rotary_factor"] = 1.0 if rotated == head_dim else (rotated + 1e-6) / head_dim
    scaling = {new: given.pop(f"rope.scaling.{old}") for old, new in SCALING.items() if f"rope.scaling.{old}" in given}
    if "rope.scale_linear" in given:  # the older name of a linear factor
        scaling.setdefault("factor", given.pop("rope.scale_linear"))
    if "factor" in scaling:
        scaling.setdefault("rope_type", "linear")
    kind = scaling.get("rope_type")
    if kind not in (None, *SCALINGS):
        raise CheckpointError(
            f"{where}: the rope scaling {name}.rope.scaling.type = {kind!r} is not supported; known: {', '.join(SCALINGS)}"
        )
    if kind == "none":
        scaling = {}
    if given.get("rope.scaling.yarn_ext_factor") in (1, -1):  # -1: what is usual
        del given["rope.scaling.yarn_ext_factor"]
    # llama.cpp takes this for a Granite model without rotation, and says nothing of it elsewhere.
    if "rope.scaling.finetuned" in given and (family != "granite" or given["rope.scaling.finetuned"]):
        del given["rope.scaling.finetuned"]

    def factors(tensor: str) -> list[float]:
        if tensor not in shapes:
            raise CheckpointError(f"{where}: the tensor {tensor} is missing")
        if shapes[tensor] != (rotated // 2,):
            raise CheckpointError(f"{where}: {tensor} has shape {list(shapes[tensor])}, expected [{rotated // 2}]")
        used.append(tensor.replace(".", r"\."))
        return read(tensor).astype(float).tolist()

    if "rope_factors_short.weight" in shapes or "rope_factors_long.weight" in shapes:
        scaling |= {f"{k}_factor": factors(f"rope_factors_{k}.weight") for k in ("short", "long")}
    local = given.get("rope.freq_base_swa", 10000.0 if family == "gemma3_text" else theta)
    if family in ("gemma3_text", "olmo3"):  # their sliding layers are not rescaled
        config["rope_parameters"] = {
            FULL: {**scaling, "rope_theta": theta},
            SLIDING: {"rope_theta": local},
        }
        del config["rope_theta"]
    else:
        config["rope_scaling"] = scaling
    if family in ("gemma3_text", "olmo3") or local == theta:
        given.pop("rope.freq_base_swa", None)
    return tuple(factors("rope_freqs.weight")) if "rope_freqs.weight" in shapes else None


def _is_there(options: Entry | tuple[Entry, ...], layers: int, shapes: Shapes) -> bool:
    """Whether any layer has the tensor."""
    entries = (options,) if isinstance(options, Entry) else options
    return any(entry.source.replace("{i}", str(i)) in shapes for entry in entries for i in range(layers))
