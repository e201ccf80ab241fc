"""Model families as Hugging Face checkpoints have them: one reader of `config.json` and one table of names each.

A table says for every weight of `params.describe` from which tensor it comes and what is done to it. `{i}` stands for
the layer's number and `{x}` for an expert's. Weights that the model does not have are passed over, so families share
tables; every tensor of a checkpoint must be used, and every weight of the model found (see `convert`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxemo.checkpoints import rope
from jaxemo.checkpoints.keys import CheckpointError, Keys

from jaxemo.config import Attention, ModelConfig, Rope

Transform = Callable[[ModelConfig, np.ndarray], np.ndarray]


def linear(config: ModelConfig, w: np.ndarray) -> np.ndarray:
    """Stored `[out, in]`, kept `[in, out]`; vectors as they are."""
    return w.T if w.ndim == 2 else w


class Entry(NamedTuple):
    source: str
    transform: Transform = linear
    shared: bool = False  # the tensor is another weight's as well


Table = Mapping[str, Entry | tuple[Entry, ...]]  # several: whichever the checkpoint has


class Family(NamedTuple):
    config: Callable[[Keys], dict[str, Any]]  # the fields of ModelConfig, from the configuration
    table: Table
    prefixes: tuple[tuple[str, str], ...] = ()  # how tensor names begin in some checkpoints, and in the table
    ignored: tuple[str, ...] = ()  # patterns of tensors that are not weights of the language model


# ---- transforms ------------------------------------------------------------------------------------------------------


def same(config: ModelConfig, w: np.ndarray) -> np.ndarray:
    return w


def one_plus(config: ModelConfig, w: np.ndarray) -> np.ndarray:
    """Gemma stores its norms' gains less one."""
    return 1 + w.astype(np.float32)


def halves(config: ModelConfig, w: np.ndarray) -> np.ndarray:
    """Queries or keys `[heads · H, ...]` whose rotary pairs are neighbours, put so that pairs are half apart."""
    R = max((kind.rope.dim for kind in config.attention if kind.rope), default=0)
    order = np.concatenate([np.arange(0, R, 2), np.arange(1, R, 2), np.arange(R, config.head_dim)])
    return linear(config, w.reshape(-1, config.head_dim, *w.shape[1:])[:, order].reshape(w.shape))


def rows(part: Callable[[ModelConfig], tuple[int, int]]) -> Transform:
    """A range of a fused matrix's output rows."""
    return lambda config, w: linear(config, w[slice(*part(config))])


def _q_rows(c: ModelConfig):
    return 0, c.n_heads * c.head_dim


def _k_rows(c: ModelConfig):
    return c.n_heads * c.head_dim, (c.n_heads + c.n_kv_heads) * c.head_dim


def _v_rows(c: ModelConfig):
    return (c.n_heads + c.n_kv_heads) * c.head_dim, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim


def third(j: int) -> Transform:
    """Queries, keys or values of GPT-2's fused `[in, 3 · out]`."""
    return lambda config, w: np.split(w, 3, axis=-1)[j]


def third_of_head(j: int) -> Transform:
    """Queries, keys or values of GPT-NeoX's fused rows, `[N, 3, H]`."""

    def take(c: ModelConfig, w: np.ndarray) -> np.ndarray:
        split = w.reshape(c.n_heads, 3, c.head_dim, *w.shape[1:])[:, j]
        return linear(c, split.reshape(-1, *w.shape[1:]))

    return take


# ---- tables ----------------------------------------------------------------------------------------------------------

_I = "model.layers.{i}."

