"""Makes the files in families/: what transformers computes with tiny models of every family that jaxemo reads.

    .venv-parity/bin/python tests/golden/make_families.py [NAME ...]

`make parity` makes the environment and checks that the files are still what this program writes. For each model it
writes NAME.json, the config.json and the name and shape of every tensor in model.safetensors (the weights come from the
names, see `seeded`), and NAME.npz: some rows of token ids and, each row run alone in float32 with eager attention, their
logits, the residual stream that enters the first block and that leaves each, and greedy continuations.

Configurations are of two kinds. HUB are written as published config.json files are, many by older versions of
transformers; SAVED are keyword arguments, and the file is what `save_pretrained` makes of them. Windows, lengths and soft
caps are small enough that all of them matter in rows of 16 tokens.
"""

import json
import pathlib
import sys
import tempfile
import zlib

import numpy as np
import safetensors.numpy
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import seeded

FOLDER = pathlib.Path(__file__).parent / "families"
VOCAB, LENGTHS, NEW_TOKENS = 96, (13, 1, 8, 16), 8
# ten times the bound on logits: no rounding changes a token; nor which experts a token goes to
CLOSEST, CLOSEST_EXPERT = 1e-3, 1e-4


def size(D=32, L=2, N=4, K=2, F=48, positions=64, **more) -> dict:
    """The keys that nearly all families share."""
    return {
        "vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": N, "num_key_value_heads": K,
        "intermediate_size": F, "max_position_embeddings": positions, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def hub(architecture: str, model_type: str, **more) -> dict:
    """What else nearly all published files say, and matters to nobody here."""
    return {
        "architectures": [architecture], "model_type": model_type, "torch_dtype": "bfloat16", "use_cache": True,
        "transformers_version": "4.40.0", "initializer_range": 0.02, **more,
    }  # fmt: skip


SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}

