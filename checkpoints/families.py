"""The model families that Hugging Face checkpoints come in: for each a reader of its `config.json` and a table of tensors."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxemo.checkpoints import hf_configs as configs
from jaxemo.checkpoints import hf_tensors as tensors
from jaxemo.checkpoints.entries import Table
from jaxemo.checkpoints.keys import CheckpointError, Keys

from jaxemo.config import ModelConfig


class Family(NamedTuple):
    config: Callable[[Keys], dict[str, Any]]  # the fields of ModelConfig, from the configuration
    table: Table
    prefixes: tuple[tuple[str, str], ...] = ()  # how tensor names begin in some checkpoints, and in the table
    ignored: tuple[str, ...] = ()  # patterns of tensors that are not weights of the language model


_BUFFERS = (r".*rotary_emb\.inv_freq", r".*\.(attn|attention)\.(bias|masked_bias)")  # of old checkpoints; not weights
_SIGHT = (r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*")

FAMILIES: dict[str, Family] = {
    "llama": Family(configs.llama, tensors.LLAMA, ignored=_BUFFERS),
    "mistral": Family(configs.mistral, tensors.LLAMA),
    "mixtral": Family(configs.mixtral, tensors.moe("block_sparse_moe.", "w1", "w3", "w2")),
    "smollm3": Family(configs.smollm3, tensors.LLAMA),
    "qwen2": Family(configs.qwen2, tensors.LLAMA),
    "qwen3": Family(configs.qwen3, tensors.LLAMA),
    "qwen3_moe": Family(configs.qwen3_moe, tensors.moe("mlp.", "gate_proj", "up_proj", "down_proj")),
    "gemma": Family(configs.gemma, tensors.GEMMA),
    "gemma2": Family(configs.gemma2, tensors.GEMMA2),
    "gemma3_text": Family(configs.gemma3, tensors.GEMMA2),
    "gemma3": Family(
        configs.gemma3, tensors.GEMMA2, (("language_model.", ""), ("model.language_model.", "model.")), _SIGHT
    ),
    "phi": Family(configs.phi, tensors.PHI),
    "phi3": Family(configs.phi3, tensors.PHI3),
    "olmo2": Family(configs.olmo2, tensors.OLMO2),
    "olmo3": Family(configs.olmo3, tensors.OLMO2),
    "olmoe": Family(configs.olmoe, tensors.moe("mlp.", "gate_proj", "up_proj", "down_proj")),
    "gpt2": Family(configs.gpt2, tensors.GPT2, (("transformer.", ""),), _BUFFERS),
    "gpt_neox": Family(configs.gpt_neox, tensors.GPT_NEOX, (("gpt_neox.", ""),), _BUFFERS),
    "gpt_oss": Family(configs.gpt_oss, tensors.GPT_OSS),
    "granite": Family(configs.granite, tensors.LLAMA),
    "glm4": Family(configs.glm4, tensors.GLM4),
    "cohere2": Family(configs.cohere2, {**tensors.LLAMA, **tensors.PARALLEL, **tensors.NEIGHBOURS}),
    "seed_oss": Family(configs.seed_oss, tensors.LLAMA),
    "starcoder2": Family(configs.starcoder2, tensors.STARCODER2),
}

# Families that one attention transformer does not cover, with what they would need.
REFUSED = {
    "gemma3n": "alternating updates and an embedding per layer",
    "gemma4": "global layers with heads of another size, and keys that are also the values",
    "gemma4_text": "global layers with heads of another size, and keys that are also the values",
    "llama4": "chunked attention, and dense layers between expert layers",
    "llama4_text": "chunked attention, and dense layers between expert layers",
    "qwen3_5": "linear attention (Gated DeltaNet) in most layers",
    "qwen3_5_text": "linear attention (Gated DeltaNet) in most layers",
    "qwen3_5_moe": "linear attention (Gated DeltaNet) in most layers",
    "qwen3_next": "linear attention (Gated DeltaNet) in most layers",
    "deepseek_v2": "low-rank keys and values (MLA)",
    "deepseek_v3": "low-rank keys and values (MLA)",
    "glm4_moe": "dense layers before expert layers, and grouped sigmoid routing",
    "qwen2_moe": "an expert that every token shares, behind a gate of its own",
    "ministral3": "queries that grow with their position",
    "mistral3": "queries that grow with their position, or a model that also sees",
    "falcon": "its own fused layout and ALiBi",
    "bloom": "ALiBi",
    "mpt": "ALiBi",
    "gpt_bigcode": "its own fused layout",
    "mamba": "state-space layers",
    "jamba": "state-space layers",
}


def config_from_hf(where: str, raw: Mapping[str, Any], names: Mapping[str, str] | None = None) -> ModelConfig:
    """The ModelConfig that a `config.json` describes. Raises CheckpointError, naming `where` and the key at fault.

    `names` translates keys in messages, for a file that has other names for them.
    """
    keys = Keys(where, raw, names=names)
    name = keys("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        why = f": it needs {REFUSED[name]}" if isinstance(name, str) and name in REFUSED else ""
        raise CheckpointError(f"{where}: model_type {name!r} is not supported{why}; known: {', '.join(FAMILIES)}")
    quantised = keys("quantization_config", None)
    if name == "gpt_oss" and isinstance(quantised, dict) and quantised.get("quant_method") == "mxfp4":
        keys.set("quantization_config", None)
    configs.insist(keys)
    fields = FAMILIES[name].config(keys)
    keys.finish(configs.INERT)
    return build(where, name.removesuffix("_text"), fields)


def build(where: str, family: str, fields: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig with these fields. Raises CheckpointError where there is none, or none that could be."""
    for name, most in (("n_layers", configs.MOST_LAYERS), ("n_experts", configs.MOST_EXPERTS)):
        if not 0 <= fields.get(name, 0) <= most:
            raise CheckpointError(f"{where}: {name} {fields[name]} is more than any model has")
    try:
        config = ModelConfig(family=family, **fields)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    return config