LLAMA: dict[str, Entry | tuple[Entry, ...]] = {
    "embed": Entry("model.embed_tokens.weight", same),
    "unembed": Entry("lm_head.weight", same),
    "unembed_bias": Entry("lm_head.bias"),
    "final_norm": Entry("model.norm.weight"),
    "final_norm_bias": Entry("model.norm.bias"),
    "attn_norm": Entry(_I + "input_layernorm.weight"),
    "attn_norm_bias": Entry(_I + "input_layernorm.bias"),
    "mlp_norm": Entry(_I + "post_attention_layernorm.weight"),
    "mlp_norm_bias": Entry(_I + "post_attention_layernorm.bias"),
    "q_norm": Entry(_I + "self_attn.q_norm.weight"),
    "k_norm": Entry(_I + "self_attn.k_norm.weight"),
    "sinks": Entry(_I + "self_attn.sinks"),
    **{f"w{p}": Entry(_I + f"self_attn.{p}_proj.weight") for p in "qkvo"},
    **{f"w{p}_bias": Entry(_I + f"self_attn.{p}_proj.bias") for p in "qkvo"},
    **{f"w_{p}": Entry(_I + f"mlp.{p}_proj.weight") for p in ("gate", "up", "down")},
    **{f"w_{p}_bias": Entry(_I + f"mlp.{p}_proj.bias") for p in ("gate", "up", "down")},
}
_GATE_UP = {
    "w_gate": Entry(_I + "mlp.gate_up_proj.weight", rows(lambda c: (0, c.d_ff))),
    "w_up": Entry(_I + "mlp.gate_up_proj.weight", rows(lambda c: (c.d_ff, 2 * c.d_ff))),
}
_PARALLEL = {  # attention and MLP share one norm
    "mlp_norm": Entry(_I + "input_layernorm.weight", shared=True),
    "mlp_norm_bias": Entry(_I + "input_layernorm.bias", shared=True),
}
_NEIGHBOURS = {
    name: Entry(_I + f"self_attn.{name[1]}_proj.{'bias' if 'bias' in name else 'weight'}", halves)
    for name in ("wq", "wk", "wq_bias", "wk_bias")
}


def _moe(prefix: str, gate: str, up: str, down: str) -> dict[str, Entry | tuple[Entry, ...]]:
    """Experts one by one, as published, or fused, as transformers 5 holds them."""
    swap = lambda c, w: np.swapaxes(w, -1, -2)  # noqa: E731
    fused = _I + "mlp.experts."
    return {
        **LLAMA,
        "router": (Entry(_I + prefix + "gate.weight"), Entry(_I + "mlp.gate.weight")),
        "w_gate": (
            Entry(_I + prefix + "experts.{x}." + gate + ".weight"),
            Entry(fused + "gate_up_proj", lambda c, w: swap(c, w[:, : c.d_ff])),
        ),
        "w_up": (
            Entry(_I + prefix + "experts.{x}." + up + ".weight"),
            Entry(fused + "gate_up_proj", lambda c, w: swap(c, w[:, c.d_ff :])),
        ),
        "w_down": (Entry(_I + prefix + "experts.{x}." + down + ".weight"), Entry(fused + "down_proj", swap)),
    }