HUB = {
    # Llama 1 and 2: no key for what was not yet variable
    "llama-v1": hub("LlamaForCausalLM", "llama", hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False,
                    pad_token_id=0, **{k: v for k, v in size(L=3).items() if k != "num_key_value_heads"}),
    "llama-v3": hub("LlamaForCausalLM", "llama", hidden_act="silu", rms_norm_eps=1e-5, tie_word_embeddings=True,
                    attention_bias=False, mlp_bias=False, pretraining_tp=1, head_dim=8, rope_theta=500.0,
                    rope_scaling={**LLAMA3, "rope_type": "llama3"}, **size(positions=512)),
    "llama-dynamic": hub("LlamaForCausalLM", "llama", hidden_act="silu", rms_norm_eps=1e-5, tie_word_embeddings=False,
                         pretraining_tp=1, rope_theta=100.0, rope_scaling={"type": "dynamic", "factor": 2.0},
                         **size(positions=12)),
    "mistral-v1": hub("MistralForCausalLM", "mistral", hidden_act="silu", rms_norm_eps=1e-5, tie_word_embeddings=False,
                      rope_theta=1e4, sliding_window=5, **size(L=3)),
    "mistral-nemo": hub("MistralForCausalLM", "mistral", hidden_act="silu", rms_norm_eps=1e-5, tie_word_embeddings=False,
                        rope_theta=1e6, sliding_window=None, head_dim=6, attention_dropout=0.0, **size()),
    "smollm3-hub": hub("SmolLM3ForCausalLM", "smollm3", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=5e6,
                       rope_scaling=None, attention_bias=False, attention_dropout=0.0, mlp_bias=False,
                       no_rope_layer_interval=4, no_rope_layers=[1, 1, 0, 1], layer_types=[FULL] * 4, pretraining_tp=2,
                       sliding_window=None, use_sliding_window=False, max_window_layers=28, pad_token_id=0,
                       **size(D=24, L=4, N=4, K=1)),
    "qwen2-hub": hub("Qwen2ForCausalLM", "qwen2", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e6,
                     attention_dropout=0.0, sliding_window=5, max_window_layers=1, use_sliding_window=False,
                     tie_word_embeddings=True, **size()),
    "qwen2-yarn": hub("Qwen2ForCausalLM", "qwen2", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=20.0,
                      attention_dropout=0.0, sliding_window=5, max_window_layers=1, use_sliding_window=True,
                      tie_word_embeddings=False, rope_scaling={**YARN, "type": "yarn"}, **size(L=3)),
    "qwen3-hub": hub("Qwen3ForCausalLM", "qwen3", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None,
                     head_dim=16, attention_bias=False, attention_dropout=0.0, sliding_window=None, max_window_layers=2,
                     use_sliding_window=False, tie_word_embeddings=True, **size()),
    "gemma-hub": hub("GemmaForCausalLM", "gemma", hidden_act="gelu", hidden_activation=None, rms_norm_eps=1e-6,
                     rope_theta=1e4, rope_scaling=None, head_dim=16, attention_bias=False, attention_dropout=0.0,
                     pad_token_id=0, **size(K=1)),
    "gemma2-hub": hub("Gemma2ForCausalLM", "gemma2", hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
                      rms_norm_eps=1e-6, rope_theta=1e4, head_dim=16, attention_bias=False, attention_dropout=0.0,
                      attn_logit_softcapping=3.0, final_logit_softcapping=4.0, cache_implementation="hybrid",
                      query_pre_attn_scalar=20, sliding_window=5, sliding_window_size=5, pad_token_id=0,
                      **size(D=24, L=3)),
    "gemma3_text-hub": hub("Gemma3ForCausalLM", "gemma3_text", hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
                           rope_theta=1e6, rope_local_base_freq=100.0, rope_scaling=None, head_dim=16,
                           attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=None,
                           final_logit_softcapping=None, query_pre_attn_scalar=20, sliding_window=5,
                           _sliding_window_pattern=6, layer_types=[*[SLIDING] * 5, FULL], use_bidirectional_attention=False,
                           pad_token_id=0, **size(D=20, L=6, K=1)),
    "gemma3_text-linear": hub("Gemma3ForCausalLM", "gemma3_text", hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
                              rope_theta=1e3, rope_local_base_freq=100.0, head_dim=8, query_pre_attn_scalar=8,
                              rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window=5,
                              sliding_window_pattern=2, cache_implementation="hybrid", pad_token_id=0, **size(D=24, L=4)),
    "phi3-mini": hub("Phi3ForCausalLM", "phi3", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
                     attention_bias=False, attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.0, sliding_window=5,
                     original_max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0,
                     auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, **size(K=4)),
    "phi3-long": hub("Phi3ForCausalLM", "phi3", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=100.0,
                     rope_scaling={"type": "longrope", "long_factor": [1.1, 2.0, 3.5, 6.0], "short_factor": [1.0, 1.05, 1.2, 1.4]},
                     attention_bias=False, attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.0, sliding_window=100,
                     original_max_position_embeddings=10, tie_word_embeddings=False, pad_token_id=0, **size()),
    "phi3-partial": hub("Phi3ForCausalLM", "phi3", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=100.0,
                        rope_scaling={"type": "longrope", "long_factor": [1.0, 2.5, 7.0], "short_factor": [1.0, 1.0, 1.5]},
                        partial_rotary_factor=0.75, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False,
                        mlp_bias=False, attention_bias=False, attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
                        sliding_window=100, original_max_position_embeddings=12, tie_word_embeddings=True, pad_token_id=0,
                        **size(L=3)),
    "olmo2-hub": hub("Olmo2ForCausalLM", "olmo2", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=5e5, rope_scaling=None,
                     attention_bias=False, attention_dropout=0.0, tie_word_embeddings=False, pad_token_id=0, **size(K=4)),
    "olmo3-hub": hub("Olmo3ForCausalLM", "olmo3", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=5e5,
                     rope_scaling={**YARN, "rope_type": "yarn", "attention_factor": 1.2079441541679836, "beta_fast": 8.0,
                                   "beta_slow": 1.0},
                     attention_bias=False, attention_dropout=0.0, tie_word_embeddings=False, pad_token_id=0,
                     sliding_window=5, layer_types=[SLIDING, SLIDING, SLIDING, FULL], **size(D=24, L=4, K=4)),
    "gpt2-hub": hub("GPT2LMHeadModel", "gpt2", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_ctx=64,
                    activation_function="gelu_new", attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, bos_token_id=1,
                    eos_token_id=1, layer_norm_epsilon=1e-5, summary_activation=None, summary_first_dropout=0.1,
                    summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
                    task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}),
    "gpt_neox-pythia": hub("GPTNeoXForCausalLM", "gpt_neox", hidden_act="gelu", layer_norm_eps=1e-5, rotary_pct=0.25,
                           rotary_emb_base=10000, use_parallel_residual=True, tie_word_embeddings=False,
                           **{k: v for k, v in size(N=2).items() if k != "num_key_value_heads"}),
    "mixtral-hub": hub("MixtralForCausalLM", "mixtral", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1e6,
                       attention_dropout=0.0, sliding_window=None, num_experts_per_tok=2, num_local_experts=4,
                       output_router_logits=False, router_aux_loss_coef=0.02, tie_word_embeddings=False, **size(F=40)),
    "qwen3_moe-hub": hub("Qwen3MoeForCausalLM", "qwen3_moe", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e6,
                         rope_scaling=None, head_dim=16, attention_bias=False, attention_dropout=0.0, sliding_window=None,
                         max_window_layers=48, use_sliding_window=False, tie_word_embeddings=False, decoder_sparse_step=1,
                         mlp_only_layers=[], moe_intermediate_size=24, norm_topk_prob=True, num_experts=6,
                         num_experts_per_tok=3, output_router_logits=False, router_aux_loss_coef=0.001, **size()),
    "gpt_oss-hub": hub("GptOssForCausalLM", "gpt_oss", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=20.0,
                       rope_scaling={**YARN, "beta_fast": 4.0, "beta_slow": 1.0, "rope_type": "yarn", "truncate": False},
                       head_dim=16, attention_bias=True, attention_dropout=0.0, sliding_window=5,
                       layer_types=[SLIDING, FULL], experts_per_token=2, num_experts_per_tok=2, num_local_experts=4,
                       initial_context_length=64, output_router_logits=False, router_aux_loss_coef=0.9, swiglu_limit=7.0,
                       tie_word_embeddings=False, pad_token_id=0, **size(F=24)),
    "gpt_oss-mxfp4": hub("GptOssForCausalLM", "gpt_oss", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1e3,
                         rope_scaling={"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "rope_type": "yarn",
                                       "truncate": False, "original_max_position_embeddings": 4096},
                         head_dim=8, attention_bias=True, attention_dropout=0.0, sliding_window=5,
                         layer_types=[SLIDING, FULL], experts_per_token=2, num_experts_per_tok=2, num_local_experts=3,
                         initial_context_length=4096, output_router_logits=False, router_aux_loss_coef=0.9,
                         swiglu_limit=7.0, tie_word_embeddings=False, pad_token_id=0,
                         quantization_config={"quant_method": "mxfp4",
                                              "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                                         "model.embed_tokens", "lm_head"]},
                         **size(D=64, K=1, F=32)),
    "granite-hub": hub("GraniteForCausalLM", "granite", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1e4,
                       rope_scaling=None, attention_bias=False, attention_dropout=0.1, mlp_bias=False,
                       attention_multiplier=0.4, embedding_multiplier=5.0, residual_multiplier=0.22, logits_scaling=0.5,
                       tie_word_embeddings=True, pad_token_id=0, **size(L=3)),
    "phi-2": hub("PhiForCausalLM", "phi", hidden_act="gelu_new", layer_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
                 partial_rotary_factor=0.4, qk_layernorm=False, attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.1,
                 tie_word_embeddings=False, **size(D=40, K=4)),
    "gemma3-sees": hub("Gemma3ForConditionalGeneration", "gemma3", boi_token_index=90, eoi_token_index=91,
                       image_token_index=92, mm_tokens_per_image=4, eos_token_id=[1, 6],
                       text_config={"model_type": "gemma3_text", "hidden_size": 24, "intermediate_size": 48,
                                    "num_hidden_layers": 3, "sliding_window": 5, "num_attention_heads": 4,
                                    "num_key_value_heads": 2, "head_dim": 12, "vocab_size": VOCAB, "query_pre_attn_scalar": 12,
                                    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1e3,
                                    "sliding_window_pattern": 2},
                       vision_config={"model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8,
                                      "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 2,
                                      "vision_use_head": False}),
    "olmoe-hub": hub("OlmoeForCausalLM", "olmoe", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
                     attention_bias=False, attention_dropout=0.0, clip_qkv=None, norm_topk_prob=False, num_experts=6,
                     num_experts_per_tok=3, output_router_logits=False, router_aux_loss_coef=0.01,
                     tie_word_embeddings=False, pad_token_id=0, **size(K=4, F=24)),
    "glm4-hub": hub("Glm4ForCausalLM", "glm4", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1e4, head_dim=8,
                    attention_bias=True, attention_dropout=0.0, partial_rotary_factor=0.5, tie_word_embeddings=False,
                    pad_token_id=0, **size()),
    "cohere2-hub": hub("Cohere2ForCausalLM", "cohere2", hidden_act="silu", layer_norm_eps=1e-5, rope_theta=5e4, head_dim=8,
                       attention_bias=False, attention_dropout=0.0, cache_implementation="hybrid", logit_scale=1.0,
                       order_of_interleaved_layers="local_attn_first", position_embedding_type="rope_gptj",
                       rope_scaling=None, rotary_pct=1.0, sliding_window=5, sliding_window_pattern=4,
                       use_embedding_sharing=True, use_gated_activation=True, use_parallel_block=True,
                       use_parallel_embedding=False, pad_token_id=0, **size(D=24, L=4, K=1)),
    "seed_oss-hub": hub("SeedOssForCausalLM", "seed_oss", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e7,
                        rope_scaling={"rope_type": "default"}, head_dim=12, attention_bias=True, attention_dropout=0.1,
                        attention_out_bias=False, mlp_bias=False, residual_dropout=0.1, tie_word_embeddings=False,
                        pad_token_id=0, **size()),
    "starcoder2-hub": hub("Starcoder2ForCausalLM", "starcoder2", activation_function="gelu", hidden_act="gelu_pytorch_tanh",
                          norm_epsilon=1e-5, norm_type="layer_norm", mlp_type="default", rope_theta=1e5,
                          attention_dropout=0.1, attention_softmax_in_fp32=True, embedding_dropout=0.1,
                          layer_norm_epsilon=1e-5, residual_dropout=0.1, resid_pdrop=0.1, scale_attention_softmax_in_fp32=True,
                          scale_attn_weights=True, sliding_window=5, use_bias=True, **size()),
}  # fmt: skip

