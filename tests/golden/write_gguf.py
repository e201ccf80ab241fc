"""Writes a Hugging Face checkpoint as a GGUF file, by the rules of llama.cpp's converter, on its own gguf package.

The rules are that converter's (its `conversion` folder, one file a family): which keys it writes, what it does to which
tensors; their names come from the package. Nothing is shared with jaxemo, whose tables these files are there to test.
Where the converter writes a constant that is true of all published models of a family (Phi-2's 4·D hidden units) or what
newer libraries add to a configuration, the value that is true of this model stands here.
"""

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

ARCHITECTURES = {
    "llama": "LLAMA", "mistral": "LLAMA", "mixtral": "LLAMA", "smollm3": "SMOLLM3", "granite": "GRANITE", "qwen2": "QWEN2",
    "qwen3": "QWEN3", "qwen3_moe": "QWEN3MOE", "gemma": "GEMMA", "gemma2": "GEMMA2", "gemma3_text": "GEMMA3",
    "gemma3": "GEMMA3", "phi": "PHI2", "phi3": "PHI3", "olmo2": "OLMO2", "olmo3": "OLMO2", "olmoe": "OLMOE", "gpt2": "GPT2",
    "gpt_neox": "GPTNEOX", "gpt_oss": "GPT_OSS", "starcoder2": "STARCODER2", "cohere2": "COHERE2", "glm4": "GLM4",
    "seed_oss": "SEED_OSS",
}  # fmt: skip
PERMUTED = ("llama", "mistral", "mixtral", "smollm3", "granite")  # those that the converter derives from its Llama
OWN_KEYS = ("gemma", "gemma2", "phi", "phi3", "gpt2", "gpt_neox")  # those for which it writes no others than its own