GPT_OSS = {
    **LLAMA,
    "router": Entry(_I + "mlp.router.weight"),
    "router_bias": Entry(_I + "mlp.router.bias"),
    "w_gate": Entry(_I + "mlp.experts.gate_up_proj", lambda c, w: w[..., ::2]),
    "w_up": Entry(_I + "mlp.experts.gate_up_proj", lambda c, w: w[..., 1::2]),
    "w_gate_bias": Entry(_I + "mlp.experts.gate_up_proj_bias", lambda c, w: w[..., ::2]),
    "w_up_bias": Entry(_I + "mlp.experts.gate_up_proj_bias", lambda c, w: w[..., 1::2]),
    "w_down": Entry(_I + "mlp.experts.down_proj", same),
    "w_down_bias": Entry(_I + "mlp.experts.down_proj_bias", same),
}
_GEMMA_NORMS = {
    "attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
}  # fmt: skip
GEMMA2 = {
    **LLAMA,
    "final_norm": Entry("model.norm.weight", one_plus),
    **{name: Entry(_I + source + ".weight", one_plus) for name, source in _GEMMA_NORMS.items()},
}
GEMMA = {**GEMMA2, "mlp_norm": Entry(_I + "post_attention_layernorm.weight", one_plus)}
OLMO2 = {
    **LLAMA,
    "attn_post_norm": Entry(_I + "post_attention_layernorm.weight"),
    "mlp_post_norm": Entry(_I + "post_feedforward_layernorm.weight"),
}
PHI3 = {
    **LLAMA,
    **_GATE_UP,
    "wq": Entry(_I + "self_attn.qkv_proj.weight", rows(_q_rows)),
    "wk": Entry(_I + "self_attn.qkv_proj.weight", rows(_k_rows)),
    "wv": Entry(_I + "self_attn.qkv_proj.weight", rows(_v_rows)),
}
GLM4 = {
    **LLAMA,
    **_GATE_UP,
    **_NEIGHBOURS,
    "attn_post_norm": Entry(_I + "post_self_attn_layernorm.weight"),
    "mlp_post_norm": Entry(_I + "post_mlp_layernorm.weight"),
}
PHI = {
    **LLAMA,
    **_PARALLEL,
    "final_norm": Entry("model.final_layernorm.weight"),
    "final_norm_bias": Entry("model.final_layernorm.bias"),
    "wo": Entry(_I + "self_attn.dense.weight"),
    "wo_bias": Entry(_I + "self_attn.dense.bias"),
    "w_up": Entry(_I + "mlp.fc1.weight"),
    "w_up_bias": Entry(_I + "mlp.fc1.bias"),
    "w_down": Entry(_I + "mlp.fc2.weight"),
    "w_down_bias": Entry(_I + "mlp.fc2.bias"),
}
STARCODER2 = {
    **LLAMA,
    "w_up": Entry(_I + "mlp.c_fc.weight"),
    "w_up_bias": Entry(_I + "mlp.c_fc.bias"),
    "w_down": Entry(_I + "mlp.c_proj.weight"),
    "w_down_bias": Entry(_I + "mlp.c_proj.bias"),
}
_GPT2_NAMES = {"attn_norm": "ln_1", "mlp_norm": "ln_2", "wo": "attn.c_proj", "w_up": "mlp.c_fc", "w_down": "mlp.c_proj"}
GPT2 = {  # its matrices are stored [in, out]
    "embed": Entry("wte.weight", same),
    "unembed": Entry("lm_head.weight", same),
    "pos_embed": Entry("wpe.weight", same),
    "final_norm": Entry("ln_f.weight"),
    "final_norm_bias": Entry("ln_f.bias"),
    **{name: Entry("h.{i}." + source + ".weight", same) for name, source in _GPT2_NAMES.items()},
    **{f"{name}_bias": Entry("h.{i}." + source + ".bias") for name, source in _GPT2_NAMES.items()},
    **{f"w{p}": Entry("h.{i}.attn.c_attn.weight", third(j)) for j, p in enumerate("qkv")},
    **{f"w{p}_bias": Entry("h.{i}.attn.c_attn.bias", third(j)) for j, p in enumerate("qkv")},
}
_NEOX_NAMES = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "wo": "attention.dense",
    "w_up": "mlp.dense_h_to_4h", "w_down": "mlp.dense_4h_to_h",
}  # fmt: skip
GPT_NEOX = {
    "embed": Entry("embed_in.weight", same),
    "unembed": Entry("embed_out.weight", same),
    "final_norm": Entry("final_layer_norm.weight"),
    "final_norm_bias": Entry("final_layer_norm.bias"),
    **{name: Entry("layers.{i}." + source + ".weight") for name, source in _NEOX_NAMES.items()},
    **{f"{name}_bias": Entry("layers.{i}." + source + ".bias") for name, source in _NEOX_NAMES.items()},
    **{f"w{p}": Entry("layers.{i}.attention.query_key_value.weight", third_of_head(j)) for j, p in enumerate("qkv")},
    **{f"w{p}_bias": Entry("layers.{i}.attention.query_key_value.bias", third_of_head(j)) for j, p in enumerate("qkv")},
}


# ---- configurations --------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "relu2": "relu_squared",
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
# More is a damaged file, and would take the memory to describe.
MOST_LAYERS, MOST_EXPERTS, MOST_ROTATED = 4096, 4096, 1 << 16


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