SAVED = {
    "llama-linear": ("llama", size(K=1, rms_norm_eps=0.01, head_dim=12, attention_bias=True, mlp_bias=True,
                                   rope_parameters={"rope_type": "linear", "rope_theta": 1e3, "factor": 2.5})),
    "llama-yarn": ("llama", size(K=4, tie_word_embeddings=True,
                                 rope_parameters={**YARN, "rope_type": "yarn", "rope_theta": 20.0, "beta_fast": 4,
                                                  "mscale": 1.5, "mscale_all_dim": 0.5})),
    "mistral-saved": ("mistral", size(K=1, rms_norm_eps=0.01, sliding_window=7, head_dim=12, tie_word_embeddings=True)),
    "smollm3-interval": ("smollm3", size(D=24, L=4, K=4, no_rope_layer_interval=2, tie_word_embeddings=False, pad_token_id=0,
                                         rms_norm_eps=0.01)),
    "smollm3-window": ("smollm3", size(D=24, L=4, no_rope_layers=[0, 1, 1, 0], use_sliding_window=True, sliding_window=5,
                                       attention_bias=True, mlp_bias=True, pad_token_id=0)),
    "qwen2-window": ("qwen2", size(L=3, K=4, rms_norm_eps=0.01, use_sliding_window=True, sliding_window=5, max_window_layers=2)),
    "qwen3-window": ("qwen3", size(L=3, K=1, head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=1,
                                   attention_bias=True)),
    "qwen3-yarn": ("qwen3", size(K=4, head_dim=12, rms_norm_eps=0.01,
                                 rope_parameters={**YARN, "rope_type": "yarn", "rope_theta": 30.0, "attention_factor": 0.8})),
    "gemma-mha": ("gemma", size(K=4, head_dim=8, rms_norm_eps=0.1)),
    "gemma-bias": ("gemma", size(D=24, L=3, head_dim=6, attention_bias=True,
                                 rope_parameters={"rope_type": "default", "rope_theta": 100.0})),
    "gemma2-order": ("gemma2", size(D=24, L=4, K=1, head_dim=6, query_pre_attn_scalar=9, sliding_window=6,
                                    attn_logit_softcapping=2.0, layer_types=[FULL, SLIDING, SLIDING, FULL])),
    "gemma2-uncapped": ("gemma2", size(K=4, rms_norm_eps=0.1, head_dim=8, query_pre_attn_scalar=8, sliding_window=3,
                                       attn_logit_softcapping=None, final_logit_softcapping=None)),
    "gemma3_text-capped": ("gemma3_text", size(D=24, L=3, rms_norm_eps=0.1, head_dim=12, query_pre_attn_scalar=6, sliding_window=4,
                                               final_logit_softcapping=3.0, attention_bias=True,
                                               layer_types=[FULL, SLIDING, FULL])),
    "phi3-saved": ("phi3", size(L=3, K=1, rms_norm_eps=0.01, original_max_position_embeddings=14, pad_token_id=0,
                                rope_parameters={"rope_type": "longrope", "rope_theta": 1e3, "factor": 3.0,
                                                 "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 2.5, 3.0]})),
    "olmo2-gqa": ("olmo2", size(L=3, rms_norm_eps=0.01)),
    "olmo2-bias": ("olmo2", size(K=1, attention_bias=True, tie_word_embeddings=True,
                                 rope_parameters={"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0})),
    "olmo3-plain": ("olmo3", size(D=24, L=4, K=4, sliding_window=6, rms_norm_eps=0.01)),
    "olmo3-gqa": ("olmo3", size(D=24, L=3, sliding_window=3, layer_types=[FULL, SLIDING, FULL], attention_bias=True,
                                rope_parameters={FULL: {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e3},
                                                 SLIDING: {"rope_type": "default", "rope_theta": 50.0}})),
    "gpt2-gelu": ("gpt2", {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_inner": 40, "n_positions": 32,
                           "activation_function": "gelu", "layer_norm_epsilon": 1e-3, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt2-untied": ("gpt2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32,
                             "reorder_and_upcast_attn": True, "tie_word_embeddings": False, "bos_token_id": 1,
                             "eos_token_id": 2}),
    "gpt_neox-serial": ("gpt_neox", size(K=4, layer_norm_eps=0.01, use_parallel_residual=False, attention_bias=False,
                                         rope_parameters={"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 1.0})),
    "gpt_neox-tied": ("gpt_neox", size(D=24, L=3, N=3, K=3, hidden_act="gelu_new", tie_word_embeddings=True,
                                       rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0,
                                                        "partial_rotary_factor": 0.5})),
    "mixtral-window": ("mixtral", size(D=24, F=32, rms_norm_eps=0.01, head_dim=8, sliding_window=5, num_local_experts=3, num_experts_per_tok=1)),
    "mixtral-many": ("mixtral", size(D=24, L=3, K=1, F=20, num_local_experts=7, num_experts_per_tok=4,
                                     tie_word_embeddings=True)),
    "qwen3_moe-unnormalised": ("qwen3_moe", size(D=24, K=4, rms_norm_eps=0.01, head_dim=8, num_experts=4, num_experts_per_tok=2,
                                                 moe_intermediate_size=32, norm_topk_prob=False, attention_bias=True)),
    "qwen3_moe-window": ("qwen3_moe", size(D=24, L=3, K=1, head_dim=8, num_experts=5, num_experts_per_tok=1,
                                           moe_intermediate_size=20, use_sliding_window=True, sliding_window=5,
                                           tie_word_embeddings=True)),
    "gpt_oss-saved": ("gpt_oss", size(D=24, L=3, F=24, K=1, head_dim=8, sliding_window=4, num_local_experts=3,
                                      num_experts_per_tok=1)),
    "gpt_oss-plain": ("gpt_oss", size(D=24, F=20, K=4, rms_norm_eps=0.01, head_dim=12, sliding_window=6, num_local_experts=5,
                                      num_experts_per_tok=4, attention_bias=False, layer_types=[FULL, SLIDING],
                                      rope_parameters={"rope_type": "default", "rope_theta": 100.0})),
    "granite-bias": ("granite", size(K=4, rms_norm_eps=0.01, attention_bias=True, mlp_bias=True, attention_multiplier=0.2,
                                     embedding_multiplier=2.5, residual_multiplier=0.7, logits_scaling=1.5)),
    "granite-mqa": ("granite", size(D=24, L=3, K=1, attention_multiplier=0.25, residual_multiplier=1.3, logits_scaling=0.25,
                                    rope_parameters={"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0})),
    "phi-gqa": ("phi", size(hidden_act="gelu", layer_norm_eps=0.01, rope_parameters={"rope_type": "default", "rope_theta": 100.0,
                                                                "partial_rotary_factor": 0.5})),
    "olmoe-normalised": ("olmoe", size(D=24, F=20, rms_norm_eps=0.01, norm_topk_prob=True, num_experts=4,
                                       num_experts_per_tok=2, pad_token_id=0)),
    "olmoe-biased": ("olmoe", size(D=24, F=20, K=1, L=3, attention_bias=True, num_experts=3, num_experts_per_tok=1,
                                   tie_word_embeddings=True, pad_token_id=0)),
    "glm4-unbiased": ("glm4", size(K=1, head_dim=12, rms_norm_eps=0.01, attention_bias=False, pad_token_id=0,
                                   rope_parameters={"rope_type": "default", "rope_theta": 100.0,
                                                    "partial_rotary_factor": 1.0})),
    "glm4-tied": ("glm4", size(D=24, L=3, K=4, head_dim=16, tie_word_embeddings=True, pad_token_id=0,
                               rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0,
                                                "partial_rotary_factor": 0.25})),
    "cohere2-order": ("cohere2", size(D=24, L=3, sliding_window=6, layer_norm_eps=0.01, attention_bias=True,
                                      layer_types=[FULL, SLIDING, SLIDING], logit_scale=0.75, pad_token_id=0)),
    "cohere2-mha": ("cohere2", size(L=4, D=24, K=4, sliding_window=3, logit_scale=1.5, pad_token_id=0,
                                    rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0})),
    "seed_oss-biased": ("seed_oss", size(K=1, head_dim=8, rms_norm_eps=0.01, attention_out_bias=True, mlp_bias=True)),
    "seed_oss-unbiased": ("seed_oss", size(D=24, L=3, K=4, head_dim=8, attention_bias=False, tie_word_embeddings=True,
                                           rope_parameters={"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0})),
    "starcoder2-full": ("starcoder2", size(K=1, norm_epsilon=0.01, hidden_act="gelu", tie_word_embeddings=False)),
    "starcoder2-unbiased": ("starcoder2", size(D=24, L=3, K=4, use_bias=False, sliding_window=7,
                                               rope_parameters={"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0})),
    "phi-tied": ("phi", size(D=24, L=3, N=3, K=1, tie_word_embeddings=True,
                             rope_parameters={"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0,
                                              "partial_rotary_factor": 1.0})),
}  # fmt: skip
NAMES = tuple(sorted([*HUB, *SAVED]))


def family(name: str) -> str:
    return name.split("-")[0]


def published(name: str, shapes: dict) -> dict:
    """The tensors of the published files, where they are not those that `save_pretrained` writes."""
    if name == "gpt2-hub":  # without the prefix, and with the causal masks
        masks = {f"h.{i}.attn.bias": [1, 1, 64, 64] for i in range(2)}
        return {**{key.removeprefix("transformer."): shape for key, shape in shapes.items()}, **masks}
    if name == "gpt_neox-pythia":
        buffers = {"bias": [1, 1, 64, 64], "masked_bias": [], "rotary_emb.inv_freq": [2]}
        return {**shapes, **{f"gpt_neox.layers.{i}.attention.{k}": v for i in range(2) for k, v in buffers.items()}}
    if name == "gpt_oss-mxfp4":  # blocks of 32 numbers of 4 bits along the input, with a scale each
        for key in [key for key in shapes if key.endswith(("gate_up_proj", "down_proj"))]:
            experts, wide, high = shapes.pop(key)
            shapes |= {f"{key}_blocks": [experts, high, wide // 32, 16], f"{key}_scales": [experts, high, wide // 32]}
        return dict(sorted(shapes.items()))
    if name == "llama-v1":
        return {**shapes, **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": [4] for i in range(3)}}
    return shapes


def build(name: str, folder: pathlib.Path) -> tuple[dict, dict, torch.nn.Module]:
    """The config.json, the shape of every tensor, and the model as transformers reads it from these in `folder`."""
    if name in HUB:
        config = HUB[name]
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(plain))
        fresh = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    else:
        kind, arguments = SAVED[name]
        fresh = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **arguments))
    fresh.float().save_pretrained(folder)
    if name in HUB:
        (folder / "config.json").write_text(json.dumps(config))
    else:
        config = json.loads((folder / "config.json").read_text())
    file = folder / "model.safetensors"
    with safetensors.safe_open(file, "np") as opened:
        shapes = {key: opened.get_slice(key).get_shape() for key in sorted(opened.keys())}
    shapes = published(name, shapes)
    safetensors.numpy.save_file(seeded.checkpoint(config, shapes), file, metadata={"format": "pt"})
    how = {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if "quantization_config" in config else {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **how
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], (name, info)
    assert {key.rsplit(".", 1)[-1] for key in info["unexpected_keys"]} <= {"bias", "masked_bias", "inv_freq"}, (
        name,
        info,
    )
    return config, shapes, model.eval()


class Watch:
    """Runs rows through a model, alone, and keeps what passes the blocks."""

    def __init__(self, model):
        self.model, self.resid, self.embed, self.expert_margin = model, [], None, np.inf
        decoder = getattr(model.base_model, "language_model", model.base_model)
        blocks = decoder.h if hasattr(decoder, "h") else decoder.layers
        blocks[0].register_forward_pre_hook(self.enter, with_kwargs=True)
        for block in blocks:
            block.register_forward_hook(
                lambda _m, _i, out: self.resid.append((out[0] if isinstance(out, tuple) else out)[0])
            )
        for module in model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                module.register_forward_hook(self.route)

    def enter(self, _module, args, kwargs):
        self.embed = (args[0] if args else kwargs["hidden_states"])[0]

    def route(self, module, _args, out):
        best = out[0].sort(descending=True).values
        if module.top_k < best.shape[-1]:
            margin = best[:, module.top_k - 1] - best[:, module.top_k]
            self.expert_margin = min(self.expert_margin, margin.min().item())

    def run(self, ids: list[int]) -> dict[str, np.ndarray]:
        for module in self.model.modules():  # dynamic frequencies outlive the row that they were made for
            if hasattr(module, "original_inv_freq"):
                module.inv_freq = module.original_inv_freq.clone()
                module.max_seq_len_cached = module.original_max_seq_len
        self.resid = []
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return {"logits": logits.numpy(), "embed": self.embed.numpy(), "resid": torch.stack(self.resid).numpy()}


def continues(model, length: int) -> bool:
    """Whether a greedy continuation means the same here, where frequencies follow the length of the text so far, as in
    jaxemo, where they are those of the whole row from the start."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        return length + NEW_TOKENS <= model.config.max_position_embeddings
    if rope.get("rope_type") == "longrope":
        original = rope["original_max_position_embeddings"]
        return length > original or length + NEW_TOKENS <= original
    return True


def greedy(watch: Watch, ids: list[int]) -> tuple[list[int], float]:
    """The greedy continuation, and how close its closest call was (best logit minus second)."""
    row, closest = list(ids), np.inf
    for _ in range(NEW_TOKENS):
        last = watch.run(row)["logits"][-1]
        second, best = np.sort(last)[-2:]
        closest = min(closest, float(best - second))
        row.append(int(last.argmax()))
    return row[len(ids) :], closest


def make(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """What NAME.json and NAME.npz hold."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        config, shapes, model = build(name, pathlib.Path(folder))
        random = np.random.RandomState(zlib.crc32(name.encode()))
        rows, got, continued = [], [], []
        watch = Watch(model)
        while len(rows) < len(LENGTHS):
            watch.expert_margin = np.inf
            ids = random.randint(0, VOCAB, LENGTHS[len(rows)]).tolist()
            found = watch.run(ids)
            tokens, closest = greedy(watch, ids) if continues(model, len(ids)) else ([-1] * NEW_TOKENS, np.inf)
            if closest > CLOSEST and watch.expert_margin > CLOSEST_EXPERT:
                rows.append(ids)
                got.append(found)
                continued.append(tokens)
    arrays = {"ids": np.concatenate(rows).astype(np.int16), "lengths": np.array(LENGTHS, np.int16)}
    for site in got[0]:  # the rows' tokens one after another: no padding is stored
        arrays[site] = np.concatenate([row[site] for row in got], axis=-2)
    arrays["greedy"] = np.array(continued, np.int16)  # −1 where none is comparable
    return {"config": config, "tensors": shapes}, arrays


def write(name: str, described: dict, arrays: dict[str, np.ndarray], folder: pathlib.Path = FOLDER) -> None:
    def lines(value):
        return ",\n".join(f"{json.dumps(key)}: {json.dumps(value[key])}" for key in value)

    text = ",\n".join(f"{json.dumps(part)}: {{\n{lines(described[part])}\n}}" for part in described)
    (folder / f"{name}.json").write_text("{" + text + "}\n", encoding="ascii")
    np.savez_compressed(folder / f"{name}.npz", **arrays)


if __name__ == "__main__":
    torch.set_num_threads(1)  # one order of additions
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or NAMES:
        described, arrays = make(name)
        write(name, described, arrays)
        logits = arrays["logits"]
        kept = (FOLDER / f"{name}.npz").stat().st_size
        print(f"{name:24} {kept:6} bytes, logits within ±{np.abs(logits).max():.1f}, standard deviation {logits.std():.2f}, "
              f"residual within ±{np.abs(arrays['resid']).max():.1f}, {(arrays['greedy'][:, 0] >= 0).sum()} continuations")  # fmt: skip
    total = sum(file.stat().st_size for file in FOLDER.iterdir())
    print(f"{total / 1e6:.2f} MB of golden files")
