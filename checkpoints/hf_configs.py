"""How every family's `config.json` is read: a function from its keys to the fields of ModelConfig.

What a configuration leaves out has the family's default. A key that no reader asks for is refused, unless it stands in
INERT (see `keys`).
"""

from collections.abc import Callable
from typing import Any

from jaxemo.checkpoints import rope
from jaxemo.checkpoints.keys import CheckpointError, Keys

from jaxemo.config import Attention, Rope

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "relu2": "relu_squared",
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
# More is a damaged file, and would take the memory to describe.
MOST_LAYERS, MOST_EXPERTS, MOST_ROTATED = 4096, 4096, 1 << 16

# Keys of a configuration that leave the forward pass of a trained model as it is.
INERT = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "_num_labels", "architectures",
    "attention_dropout", "attention_probs_dropout_prob", "attn_implementation", "attn_pdrop", "auto_map",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop",
    "embedding_dropout", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "hidden_dropout",
    "hidden_dropout_prob", "id2label", "initializer_range", "is_llama_config", "label2id", "length_penalty",
    "max_length", "max_sequence_length", "_commit_hash", "min_length", "model_type", "n_special", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states", "output_past",
    "output_router_logits", "output_scores", "pad_token_id", "predict_special_tokens", "prefix", "pretraining_tp",
    "problem_type", "remove_invalid_values", "repetition_penalty", "resid_pdrop", "residual_dropout", "return_dict",
    "return_dict_in_generate", "router_aux_loss_coef", "router_jitter_noise", "sep_token_id", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache", "use_deepspeed_checkpointing", "use_flash_attn",
})  # fmt: skip
# Keys that may stand there only with one of these values.
ONLY: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,), "add_cross_attention": (False,), "is_decoder": (False, True),
    "use_bidirectional_attention": (False,), "rope_interleaved": (False,), "tie_encoder_decoder": (False,),
    "pruned_heads": ({},), "quantization_config": (), "cross_attention_hidden_size": (), "use_mrope": (False,),
}  # fmt: skip


def insist(keys: Keys) -> None:
    for key, allowed in ONLY.items():
        keys.insist(key, *allowed)


def _attention(
    k: Keys,
    head_dim: int,
    theta: float = 10000.0,
    types: Callable[[int], str] | None = None,
    partial: float = 1.0,
    local_theta: float | None = None,
    window: int | None = None,
    default_window: int = 0,
    no_rope: Callable[[int, str], bool] = lambda i, kind: False,
) -> dict[str, Any]:
    """`n_layers`, `max_positions`, `attention` and `pattern`: which layers slide, and how each kind is rotated.

    `types` gives a layer's kind where the configuration does not, and is None for families whose layers never slide;
    `theta` and `partial` are the family's defaults.
    With `local_theta`, sliding layers have it as theta and no scaling, in configurations that describe one rope only.
    """
    L, limit = k.whole("num_hidden_layers"), k.whole("max_position_embeddings")
    if not 0 < L <= MOST_LAYERS or limit < 1:
        raise CheckpointError(f"{k.where}: {L} layers of up to {limit} positions cannot be")
    found = [FULL] * L
    if types:
        if window is None:  # null is none; where nothing is said, the family's
            window = k.whole("sliding_window", 0 if k.has("sliding_window") else default_window)
        found = k("layer_types", None) or [types(i) for i in range(L)]
    if not isinstance(found, list) or len(found) != L or not all(kind in (FULL, SLIDING) for kind in found):
        raise k.fault("layer_types", f"expected {L} times {FULL} or {SLIDING}")
    if SLIDING in found and not window:
        found = [FULL] * L

    given = k("rope_parameters", None) or {}
    if not isinstance(given, dict):
        raise k.fault("rope_parameters", "expected a table")
    partial = k.positive("partial_rotary_factor", k.positive("rotary_pct", partial))
    theta = k.positive("rope_theta", k.positive("rotary_emb_base", theta))
    local = k.positive("rope_local_base_freq", local_theta)
    original = k.whole("original_max_position_embeddings", None)
    scaling = k("rope_scaling", None) or {}

    def rope_of(kind: str) -> Rope:
        base = theta
        if FULL in given or SLIDING in given:
            mine = given.get(kind) or {}
            base = local if kind == SLIDING and local else theta
        elif kind == SLIDING and local and not given:
            mine, base = {}, local
        else:
            mine = given or scaling
        if not isinstance(mine, dict):
            raise CheckpointError(f"{k.where}: the rope scaling is {mine!r}, not a table")
        if original is not None:
            mine = {**mine, "original_max_position_embeddings": original}
        if "short_factor" in mine:  # LongRoPE has had other names
            mine = {**mine, "rope_type": "longrope", "type": None}
        share = Keys(k.where, mine, "rope scaling").positive("partial_rotary_factor", partial)
        dim = int(head_dim * share)
        if not 2 <= dim <= min(head_dim, MOST_ROTATED) or dim % 2:
            raise CheckpointError(f"{k.where}: {share} of heads of {head_dim} dimensions cannot be rotated in pairs")
        return rope.read(k.where, mine, dim, base, limit)

    kinds: dict[Attention, int] = {}
    ropes = {kind: rope_of(kind) for kind in sorted(set(found))}
    limit = int(limit * max(rope.dynamic for rope in ropes.values()))  # `dynamic` names the length without it
    pattern = []
    for i, kind in enumerate(found):
        layer = Attention(None if no_rope(i, kind) else ropes[kind], window or 0 if kind == SLIDING else 0)
        pattern.append(kinds.setdefault(layer, len(kinds)))
    return {
        "n_layers": L,
        "max_positions": limit,
        "attention": tuple(kinds),
        "pattern": tuple(pattern) if len(kinds) > 1 else (),
    }