def _llama(
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


def _mistral(k: Keys) -> dict[str, Any]:
    return _llama(k, n_kv_heads=8, types=_all_slide, default_window=4096)


def _smollm3(k: Keys) -> dict[str, Any]:
    interval = k.whole("no_rope_layer_interval", 4)
    listed = k("no_rope_layers", None)
    if listed is not None and not (isinstance(listed, list) and all(v in (0, 1) for v in listed)):
        raise k.fault("no_rope_layers", "expected a list of 0 and 1")
    if listed is not None and len(listed) != k.whole("num_hidden_layers"):
        raise k.fault("no_rope_layers", "expected one number a layer")
    without = [not v for v in listed] if listed else [(i + 1) % max(interval, 1) == 0 for i in range(MOST_LAYERS)]
    window = k.whole("sliding_window", 0) if k.flag("use_sliding_window", False) else 0
    k.ignore("sliding_window", "max_window_layers")
    return _llama(k, n_kv_heads=4, tied=True, theta=2e6, window=window, no_rope=lambda i, kind: without[i],
                  types=lambda i: SLIDING if without[i] else FULL)  # fmt: skip


def _qwen2(k: Keys) -> dict[str, Any]:
    return _llama(k, qkv_bias=True, n_kv_heads=32, **_qwen_window(k))


def _qwen3(k: Keys) -> dict[str, Any]:
    return _llama(k, head_dim=128, n_kv_heads=32, **_qwen_window(k)) | {"qk_norm": "head"}


def _experts(k: Keys, *names: str, experts: int, active: int) -> dict[str, Any]:
    X = k.whole(next((name for name in names if name in k), names[0]), experts)
    if not 0 < X <= MOST_EXPERTS:
        raise CheckpointError(f"{k.where}: {X} experts cannot be")
    return {"n_experts": X, "n_active": k.whole("num_experts_per_tok", active)}


def _qwen3_moe(k: Keys) -> dict[str, Any]:
    k.insist("qkv_bias", False)
    k.insist("use_qk_norm", True)
    k.insist("shared_expert_intermediate_size", 0)
    if k("mlp_only_layers", []) or k.whole("decoder_sparse_step", 1) != 1:
        raise k.fault("mlp_only_layers" if k("mlp_only_layers", []) else "decoder_sparse_step",
                      "a model that mixes dense and expert layers is not supported")  # fmt: skip
    fields = _llama(k, n_kv_heads=4, **_qwen_window(k, all_layers=True)) | _experts(
        k, "num_experts", "num_local_experts", experts=128, active=8
    )
    return fields | {
        "qk_norm": "head",
        "d_ff": k.whole("moe_intermediate_size"),
        "normalise_router": k.flag("norm_topk_prob", False),
    }


def _mixtral(k: Keys) -> dict[str, Any]:
    fields = _llama(k, n_kv_heads=8, eps=1e-5, theta=1e6, types=_all_slide)
    return fields | _experts(k, "num_local_experts", experts=8, active=2)


def _olmoe(k: Keys) -> dict[str, Any]:
    k.insist("clip_qkv")
    fields = _llama(k, eps=1e-5) | _experts(k, "num_experts", experts=64, active=8)
    return fields | {"qk_norm": "all", "normalise_router": k.flag("norm_topk_prob", False)}


def _gpt_oss(k: Keys) -> dict[str, Any]:
    k.insist("swiglu_alpha", 1.702)
    k.ignore("experts_per_token", "initial_context_length")
    scaling = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
               "original_max_position_embeddings": 4096}  # fmt: skip
    if "rope_scaling" not in k and "rope_parameters" not in k:
        k.set("rope_scaling", scaling)
    if "attention_bias" not in k:
        k.set("attention_bias", True)
    fields = _llama(k, head_dim=64, n_kv_heads=8, eps=1e-5, theta=150000.0, default_window=128,
                    types=lambda i: FULL if i % 2 else SLIDING)  # fmt: skip
    fields |= _experts(k, "num_local_experts", experts=128, active=4)
    biases = (*fields["biases"], "router", "w_gate", "w_up", "w_down")
    return fields | {
        "activation": "quick_gelu",
        "glu_limit": k.number("swiglu_limit", 7.0),
        "attn_sinks": True,
        "biases": biases,
    }


def _gemma(k: Keys) -> dict[str, Any]:
    k.ignore("hidden_act", "hidden_activation")  # Gemma 1 always takes the tanh form, whatever stands there
    fields = _llama(k, head_dim=256, n_kv_heads=16, tied=True, act="")
    return fields | {"activation": "gelu_tanh", "embed_scale": fields["d_model"] ** 0.5}


