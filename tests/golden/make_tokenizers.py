"""Makes tokenizers.json and gemma-3-270m-tokens.json: token ids that others compute from GGUF vocabularies.

It needs, beside what `make parity` installs, sentencepiece and cyllama (llama.cpp) in the environment:

    .venv/bin/python tests/golden/make_tokenizers.py [gemma-3-270m.gguf]

Small vocabularies are trained here and written as llama.cpp's converter would. sentencepiece encodes with its own
models; transformers with the tokenizer classes of the families that have one, else from the GGUF where it heeds the
pre-type; llama.cpp with all others. `tests/test_gguf_tokenizer.py` reads the results.
"""

import io
import json
import pathlib
import sys
import tempfile

import cyllama.llama.llama_cpp as llama_cpp
import gguf
import numpy as np
import sentencepiece
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parity"))
from parity_texts import LICENSE, TEXTS, varied_strings  # noqa: E402

CONTROL, USER_DEFINED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<user>"]
# Merges are learned across words, digits and spaces, so that every difference in how text is cut shows.
CORPUS = [text for text in [*varied_strings(), *TEXTS.values(), *LICENSE.split("\n\n")] if "<|" not in text]
CORPUS += [str(7**n % 10 ** (n % 9 + 1)) for n in range(2000)] + [" " * n + "x" + "\n" * n for n in range(1, 30)] * 5
CORPUS += ["it's they'LL I'Ve WE'D " * 3] * 20 + ["HelloWorld fooBar ABCdef"] * 20
SHORT = [text for text in varied_strings() if 3 < len(text) <= 48 and "\0" not in text]
TELLING = [
    *SHORT[::10], "Cafe\u0301 n\u0303 Å", "সমস্ত মানুষ", "सभी मनुष्य", "It's THEY'LL we'd", "fooBar ABCdef//\n/", "12345678 1234",
    "人人123 すべての ab", "x = [1,\n\n\n    2];\r\n\t\t", "$9.99 ...!!  ?", "naïve Straße ἀρχῇ",
]  # fmt: skip
SPECIAL = ["a<user>b", "<|im_start|>user\nhi <|im_end|>\n", "<s>a</s> b", "<unk>", "<0x41>", "Hello  World's 1234567"]

# Which transformers class each pre-type's family has; True: its reading of the GGUF heeds the pre-type.
CLASSES = {"gpt-2": transformers.GPT2Tokenizer, "olmo": transformers.GPTNeoXTokenizer,
           "command-r": transformers.CohereTokenizer, "qwen2": transformers.Qwen2Tokenizer,
           "qwen35": transformers.models.qwen3_5.tokenization_qwen3_5.Qwen3_5Tokenizer,
           "llama-bpe": True, "dbrx": True, "gpt-4o": True, "tekken": True}  # fmt: skip
OTHERS = ["smollm", "stablelm2", "deepseek-llm", "deepseek-coder", "deepseek-v3"]


def write(path, model: str, pre: str, vocabulary: dict) -> None:
    """A llama of one tiny layer, all zeros, with the vocabulary."""
    writer, D = gguf.GGUFWriter(path, "llama"), 32
    for add in (writer.add_embedding_length, writer.add_context_length, writer.add_feed_forward_length):
        add(D)
    for add in (writer.add_block_count, writer.add_head_count, writer.add_head_count_kv):
        add(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["kinds"])
    if "merges" in vocabulary:
        writer.add_token_merges(vocabulary["merges"])
    else:
        writer.add_token_scores(vocabulary["scores"])
        writer.add_add_space_prefix(vocabulary["space_prefix"])
        writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    shapes = {"token_embd": (len(vocabulary["tokens"]), D), "output_norm": (D,), "blk.0.attn_norm": (D,),
              "blk.0.ffn_norm": (D,)}  # fmt: skip
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}"] = (D, D)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level() -> dict:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [1] * len(tokens) + [3] * len(CONTROL) + [4] * len(USER_DEFINED)
    return {"tokens": tokens + CONTROL + USER_DEFINED, "kinds": kinds, "merges": [" ".join(m) for m in model["merges"]]}


def piecewise(space_prefix: bool, defined: list[str]):
    """A SentencePiece model and its vocabulary; user-defined "▁" are stored as spaces."""
    stored, corpus = io.BytesIO(), [*varied_strings()[:50], *TEXTS.values(), *LICENSE.split("\n\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in corpus for line in text.split("\n") if line.strip()]),
        model_writer=stored, model_type="bpe", vocab_size=1000, byte_fallback=True, character_coverage=0.99,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=space_prefix,
        split_digits=not space_prefix, user_defined_symbols=defined, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_proto=stored.getvalue())
    every = range(model.get_piece_size())
    tokens = [model.id_to_piece(i) for i in every]
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else
             4 if tokens[i] in defined else 1 for i in every]  # fmt: skip
    tokens = [t.replace("▁", " ") if kind == 4 else t for t, kind in zip(tokens, kinds, strict=True)]
    scores = [model.get_score(i) for i in every]
    return model, {"tokens": tokens, "kinds": kinds, "scores": scores, "space_prefix": space_prefix}


def by_llama_cpp(path, texts) -> list[list[int]]:
    model = llama_cpp.LlamaModel(str(path), llama_cpp.LlamaModelParams(), verbose=False)
    vocab = model.get_vocab()  # which lives no longer than the model
    return [list(vocab.tokenize(text, False, True)) for text in texts]


def by_transformers(path, texts) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def by_class(kind, vocabulary, texts) -> list[list[int]]:
    ids = {token: i for i, token in enumerate(vocabulary["tokens"])}
    backend = kind(vocab=ids, merges=[tuple(m.split(" ")) for m in vocabulary["merges"]]).backend_tokenizer
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in USER_DEFINED])
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def main() -> None:
    texts = TELLING + SPECIAL
    plain = [text for text in texts if text not in SPECIAL]  # sentencepiece takes no special token out of a text
    golden: dict = {"texts": texts, "vocabularies": {}, "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "tiny.gguf"
        golden["vocabularies"]["gpt2"] = vocabulary = byte_level()
        for pre in [*CLASSES, *OTHERS]:
            write(path, "gpt2", pre, vocabulary)
            kind = CLASSES.get(pre)
            made = (by_transformers(path, texts) if kind is True else by_class(kind, vocabulary, texts) if kind else
                    by_llama_cpp(path, texts))  # fmt: skip
            golden["cases"][pre] = {"vocabulary": "gpt2", "ids": made}
        for name, prefix, defined in [("prefixed", True, []), ("plain", False, ["<start>", "▁▁", "▁▁▁", "\n", "lic"])]:
            model, golden["vocabularies"][name] = piecewise(prefix, defined)
            write(path, "llama", "default", golden["vocabularies"][name])
            ids = by_llama_cpp(path, texts)
            assert ids[: len(plain)] == [model.encode(text) for text in plain], "sentencepiece and llama.cpp differ"
            golden["cases"][name] = {"vocabulary": name, "ids": ids}
    (HERE / "tokenizers.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    if len(sys.argv) > 1:
        path = pathlib.Path(sys.argv[1])
        texts = ["", *SHORT[::4], " " * 31, "\n" * 31, "<start_of_turn>user\nhi<end_of_turn>\n", "<bos>a<eos>", "▁"]
        made = {"texts": texts, "ids": by_transformers(path, texts)}
        (HERE / "gemma-3-270m-tokens.json").write_text(json.dumps(made, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