def _period(k: Keys, name: str, default: int) -> int:
    """Every how manyeth layer is another kind, by the key `name`."""
    period = k.whole(name, default)
    if period < 1:
        raise k.fault(name, "expected at least 1")
    return period


def llama(
    k: Keys,
    *,
    head_dim: int | None = None,
    n_kv_heads: int | None = None,
    tied: bool = False,
    eps: float = 1e-6,
    act: str = "hidden_act",
    default_act: str = "silu",
    bias: tuple[str, ...] = (),
    qkv_bias: bool = False,
    **attention: Any,
) -> dict[str, Any]:
    """What most families share. The keywords are their defaults where a configuration says nothing."""
    D, N = k.whole("hidden_size"), k.whole("num_attention_heads")
    H = k.whole("head_dim", head_dim)
    if H is None:
        if not N or D % N:
            raise CheckpointError(f"{k.where}: hidden_size {D} is not a multiple of num_attention_heads {N}")
        H = D // N
    biases = [*bias]
    if k.flag("attention_bias", False):
        biases += ["wq", "wk", "wv", "wo"]
    elif qkv_bias:
        biases += ["wq", "wk", "wv"]
    if k.flag("mlp_bias", False):
        biases += ["w_gate", "w_up", "w_down"]
    return {
        "vocab_size": k.whole("vocab_size"),
        "d_model": D,
        "n_heads": N,
        "n_kv_heads": k.whole("num_key_value_heads", N if k.has("num_key_value_heads") else n_kv_heads or N),
        "head_dim": H,
        "d_ff": k.whole("intermediate_size"),
        "tie_embeddings": k.flag("tie_word_embeddings", tied),
        "norm_eps": k.positive("rms_norm_eps", eps),
        "activation": k.one_of(act, ACTIVATIONS, default_act),
        "biases": tuple(biases),
        **_attention(k, H, **attention),
    }


def _all_slide(i: int) -> str:
    return SLIDING


def _qwen_window(k: Keys, all_layers: bool = False) -> dict[str, Any]:
    window = k.whole("sliding_window", 0) if k.flag("use_sliding_window", False) else 0
    full = k.whole("max_window_layers", 28)
    k.ignore("sliding_window")
    return {"window": window, "types": lambda i: SLIDING if all_layers or i >= full else FULL}


