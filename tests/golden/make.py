"""Makes the files beside it: what transformers computes, for `make test`, which has no torch.

Run it after `make parity` has made the environment (transformers, torch and accelerate; a few minutes, no network once
SmolLM2 is in the cache):

    .venv/bin/python tests/golden/make.py

For every tiny model it writes NAME.gguf, as llama.cpp's converter would, with random weights; NAME.npz, what
transformers computes with the same weights in float32; and NAME.json, token ids. The file of the real model is
smollm2-135m.json. `tests/test_golden.py` reads them all.
"""

import copy
import json
import pathlib
import sys
from typing import NamedTuple

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parity"))
from parity_texts import CHATS, PROMPTS, TEXTS, varied_strings  # noqa: E402
from write_gguf import permute  # noqa: E402

import jaxemo  # noqa: E402

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PRE = {
    "gpt-2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)
VOCAB, LENGTHS, NEW_TOKENS, MAX_POSITIONS = 300, (13, 1, 8, 16), 16, 64


class Tiny(NamedTuple):
    D: int
    L: int
    N: int
    K: int
    H: int
    F: int
    theta: float
    eps: float
    tied: bool
    stored: dict[str, Type]  # by GGUF tensor name without layer; "" for the rest; norms are always float32
    file_type: gguf.LlamaFileType
    pre: str


TINY = {
    "gqa_tied": Tiny(32, 3, 4, 2, 8, 48, 1e4, 1e-5, True, {"": Type.F32}, gguf.LlamaFileType.ALL_F32, "smollm"),
    "mha_untied": Tiny(48, 2, 6, 6, 8, 64, 1e6, 1e-6, False, {"": Type.F16}, gguf.LlamaFileType.MOSTLY_F16, "gpt-2"),
    "wide_heads": Tiny(40, 2, 4, 1, 16, 56, 500.0, 1e-2, True, {"": Type.BF16}, gguf.LlamaFileType.MOSTLY_BF16, "smollm"),
    "quantised": Tiny(64, 2, 4, 2, 16, 96, 1e4, 1e-5, False,
                      {"": Type.Q4_0, "token_embd": Type.Q8_0, "output": Type.Q8_0, "attn_v": Type.Q8_0},
                      gguf.LlamaFileType.MOSTLY_Q4_0, "smollm"),
}  # fmt: skip


def build(tiny: Tiny, seed: int) -> transformers.LlamaForCausalLM:
    """A random model, far from degenerate: logits of size 5, attention that is not flat, gains that are not one."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=tiny.D, num_hidden_layers=tiny.L, num_attention_heads=tiny.N, head_dim=tiny.H,
        num_key_value_heads=tiny.K, intermediate_size=tiny.F, rms_norm_eps=tiny.eps, tie_word_embeddings=tiny.tied,
        rope_parameters={"rope_type": "default", "rope_theta": tiny.theta}, max_position_embeddings=MAX_POSITIONS,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        weight.requires_grad_(False)
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
    return model


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write(path: pathlib.Path, tiny: Tiny, model, tokenizer: Tokenizer) -> None:
    """The GGUF file. The model's weights become what was stored: rounded or quantised."""
    out = gguf.GGUFWriter(path, "llama")
    out.add_type("model")
    out.add_name(f"jaxemo test {path.stem}")
    out.add_block_count(tiny.L)
    out.add_context_length(MAX_POSITIONS)
    out.add_embedding_length(tiny.D)
    out.add_feed_forward_length(tiny.F)
    out.add_head_count(tiny.N)
    out.add_head_count_kv(tiny.K)
    out.add_rope_freq_base(tiny.theta)
    out.add_layer_norm_rms_eps(tiny.eps)
    if tiny.H != tiny.D // tiny.N:
        out.add_key_length(tiny.H)
        out.add_value_length(tiny.H)
    out.add_file_type(tiny.file_type)
    out.add_vocab_size(VOCAB)
    out.add_rope_dimension_count(tiny.H)
    spec = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    unused = [f"[PAD{i}]" for i in range(len(tokens), VOCAB)]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(tiny.pre)
    out.add_token_list(tokens + unused)
    out.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens]
                        + [gguf.TokenType.UNUSED] * len(unused))  # fmt: skip
    out.add_token_merges([" ".join(pair) for pair in spec["merges"]])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_pad_token_id(2)
    out.add_add_bos_token(False)
    out.add_chat_template(TEMPLATE)
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, weight in model.named_parameters():
        stem = name.removesuffix(".weight")
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        kind = Type.F32 if "norm" in stem else tiny.stored.get(NAMES[stem], tiny.stored[""])
        w = weight.numpy()
        weight.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(w, kind), kind)))
        heads = {"attn_q": tiny.N, "attn_k": tiny.K}.get(NAMES[stem])
        data = gguf.quantize(permute(w, heads) if heads else w, kind)
        out.add_tensor(f"{prefix}{NAMES[stem]}.weight", data, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def activations(model, ids: list[int]) -> dict[str, np.ndarray]:
    """Logits `[T, V]`; what enters the first block `[T, D]`; attention, MLP and residual stream `[L, T, D]`."""
    got: dict[str, list] = {"embed": [], "attn_out": [], "mlp_out": [], "resid_post": []}
    decoder = model.model
    sites = [("embed", decoder.embed_tokens)]
    for block in decoder.layers:
        sites += [("attn_out", block.self_attn), ("mlp_out", block.mlp), ("resid_post", block)]
    hooks = [
        module.register_forward_hook(
            lambda _m, _i, out, site=site: got[site].append((out[0] if isinstance(out, tuple) else out)[0].numpy())
        )
        for site, module in sites
    ]
    logits = model(torch.tensor([ids])).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    return {"logits": logits, "embed": got.pop("embed")[0], **{site: np.stack(parts) for site, parts in got.items()}}


def greedy(model, ids: list[int], count: int, stop=None) -> tuple[list[int], float]:
    """The greedy continuation up to a stop token, and how close its closest call was (best logit minus second)."""
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                         max_new_tokens=count, eos_token_id=stop, output_logits=True, return_dict_in_generate=True)  # fmt: skip
    best = torch.stack(out.logits)[:, 0].topk(2).values
    tokens = out.sequences[0, len(ids) :].tolist()
    end = next((i for i, token in enumerate(tokens) if token in (stop or ())), len(tokens))
    return tokens[:end], float((best[:, 0] - best[:, 1]).min())


