"""From which tensors of a Hugging Face checkpoint a model's weights come: one table for families that name them alike."""

from jaxemo.checkpoints.entries import (
    Entry,
    gate_rows,
    halves,
    k_rows,
    named,
    one_plus,
    q_rows,
    rows,
    same,
    swap,
    third,
    third_of_head,
    up_rows,
    v_rows,
)

_I = "model.layers.{i}."

LLAMA: dict[str, Entry | tuple[Entry, ...]] = {
    **named({"embed": "model.embed_tokens", "unembed": "lm_head"}, transform=same),
    **named({"final_norm": "model.norm"}),
    **named({"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}, _I),
    **named({"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}, _I),
    **named({f"w{p}": f"self_attn.{p}_proj" for p in "qkvo"}, _I),
    **named({f"w_{p}": f"mlp.{p}_proj" for p in ("gate", "up", "down")}, _I),
    "sinks": Entry(_I + "self_attn.sinks"),
}
PARALLEL = named({"mlp_norm": "input_layernorm"}, _I, shared=True)  # attention and MLP share one norm
NEIGHBOURS = named({f"w{p}": f"self_attn.{p}_proj" for p in "qk"}, _I, halves)
_GATE_UP = {
    "w_gate": Entry(_I + "mlp.gate_up_proj.weight", rows(gate_rows)),
    "w_up": Entry(_I + "mlp.gate_up_proj.weight", rows(up_rows)),
}


def moe(prefix: str, gate: str, up: str, down: str) -> dict[str, Entry | tuple[Entry, ...]]:
    """Experts one by one, as published, or fused, as transformers 5 holds them."""
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
    **named({"router": "mlp.router"}, _I),
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
    "wq": Entry(_I + "self_attn.qkv_proj.weight", rows(q_rows)),
    "wk": Entry(_I + "self_attn.qkv_proj.weight", rows(k_rows)),
    "wv": Entry(_I + "self_attn.qkv_proj.weight", rows(v_rows)),
}
GLM4 = {
    **LLAMA,
    **_GATE_UP,
    **NEIGHBOURS,
    "attn_post_norm": Entry(_I + "post_self_attn_layernorm.weight"),
    "mlp_post_norm": Entry(_I + "post_mlp_layernorm.weight"),
}
PHI = {
    **LLAMA,
    **PARALLEL,
    **named({"final_norm": "model.final_layernorm"}),
    **named({"wo": "self_attn.dense", "w_up": "mlp.fc1", "w_down": "mlp.fc2"}, _I),
}
STARCODER2 = {
    **LLAMA,
    **named({"w_up": "mlp.c_fc", "w_down": "mlp.c_proj"}, _I),
}
_GPT2_NAMES = {"attn_norm": "ln_1", "mlp_norm": "ln_2", "wo": "attn.c_proj", "w_up": "mlp.c_fc", "w_down": "mlp.c_proj"}
GPT2 = {  # its matrices are stored [in, out]
    **named({"embed": "wte", "unembed": "lm_head", "pos_embed": "wpe", "final_norm": "ln_f"}, transform=same),
    **named(_GPT2_NAMES, "h.{i}.", same),
    **{f"w{p}": Entry("h.{i}.attn.c_attn.weight", third(j)) for j, p in enumerate("qkv")},
    **{f"w{p}_bias": Entry("h.{i}.attn.c_attn.bias", third(j)) for j, p in enumerate("qkv")},
}
_NEOX_NAMES = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "wo": "attention.dense",
    "w_up": "mlp.dense_h_to_4h", "w_down": "mlp.dense_4h_to_h",
}  # fmt: skip
GPT_NEOX = {
    **named({"embed": "embed_in", "unembed": "embed_out", "final_norm": "final_layer_norm"}, transform=same),
    **named(_NEOX_NAMES, "layers.{i}."),
    **{f"w{p}": Entry("layers.{i}.attention.query_key_value.weight", third_of_head(j)) for j, p in enumerate("qkv")},
    **{f"w{p}_bias": Entry("layers.{i}.attention.query_key_value.bias", third_of_head(j)) for j, p in enumerate("qkv")},
}