def mistral(k: Keys) -> dict[str, Any]:
    return llama(k, n_kv_heads=8, types=_all_slide, default_window=4096)


def smollm3(k: Keys) -> dict[str, Any]:
    interval = _period(k, "no_rope_layer_interval", 4)
    listed = k("no_rope_layers", None)
    if listed is not None and not (isinstance(listed, list) and all(v in (0, 1) for v in listed)):
        raise k.fault("no_rope_layers", "expected a list of 0 and 1")
    if listed is not None and len(listed) != k.whole("num_hidden_layers"):
        raise k.fault("no_rope_layers", "expected one number a layer")
    without = [not v for v in listed] if listed else [(i + 1) % interval == 0 for i in range(MOST_LAYERS)]
    window = k.whole("sliding_window", 0) if k.flag("use_sliding_window", False) else 0
    k.ignore("sliding_window", "max_window_layers")
    return llama(k, n_kv_heads=4, tied=True, theta=2e6, window=window, no_rope=lambda i, kind: without[i],
                  types=lambda i: SLIDING if without[i] else FULL)  # fmt: skip


def qwen2(k: Keys) -> dict[str, Any]:
    return llama(k, qkv_bias=True, n_kv_heads=32, **_qwen_window(k))


def qwen3(k: Keys) -> dict[str, Any]:
    return llama(k, head_dim=128, n_kv_heads=32, **_qwen_window(k)) | {"qk_norm": "head"}


def _experts(k: Keys, *names: str, experts: int, active: int) -> dict[str, Any]:
    X = k.whole(next((name for name in names if name in k), names[0]), experts)
    if not 0 < X <= MOST_EXPERTS:
        raise CheckpointError(f"{k.where}: {X} experts cannot be")
    return {"n_experts": X, "n_active": k.whole("num_experts_per_tok", active)}


def qwen3_moe(k: Keys) -> dict[str, Any]:
    k.insist("qkv_bias", False)
    k.insist("use_qk_norm", True)
    k.insist("shared_expert_intermediate_size", 0)
    if k("mlp_only_layers", []) or k.whole("decoder_sparse_step", 1) != 1:
        raise k.fault("mlp_only_layers" if k("mlp_only_layers", []) else "decoder_sparse_step",
                      "a model that mixes dense and expert layers is not supported")  # fmt: skip
    fields = llama(k, n_kv_heads=4, **_qwen_window(k, all_layers=True)) | _experts(
        k, "num_experts", "num_local_experts", experts=128, active=8
    )
    return fields | {
        "qk_norm": "head",
        "d_ff": k.whole("moe_intermediate_size"),
        "normalise_router": k.flag("norm_topk_prob", False),
    }


def mixtral(k: Keys) -> dict[str, Any]:
    fields = llama(k, n_kv_heads=8, eps=1e-5, theta=1e6, types=_all_slide)
    return fields | _experts(k, "num_local_experts", experts=8, active=2)


def olmoe(k: Keys) -> dict[str, Any]:
    k.insist("clip_qkv")
    fields = llama(k, eps=1e-5) | _experts(k, "num_experts", experts=64, active=8)
    return fields | {"qk_norm": "all", "normalise_router": k.flag("norm_topk_prob", False)}


def gpt_oss(k: Keys) -> dict[str, Any]:
    k.insist("swiglu_alpha", 1.702)
    k.ignore("experts_per_token", "initial_context_length")
    scaling = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
               "original_max_position_embeddings": 4096}  # fmt: skip
    if "rope_scaling" not in k and "rope_parameters" not in k:
        k.set("rope_scaling", scaling)
    if "attention_bias" not in k:
        k.set("attention_bias", True)
    fields = llama(k, head_dim=64, n_kv_heads=8, eps=1e-5, theta=150000.0, default_window=128,
                    types=lambda i: FULL if i % 2 else SLIDING)  # fmt: skip
    fields |= _experts(k, "num_local_experts", experts=128, active=4)
    biases = (*fields["biases"], "router", "w_gate", "w_up", "w_down")
    return fields | {
        "activation": "quick_gelu",
        "glu_limit": k.number("swiglu_limit", 7.0),
        "attn_sinks": True,
        "biases": biases,
    }