def oracle(path: pathlib.Path, pre: str):
    """transformers' tokenizer of a GGUF file, with the pre-tokenizer that transformers does not read from it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = copy.deepcopy(PRE[pre])
    return tokenizer


def token_ids(tokenizer, strings, chats) -> dict:
    """{"strings": [[text, ids]], "chats": [[chat, add_generation_prompt, rendered, ids]]}"""
    rows = []
    for chat in chats:
        for prompt in (True, False):
            rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            rows.append([chat, prompt, rendered, ids])
    return {"strings": [[s, tokenizer(s, add_special_tokens=False).input_ids] for s in strings], "chats": rows}


def save(path: pathlib.Path, value: dict) -> None:
    """JSON, one row a line."""

    def line(v):
        return json.dumps(v, separators=(",", ":"))

    parts = [f"{line(key)}: [\n" + ",\n".join(line(row) for row in rows) + "\n]" for key, rows in value.items()]
    path.write_text("{" + ",\n".join(parts) + "}\n", encoding="ascii")


def make_tiny(name: str, tiny: Tiny, seed: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE[tiny.pre]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 2, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    tokenizer.train_from_iterator(list(TEXTS.values())[seed::2], trainer)  # each model with its own vocabulary
    model = build(tiny, seed)
    path = HERE / f"{name}.gguf"
    write(path, tiny, model, tokenizer)

    again = transformers.AutoModelForCausalLM.from_pretrained(HERE, gguf_file=path.name, dtype=torch.float32)
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[key]), f"transformers reads another {key} from {path.name}"

    rng = np.random.default_rng(seed)
    rows, continued = [], []
    while len(rows) < len(LENGTHS):
        ids = rng.integers(0, VOCAB, LENGTHS[len(rows)]).tolist()
        tokens, closest = greedy(model, ids, NEW_TOKENS)
        if closest > 1e-3:  # ten times the bound on logits: no rounding changes a token
            rows.append(ids)
            continued.append(tokens)
    arrays = {"ids": np.concatenate(rows).astype(np.int16), "lengths": np.array(LENGTHS, np.int16)}
    got = [activations(model, ids) for ids in rows]
    for site in got[0]:  # the rows' tokens one after another: no padding is stored
        arrays[site] = np.concatenate([row[site] for row in got], axis=-2)
    arrays["greedy"] = np.array(continued, np.int16)
    np.savez_compressed(HERE / f"{name}.npz", **arrays)
    strings = [s for s in varied_strings()[::40] if len(s) < 200] + ["Hello there  42 times,  and   7!"]
    save(HERE / f"{name}.json", token_ids(oracle(path, tiny.pre), strings, CHATS[:6]))


def make_real(name: str) -> None:
    path = jaxemo.checkpoints.pull(name)
    tokenizer = oracle(path, "smollm")
    found = token_ids(tokenizer, [s for s in varied_strings() if len(s) < 400][::8], CHATS)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found["last_logits"] = []  # [name, token ids of the text, the ten best tokens after it, their logits]
    for text in ("sentence", "german", "chinese_japanese", "chat"):
        ids = tokenizer(TEXTS[text]).input_ids
        best = model(torch.tensor([ids])).logits[0, -1].topk(10)
        found["last_logits"].append([text, ids, best.indices.tolist(), [round(v, 6) for v in best.values.tolist()]])
    found["greedy"] = []  # [prompt, greedy continuation up to a stop token]
    for prompt in (PROMPTS[0], PROMPTS[2], PROMPTS[5], PROMPTS[8]):
        ids = (tokenizer(prompt).input_ids if isinstance(prompt, str) else
               tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))  # fmt: skip
        tokens, closest = greedy(model, ids, 32, stop=[0, 2])
        assert closest > 5e-3, f"{prompt!r} comes as close as {closest:.1e} to another token: choose another"
        found["greedy"].append([prompt, tokens])
    save(HERE / f"{name}.json", found)


if __name__ == "__main__":
    torch.set_num_threads(1)  # one order of additions
    with torch.inference_mode():
        for seed, (name, tiny) in enumerate(TINY.items()):
            make_tiny(name, tiny, seed)
        make_real("smollm2-135m")
    total = sum(file.stat().st_size for file in HERE.iterdir() if file.suffix in (".gguf", ".npz", ".json"))
    print(f"{total / 1e6:.2f} MB of golden files")
