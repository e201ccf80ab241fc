"""Small tokenizers in the style of published ones, each saved by transformers as a model's directory.

`python tests/parity/hf_tokenizers.py` writes `tests/golden/tokenizers`: the directories, and what transformers makes of
a few texts and chats, for the tests that run without it.
"""

import json
import pathlib
import shutil

import transformers
from parity_texts import CHATS, LICENSE, TEXTS, varied_strings
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "tokenizers"
CORPUS = [LICENSE, *TEXTS.values()]

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")  # fmt: skip
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + (m['role'] | replace('assistant', 'model')) + '\n' + "
    "(m['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}"
    "{% endif %}{# {{ pad_token }} #}"
)
LLAMA2_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}{% else %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
GLM4_CHAT = "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def _train(model, alphabet, specials, size, normalizer=None, pre=None):
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre is not None:
        backend.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_level(split=None, specials=(), normalizer=None, size=420, **model):
    """Specials come after the ordinary tokens, as in the published ones."""
    cut = [pre_tokenizers.Split(Regex(split), behavior="isolated")] if split else []
    pre = pre_tokenizers.Sequence([*cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)])
    backend = _train(models.BPE(), pre_tokenizers.ByteLevel.alphabet(), [], size, normalizer, pre)
    state = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    backend.model = models.BPE(vocab=state["vocab"], merges=merges, **model)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return backend


def spaces(specials, normalizer, pre=None, strip=False, size=620):
    """SentencePiece-like: spaces as "▁", and bytes for what the vocabulary lacks."""
    tokens = [*specials, *(f"<0x{b:02X}>" for b in range(256))]
    backend = _train(models.BPE(), [], tokens, size, normalizer, pre)
    state = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    made = Tokenizer(
        models.BPE(vocab=state["vocab"], merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer, made.decoder = (
        normalizer,
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                *([decoders.Strip(" ", 1, 0)] if strip else []),
            ]
        ),
    )
    if pre is not None:
        made.pre_tokenizer = pre
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return made


def begin_with(backend, *tokens):
    return processors.TemplateProcessing(
        single=" ".join([*(f"{t}:0" for t in tokens), "$A:0"]),
        pair=" ".join([*(f"{t}:0" for t in tokens), "$A:0", "$B:1"]),
        special_tokens=[(t, backend.token_to_id(t)) for t in tokens],
    )


def build(style: str):
    """(backend, what PreTrainedTokenizerFast is told, config.json, generation_config.json)."""
    if style == "llama3":
        specials = [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
        ]
        backend = byte_level(LLAMA3_SPLIT, specials, ignore_merges=True)
        processor = [processors.ByteLevel(add_prefix_space=True, trim_offsets=False), begin_with(backend, specials[0])]
        backend.post_processor = processors.Sequence(processor)
        ids = [backend.token_to_id(t) for t in specials]
        told = {"bos_token": specials[0], "eos_token": specials[5], "chat_template": LLAMA3_CHAT}
        return (
            backend,
            told,
            {"model_type": "llama", "bos_token_id": ids[0], "eos_token_id": [ids[1], *ids[4:]]},
            {"eos_token_id": [ids[1], *ids[4:]]},
        )
    if style == "qwen2":
        specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        backend = byte_level(QWEN2_SPLIT, specials, normalizers.NFC())
        backend.add_tokens([AddedToken("<tool_call>", normalized=False, special=False)])
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        told = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
        return backend, told, {"model_type": "qwen2", "bos_token_id": backend.token_to_id(specials[0]),
                               "eos_token_id": backend.token_to_id(specials[2])}, {}  # fmt: skip
    if style == "gpt2":
        backend = byte_level(specials=["<|endoftext|>"])
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        end = backend.token_to_id("<|endoftext|>")
        told = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        return backend, told, {"model_type": "gpt2", "bos_token_id": end, "eos_token_id": end}, {}
    if style == "gemma":
        specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
        pre = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        backend = spaces(specials, normalizers.Replace(" ", "▁"), pre)
        backend.post_processor = begin_with(backend, "<bos>")
        told = {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "chat_template": GEMMA_CHAT,
        }
        return backend, told, {"model_type": "gemma2", "bos_token_id": 2, "eos_token_id": 1}, {"eos_token_id": [1, 6]}
    if style == "llama2":
        specials = ["<unk>", "<s>", "</s>"]
        backend = spaces(
            specials, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), strip=True
        )
        backend.post_processor = begin_with(backend, "<s>")
        told = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": LLAMA2_CHAT}
        return backend, told, {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}, {"eos_token_id": 2}
    assert style == "glm4"
    specials = ["<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"]
    backend = byte_level(LLAMA3_SPLIT, specials)
    backend.post_processor = begin_with(backend, "[gMASK]", "<sop>")
    end = [backend.token_to_id(t) for t in ("<|endoftext|>", "<|user|>")]
    return backend, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": GLM4_CHAT}, {
        "model_type": "glm4", "eos_token_id": end}, {"eos_token_id": end}  # fmt: skip


STYLES = ("llama3", "qwen2", "gpt2", "gemma", "llama2", "glm4")


def save(style: str, folder: pathlib.Path):
    """Write the directory; returns the tokenizer as transformers made it."""
    backend, told, config, generation = build(style)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **told)
    made.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    return made


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    strings = [text for text in varied_strings()[::9] if len(text) < 80]
    for style in STYLES:
        made = save(style, GOLDEN / style)
        path = GOLDEN / style / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")))
        chats = []
        for chat in CHATS if made.chat_template else []:
            text = made.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            ids = made.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            chats.append({"chat": chat, "text": text, "ids": ids})
        texts = [{"text": text, "ids": ids, "decoded": made.decode(ids, clean_up_tokenization_spaces=False)}
                 for text in strings for ids in [made(text).input_ids]]  # fmt: skip
        expected = {"versions": {"transformers": transformers.__version__}, "bos": made.bos_token_id,
                    "eos": made.eos_token_id, "texts": texts, "chats": chats}  # fmt: skip
        (GOLDEN / f"{style}.json").write_text(json.dumps(expected, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