def gemma(k: Keys) -> dict[str, Any]:
    k.ignore("hidden_act", "hidden_activation")  # Gemma 1 always takes the tanh form, whatever stands there
    fields = llama(k, head_dim=256, n_kv_heads=16, tied=True, act="")
    return fields | {"activation": "gelu_tanh", "embed_scale": fields["d_model"] ** 0.5}


def gemma2(k: Keys, version: int = 2) -> dict[str, Any]:
    k.ignore("hidden_act", "cache_implementation", "sliding_window_size")
    common: dict[str, Any] = {"head_dim": 256, "n_kv_heads": 4, "tied": True, "act": "hidden_activation",
                              "default_act": "gelu_pytorch_tanh", "default_window": 4096}  # fmt: skip
    if version == 2:
        fields = llama(k, **common, types=lambda i: FULL if i % 2 else SLIDING)
        caps = (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
        cap, logit_cap = (k.number(name, 0.0 if k.has(name) else default) for name, default in caps)
    else:
        period = _period(k, "sliding_window_pattern", k.whole("_sliding_window_pattern", 6))
        fields = llama(k, **common, types=lambda i: SLIDING if (i + 1) % period else FULL, theta=1e6, local_theta=1e4)
        k.insist("attn_logit_softcapping")
        cap, logit_cap = 0.0, k.number("final_logit_softcapping", 0.0)
        fields["qk_norm"] = "head"
    return fields | {
        "norms": ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"),
        "attn_scale": k.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        "attn_softcap": cap,
        "logit_softcap": logit_cap,
        "embed_scale": fields["d_model"] ** 0.5,
    }


def gemma3(k: Keys) -> dict[str, Any]:
    """The text part of a model that also sees, or a model of text alone."""
    if "text_config" in k:
        inner = k("text_config")
        k.ignore("vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image")
        tied = k.flag("tie_word_embeddings", True)
        k = Keys(k.where, inner, "text_config")
        if "tie_word_embeddings" not in k:
            k.set("tie_word_embeddings", tied)
        for name, value in (("vocab_size", 262208), ("num_attention_heads", 8), ("max_position_embeddings", 131072)):
            if name not in k:
                k.set(name, value)
        insist(k)
        fields = gemma2(k, 3)
        k.finish(INERT)
        return fields
    return gemma2(k, 3)


def phi3(k: Keys) -> dict[str, Any]:
    k.insist("full_attn_mod", 1)
    k.insist("interpolate_factor", 1)
    k.insist("lm_head_bias", False)
    k.insist("mlp_bias", False)
    return llama(k, eps=1e-5, types=_all_slide)


def olmo2(k: Keys) -> dict[str, Any]:
    return llama(k, eps=1e-5) | {"qk_norm": "all", "norms": ("attn_post_norm", "mlp_post_norm")}


def olmo3(k: Keys) -> dict[str, Any]:
    k.insist("rope_theta", 5e5)  # versions of transformers disagree on what another number means for sliding layers
    fields = llama(
        k, eps=1e-5, theta=5e5, local_theta=5e5, default_window=4096, types=lambda i: SLIDING if (i + 1) % 4 else FULL
    )
    return fields | {"qk_norm": "all", "norms": ("attn_post_norm", "mlp_post_norm")}


def granite(k: Keys) -> dict[str, Any]:
    return llama(k) | {
        "embed_scale": k.number("embedding_multiplier", 1.0),
        "residual_scale": k.number("residual_multiplier", 1.0),
        "attn_scale": k.number("attention_multiplier", 1.0),
        "logit_scale": 1 / k.positive("logits_scaling", 1.0),
    }


def seed_oss(k: Keys) -> dict[str, Any]:
    qkv, out = k.flag("attention_bias", True), k.flag("attention_out_bias", False)
    k.set("attention_bias", False)
    return llama(k, head_dim=128, n_kv_heads=8, qkv_bias=qkv, bias=("wo",) if out else ())


def glm4(k: Keys) -> dict[str, Any]:
    bias = k.flag("attention_bias", True)
    k.set("attention_bias", False)
    fields = llama(k, head_dim=128, n_kv_heads=2, qkv_bias=bias, partial=0.5, eps=1.5625e-7)
    return fields | {"norms": ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")}


def cohere2(k: Keys) -> dict[str, Any]:
    period = _period(k, "sliding_window_pattern", k.whole("_sliding_window_pattern", 4))
    k.ignore("cache_implementation", "order_of_interleaved_layers", "rotary_pct", "position_embedding_type")
    k.insist("use_parallel_block", True)
    k.insist("use_parallel_embedding", True, False)
    k.insist("use_gated_activation", True)
    k.insist("use_qk_norm", False)
    k.insist("use_embedding_sharing", True)
    fields = llama(k, tied=True, default_window=4096, types=lambda i: SLIDING if (i + 1) % period else FULL,
                    no_rope=lambda i, kind: kind == FULL)  # fmt: skip
    return fields | {
        "norm": "layer",
        "norm_eps": k.positive("layer_norm_eps", 1e-5),
        "parallel": True,
        "logit_scale": k.number("logit_scale", 0.0625),
    }


def phi(k: Keys) -> dict[str, Any]:
    k.insist("qk_layernorm", False)
    fields = llama(k, partial=0.5, default_act="gelu_new")
    biases = ("norm", "wq", "wk", "wv", "wo", "w_up", "w_down", "unembed")
    eps = k.positive("layer_norm_eps", 1e-5)
    return fields | {"norm": "layer", "norm_eps": eps, "parallel": True, "gated": False, "biases": biases}


def starcoder2(k: Keys) -> dict[str, Any]:
    biases = ("wq", "wk", "wv", "wo", "w_up", "w_down") if k.flag("use_bias", True) else ()
    k.insist("mlp_type", "default")
    k.insist("norm_type", "layer_norm")
    k.ignore("activation_function", "attention_softmax_in_fp32", "layer_norm_epsilon", "scale_attn_weights",
             "scale_attention_softmax_in_fp32")  # fmt: skip
    fields = llama(k, n_kv_heads=2, tied=True, types=_all_slide, default_act="gelu_pytorch_tanh")
    eps = k.positive("norm_epsilon", 1e-5)
    return fields | {"norm": "layer", "norm_eps": eps, "gated": False, "biases": ("norm", *biases)}


def gpt2(k: Keys) -> dict[str, Any]:
    D, N, L, P = k.whole("n_embd"), k.whole("n_head"), k.whole("n_layer"), k.whole("n_positions", 1024)
    k.insist("scale_attn_weights", True)
    k.insist("scale_attn_by_inverse_layer_idx", False)
    k.ignore("n_ctx", "reorder_and_upcast_attn")
    if not N or D % N or not 0 < L <= MOST_LAYERS:
        raise CheckpointError(f"{k.where}: {L} layers of width {D} with {N} heads cannot be")
    return {
        "vocab_size": k.whole("vocab_size"), "d_model": D, "n_layers": L, "n_heads": N, "n_kv_heads": N, "head_dim": D // N,
        "d_ff": k.whole("n_inner", 4 * D), "max_positions": P, "learned_positions": True,
        "tie_embeddings": k.flag("tie_word_embeddings", True), "norm": "layer",
        "norm_eps": k.positive("layer_norm_epsilon", 1e-5), "gated": False,
        "activation": k.one_of("activation_function", ACTIVATIONS, "gelu_new"),
        "biases": ("norm", "wq", "wk", "wv", "wo", "w_up", "w_down"),
    }  # fmt: skip


def gpt_neox(k: Keys) -> dict[str, Any]:
    bias = ("wq", "wk", "wv", "wo") if k.flag("attention_bias", True) else ()
    k.set("attention_bias", False)
    return llama(k, partial=0.25, default_act="gelu") | {
        "norm": "layer",
        "norm_eps": k.positive("layer_norm_eps", 1e-5),
        "parallel": k.flag("use_parallel_residual", True),
        "gated": False,
        "biases": ("norm", *bias, "w_up", "w_down"),
    }