def _gemma2(k: Keys, version: int = 2) -> dict[str, Any]:
    k.ignore("hidden_act", "cache_implementation", "sliding_window_size")
    common: dict[str, Any] = {"head_dim": 256, "n_kv_heads": 4, "tied": True, "act": "hidden_activation",
                              "default_act": "gelu_pytorch_tanh", "default_window": 4096}  # fmt: skip
    if version == 2:
        fields = _llama(k, **common, types=lambda i: FULL if i % 2 else SLIDING)
        caps = (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
        cap, logit_cap = (k.number(name, 0.0 if k.has(name) else default) for name, default in caps)
    else:
        period = max(k.whole("sliding_window_pattern", k.whole("_sliding_window_pattern", 6)), 1)
        fields = _llama(k, **common, types=lambda i: SLIDING if (i + 1) % period else FULL, theta=1e6, local_theta=1e4)
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


def _gemma3(k: Keys) -> dict[str, Any]:
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
        _insist(k)
        fields = _gemma2(k, 3)
        k.finish(INERT)
        return fields
    return _gemma2(k, 3)


def _phi3(k: Keys) -> dict[str, Any]:
    k.insist("full_attn_mod", 1)
    k.insist("interpolate_factor", 1)
    k.insist("lm_head_bias", False)
    k.insist("mlp_bias", False)
    return _llama(k, eps=1e-5, types=_all_slide)


def _olmo2(k: Keys) -> dict[str, Any]:
    return _llama(k, eps=1e-5) | {"qk_norm": "all", "norms": ("attn_post_norm", "mlp_post_norm")}


def _olmo3(k: Keys) -> dict[str, Any]:
    k.insist("rope_theta", 5e5)  # versions of transformers disagree on what another number means for sliding layers
    fields = _llama(
        k, eps=1e-5, theta=5e5, local_theta=5e5, default_window=4096, types=lambda i: SLIDING if (i + 1) % 4 else FULL
    )
    return fields | {"qk_norm": "all", "norms": ("attn_post_norm", "mlp_post_norm")}


def _granite(k: Keys) -> dict[str, Any]:
    return _llama(k) | {
        "embed_scale": k.number("embedding_multiplier", 1.0),
        "residual_scale": k.number("residual_multiplier", 1.0),
        "attn_scale": k.number("attention_multiplier", 1.0),
        "logit_scale": 1 / k.positive("logits_scaling", 1.0),
    }


def _seed_oss(k: Keys) -> dict[str, Any]:
    qkv, out = k.flag("attention_bias", True), k.flag("attention_out_bias", False)
    k.set("attention_bias", False)
    return _llama(k, head_dim=128, n_kv_heads=8, qkv_bias=qkv, bias=("wo",) if out else ())


def _glm4(k: Keys) -> dict[str, Any]:
    bias = k.flag("attention_bias", True)
    k.set("attention_bias", False)
    fields = _llama(k, head_dim=128, n_kv_heads=2, qkv_bias=bias, partial=0.5, eps=1.5625e-7)
    return fields | {"norms": ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")}


def _cohere2(k: Keys) -> dict[str, Any]:
    period = k.whole("sliding_window_pattern", k.whole("_sliding_window_pattern", 4))
    k.ignore("cache_implementation", "order_of_interleaved_layers", "rotary_pct", "position_embedding_type")
    k.insist("use_parallel_block", True)
    k.insist("use_parallel_embedding", True, False)
    k.insist("use_gated_activation", True)
    k.insist("use_qk_norm", False)
    k.insist("use_embedding_sharing", True)
    fields = _llama(k, tied=True, default_window=4096, types=lambda i: SLIDING if (i + 1) % period else FULL,
                    no_rope=lambda i, kind: kind == FULL)  # fmt: skip
    return fields | {
        "norm": "layer",
        "norm_eps": k.positive("layer_norm_eps", 1e-5),
        "parallel": True,
        "logit_scale": k.number("logit_scale", 0.0625),
    }


def _phi(k: Keys) -> dict[str, Any]:
    k.insist("qk_layernorm", False)
    fields = _llama(k, partial=0.5, default_act="gelu_new")
    biases = ("norm", "wq", "wk", "wv", "wo", "w_up", "w_down", "unembed")
    eps = k.positive("layer_norm_eps", 1e-5)
    return fields | {"norm": "layer", "norm_eps": eps, "parallel": True, "gated": False, "biases": biases}


def _starcoder2(k: Keys) -> dict[str, Any]:
    biases = ("wq", "wk", "wv", "wo", "w_up", "w_down") if k.flag("use_bias", True) else ()
    k.insist("mlp_type", "default")
    k.insist("norm_type", "layer_norm")
    k.ignore("activation_function", "attention_softmax_in_fp32", "layer_norm_epsilon", "scale_attn_weights",
             "scale_attention_softmax_in_fp32")  # fmt: skip
    fields = _llama(k, n_kv_heads=2, tied=True, types=_all_slide, default_act="gelu_pytorch_tanh")
    eps = k.positive("norm_epsilon", 1e-5)
    return fields | {"norm": "layer", "norm_eps": eps, "gated": False, "biases": ("norm", *biases)}


def _gpt2(k: Keys) -> dict[str, Any]:
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


def _gpt_neox(k: Keys) -> dict[str, Any]:
    bias = ("wq", "wk", "wv", "wo") if k.flag("attention_bias", True) else ()
    k.set("attention_bias", False)
    return _llama(k, partial=0.25, default_act="gelu") | {
        "norm": "layer",
        "norm_eps": k.positive("layer_norm_eps", 1e-5),
        "parallel": k.flag("use_parallel_residual", True),
        "gated": False,
        "biases": ("norm", *bias, "w_up", "w_down"),
    }


_BUFFERS = (r".*rotary_emb\.inv_freq", r".*\.(attn|attention)\.(bias|masked_bias)")  # of old checkpoints; not weights
_SIGHT = (r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*")

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, LLAMA, ignored=_BUFFERS),
    "mistral": Family(_mistral, LLAMA),
    "mixtral": Family(_mixtral, _moe("block_sparse_moe.", "w1", "w3", "w2")),
    "smollm3": Family(_smollm3, LLAMA),
    "qwen2": Family(_qwen2, LLAMA),
    "qwen3": Family(_qwen3, LLAMA),
    "qwen3_moe": Family(_qwen3_moe, _moe("mlp.", "gate_proj", "up_proj", "down_proj")),
    "gemma": Family(_gemma, GEMMA),
    "gemma2": Family(_gemma2, GEMMA2),
    "gemma3_text": Family(_gemma3, GEMMA2),
    "gemma3": Family(_gemma3, GEMMA2, (("language_model.", ""), ("model.language_model.", "model.")), _SIGHT),
    "phi": Family(_phi, PHI),
    "phi3": Family(_phi3, PHI3),
    "olmo2": Family(_olmo2, OLMO2),
    "olmo3": Family(_olmo3, OLMO2),
    "olmoe": Family(_olmoe, _moe("mlp.", "gate_proj", "up_proj", "down_proj")),
    "gpt2": Family(_gpt2, GPT2, (("transformer.", ""),), _BUFFERS),
    "gpt_neox": Family(_gpt_neox, GPT_NEOX, (("gpt_neox.", ""),), _BUFFERS),
    "gpt_oss": Family(_gpt_oss, GPT_OSS),
    "granite": Family(_granite, LLAMA),
    "glm4": Family(_glm4, GLM4),
    "cohere2": Family(_cohere2, {**LLAMA, **_PARALLEL, **_NEIGHBOURS}),
    "seed_oss": Family(_seed_oss, LLAMA),
    "starcoder2": Family(_starcoder2, STARCODER2),
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


def _insist(keys: Keys) -> None:
    for key, allowed in ONLY.items():
        keys.insist(key, *allowed)


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
    _insist(keys)
    fields = FAMILIES[name].config(keys)
    keys.finish(INERT)
    return build(where, name.removesuffix("_text"), fields)


def build(where: str, family: str, fields: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig with these fields. Raises CheckpointError where there is none, or none that could be."""
    for name, most in (("n_layers", MOST_LAYERS), ("n_experts", MOST_EXPERTS)):
        if not 0 <= fields.get(name, 0) <= most:
            raise CheckpointError(f"{where}: {name} {fields[name]} is more than any model has")
    try:
        config = ModelConfig(family=family, **fields)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    return config