def write(
    path: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    architecture: str = "",
    kinds: Mapping[str, Type] | None = None,
    extra: Mapping[str, Any] | None = None,
    raw: Mapping[str, tuple[Type, np.ndarray]] | None = None,
    one_by_one: bool = False,
    fused: bool = False,
) -> None:
    """The file `path` with the model of this config.json and these tensors, as Hugging Face has them.

    `architecture`, a name in gguf.MODEL_ARCH, is for those that have two. `kinds` says by GGUF name without layer and
    suffix ("attn_q") what a matrix is stored as, `raw` gives tensors' bytes by their full GGUF name; everything else is float32. `extra` are
    further keys ("{arch}" is the architecture's name). The tokenizer is a made-up one, and needs
    95 tokens. Experts can be written `one_by_one`, and queries, keys and values `fused`, as some files have them.
    """
    arch = getattr(gguf.MODEL_ARCH, architecture or ARCHITECTURES[config["model_type"]])
    h = {**config, **config.get("text_config", {}), "model_type": config["model_type"]}
    if h["model_type"] == "gpt2":
        h |= {"num_hidden_layers": h["n_layer"], "hidden_size": h["n_embd"], "num_attention_heads": h["n_head"]}
    out = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    out.add_type("model")
    out.add_name(path.stem)
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _keys(out, h)
    for key, value in (extra or {}).items():
        out.add_key_value(key.format(arch=out.arch), value, gguf.GGUFValueType.get_type(value))
    _tokenizer(out, h["vocab_size"])

    names = gguf.get_tensor_name_map(arch, h["num_hidden_layers"])
    converted = _mxfp4(h, dict(tensors)) if any(name.endswith("_blocks") for name in tensors) else _tensors(h, tensors)
    named: dict[str, Any] = {}
    for name, w in converted:
        new = name if name.startswith("rope_f") else names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ValueError(f"the converter has no name for {name}")
        named[new] = w
    if one_by_one:
        for new in [new for new in named if new.endswith("_exps.weight")]:
            parts = enumerate(named.pop(new))
            named |= {f"{new.removesuffix('_exps.weight')}.{i}.weight": part for i, part in parts}
    if fused:
        for new in [new for new in named if ".attn_q." in new]:
            parts = [named.pop(new.replace("attn_q", f"attn_{p}")) for p in "qkv"]
            named[new.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    for new, w in named.items():
        if raw and new in raw:
            kind, data = raw[new]
            assert gguf.quant_shape_from_byte_shape(data.shape, kind) == w.shape, new
        elif isinstance(w, tuple):
            kind, data = w
        else:
            stem = re.sub(r"^blk\.\d+\.|\.weight$", "", new)
            exact = w.ndim == 1 or "norm" in stem or stem in ("ffn_gate_inp", "position_embd") or new.endswith(".bias")
            kind = Type.F32 if exact else (kinds or {}).get(stem, Type.F32)
            data = gguf.quantize(np.ascontiguousarray(w, np.float32), kind)
        out.add_tensor(new, data, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _tokenizer(out: gguf.GGUFWriter, size: int) -> None:
    tokens = ["<|endoftext|>", *(chr(33 + i) for i in range(93)), "ab", *(f"[PAD{i}]" for i in range(95, size))]
    kinds = [gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * 94, *[gguf.TokenType.UNUSED] * (size - 95)]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types(kinds)
    out.add_token_merges(["a b"])
    out.add_eos_token_id(0)


# ---- keys ------------------------------------------------------------------------------------------------------------


def rope_parameters(h: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding as transformers 5 describes it, with a table for each kind of layer where they differ."""
    rope = dict(h.get("rope_parameters") or h.get("rope_scaling") or {})
    if "full_attention" in rope:
        return rope
    if "type" in rope:
        rope["rope_type"] = rope.pop("type")
    theta = h.get("rope_theta", h.get("rotary_emb_base"))
    rope |= {"rope_theta": theta} if theta and "rope_theta" not in rope else {}
    if h.get("rope_local_base_freq"):
        rope["sliding_attention"] = {"rope_theta": h["rope_local_base_freq"]}
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if h.get(key):
            rope.setdefault(key, h[key])
    return rope


def _keys(out: gguf.GGUFWriter, h: Mapping[str, Any]) -> None:
    kind, D, N, L = (h[key] for key in ("model_type", "hidden_size", "num_attention_heads", "num_hidden_layers"))
    H = h.get("head_dim") or D // N
    rope = rope_parameters(h)
    full = rope.get("full_attention", rope)
    share = full.get("partial_rotary_factor", h.get("rotary_pct"))
    out.add_block_count(L)
    out.add_context_length(h.get("max_position_embeddings") or h.get("n_positions") or 131072)
    out.add_embedding_length(D)
    out.add_feed_forward_length(h.get("intermediate_size") or h.get("n_inner") or 4 * D)
    out.add_head_count(N)
    if kind not in ("gpt2", "gpt_neox"):
        out.add_head_count_kv(h.get("num_key_value_heads", N))
    if "rms_norm_eps" in h or kind == "gemma3":
        out.add_layer_norm_rms_eps(h.get("rms_norm_eps", 1e-6))
    for key in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if key in h:
            out.add_layer_norm_eps(h[key])
            break

    if kind not in OWN_KEYS:
        _rope_keys(out, rope, full)
        if experts := h.get("num_local_experts", h.get("num_experts")):
            out.add_expert_count(experts)
            out.add_expert_used_count(h["num_experts_per_tok"])
        if h.get("head_dim") and kind != "granite":
            out.add_key_length(H)
            out.add_value_length(H)
    if kind in PERMUTED:
        out.add_vocab_size(h["vocab_size"])
        out.add_rope_dimension_count(H)
    if kind in ("gemma", "gemma2"):
        out.add_key_length(H)
        out.add_value_length(H)
    if kind == "gemma2":
        if h["attn_logit_softcapping"]:
            out.add_attn_logit_softcapping(h["attn_logit_softcapping"])
        if h["final_logit_softcapping"]:
            out.add_final_logit_softcapping(h["final_logit_softcapping"])
        out.add_sliding_window(h["sliding_window"])
    if kind in ("gemma3", "gemma3_text"):
        if h.get("final_logit_softcapping"):
            out.add_final_logit_softcapping(h["final_logit_softcapping"])
        if h.get("sliding_window_pattern") != 1:
            out.add_sliding_window(h["sliding_window"])
    if kind == "granite":
        out.add_attention_scale(h["attention_multiplier"])
        out.add_embedding_scale(h["embedding_multiplier"])
        out.add_residual_scale(h["residual_multiplier"])
        out.add_logit_scale(h["logits_scaling"])
    if kind == "phi":
        out.add_rope_dimension_count(int((share or 0.5) * D) // N)
    if kind == "phi3":
        original = h["original_max_position_embeddings"]
        out.add_rope_scaling_orig_ctx_len(original)
        out.add_rope_dimension_count(int((share or 1) * D) // N)
        out.add_rope_freq_base(full["rope_theta"])
        out.add_sliding_window(h.get("sliding_window") or 0)
        if "long_factor" in full:
            scale = h["max_position_embeddings"] / original
            out.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(scale) / np.log(original))))
    if kind == "gpt_neox":
        out.add_rope_dimension_count(int((share or 0.25) * H))
        out.add_parallel_residual(h["use_parallel_residual"])
    if kind == "olmo3":
        out.add_sliding_window(h["sliding_window"])
        out.add_sliding_window_pattern([t == "sliding_attention" for t in h["layer_types"]])
    if kind == "qwen3_moe":
        out.add_expert_feed_forward_length(h["moe_intermediate_size"])
    if kind == "gpt_oss":
        out.add_sliding_window(h["sliding_window"])
        out.add_expert_feed_forward_length(h["intermediate_size"])
    if kind == "cohere2":
        out.add_logit_scale(h["logit_scale"])
        out.add_sliding_window(h["sliding_window"])
        out.add_vocab_size(h["vocab_size"])
        out.add_rope_dimension_count(H)
        out.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if kind == "glm4":
        out.add_rope_dimension_count(int(H * (share or 0.5)))


def _rope_keys(out: gguf.GGUFWriter, rope: Mapping[str, Any], full: Mapping[str, Any]) -> None:
    if full.get("rope_type") == "linear":
        out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(full["factor"])
    if full.get("rope_type") == "yarn":
        out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        out.add_rope_scaling_factor(full["factor"])
        out.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        for key, add in (("attention_factor", out.add_rope_scaling_yarn_attn_factor),
                         ("beta_fast", out.add_rope_scaling_yarn_beta_fast),
                         ("beta_slow", out.add_rope_scaling_yarn_beta_slow)):  # fmt: skip
            if key in full:
                add(full[key])
    if "rope_theta" in full:
        out.add_rope_freq_base(full["rope_theta"])
    if "sliding_attention" in rope:
        out.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])


# ---- tensors ---------------------------------------------------------------------------------------------------------


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys, whose rotary pairs are half a head apart, so that pairs are neighbours."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _tensors(h: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    kind, N = h["model_type"], h["num_attention_heads"]
    K = h.get("num_key_value_heads", N)
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, w in tensors.items():
        if name.endswith((".masked_bias", ".inv_freq", ".attn.bias", ".attention.bias")):
            continue
        if name.startswith(
            ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
        ):
            continue
        if kind in ("gemma", "gemma2") and name == "lm_head.weight":
            continue
        name = name.replace("language_model.", "")
        if kind in PERMUTED and ".q_proj." in name:
            w = permute(w, N)
        if kind in PERMUTED and ".k_proj." in name:
            w = permute(w, K)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            w = w + np.float32(1)
        if kind == "gpt2":
            name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
                w = w.T
        if kind == "gpt_neox" and ".query_key_value." in name:
            w = w.reshape(N, 3, -1, *w.shape[1:]).swapaxes(0, 1).reshape(w.shape)
        if kind == "cohere2" and name.endswith(".bias"):
            raise ValueError(f"the converter refuses {name}, which is not zero")
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)\.weight", name):
            where, i, matrix = found.groups()
            matrix = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(matrix, matrix)
            where = where.replace("block_sparse_moe", "mlp")
            experts.setdefault(f"{where}.{matrix}.weight", {})[int(i)] = w
            continue
        if kind == "gpt_oss" and "gate_up_proj" in name:
            end = ".bias" if name.endswith("_bias") else ".weight"
            w = w if end == ".bias" else np.swapaxes(w, -1, -2)
            for j, half in enumerate(("gate_proj", "up_proj")):
                yield name.removesuffix("_bias").replace("gate_up_proj", half + end), w[:, j::2]
            continue
        if kind == "gpt_oss" and "down_proj" in name:
            bias = name.endswith("_bias")
            name = name.replace("_bias", ".bias") if bias else f"{name}.weight"
            w = w if bias else np.swapaxes(w, -1, -2)
        yield name + ".weight" if name.endswith("sinks") else name, w
    for name, parts in experts.items():
        yield name, np.stack([parts[i] for i in sorted(parts)])
    yield from _rope_factors(h)


def _mxfp4(h: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, Any]]:
    """Blocks of 32 numbers of 4 bits: two neighbours a byte in Hugging Face's files, in ggml's those 16 apart."""
    for name in [name for name in tensors if name.endswith("_blocks")]:
        blocks, scales = tensors.pop(name), tensors.pop(name.replace("_blocks", "_scales"))
        numbers = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
        packed = numbers[..., :16] | numbers[..., 16:] << 4
        data = np.concatenate([scales[..., None], packed], axis=-1).reshape(*blocks.shape[:2], -1)
        name = name.removesuffix("_blocks")
        if "gate_up_proj" in name:
            yield name.replace("gate_up_proj", "gate_proj.weight"), (Type.MXFP4, data[:, ::2])
            yield name.replace("gate_up_proj", "up_proj.weight"), (Type.MXFP4, data[:, 1::2])
        else:
            yield f"{name}.weight", (Type.MXFP4, data)
    yield from _tensors(h, tensors)


def _rope_factors(h: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    rope = rope_parameters(h)
    if h["model_type"] == "phi3" and "long_factor" in rope:
        for name in ("long", "short"):
            yield f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32)
    if h["model_type"] in PERMUTED and rope.get("rope_type") == "llama3":
        H = h.get("head_dim") or h["hidden_size"] // h["num_attention_heads"]
        factor, low, high = (rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
        factors = []
        for frequency in rope["rope_theta"] ** (-np.arange(0, H, 2) / H):
            turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
            smooth = (turns - low) / (high - low)
            factors.append(1 if turns > high else factor if turns < low else 1 / ((1 - smooth) / factor + smooth))
        yield "rope_freqs.weight", np.array(factors, np.float32)
