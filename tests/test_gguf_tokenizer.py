"""Tokenizers from GGUF vocabularies against sentencepiece, transformers and llama.cpp (tests/golden/make_tokenizers.py)."""

import itertools
import json
import pathlib
import unicodedata

import numpy as np
import pytest
from jaxemo.checkpoints import CheckpointError, registry
from jaxemo.checkpoints.gguf import open_gguf
from jaxemo.checkpoints.gguf_tokenizer import PRE_TYPES, build_tokenizer
from tokenizers import pre_tokenizers

GOLDEN = pathlib.Path(__file__).parent / "golden"
MADE = json.loads((GOLDEN / "tokenizers.json").read_text())
# The same rules under another name.
ALIASES = {"phi-2": "gpt-2", "starcoder": "smollm", "refact": "smollm", "smaug-bpe": "dbrx", "chatglm-bpe": "dbrx",
           "glm4": "dbrx", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "pixtral": "llama-bpe",
           "lfm2": "llama-bpe", "megrez": "qwen2", "deepseek-r1-qwen": "stablelm2", "llama4": "gpt-4o"}  # fmt: skip


def meta_of(case: str, **changes) -> dict:
    """The metadata of a golden case; `changes` to keys under `tokenizer.ggml.`, None to leave one out."""
    name = MADE["cases"][case]["vocabulary"]
    held = MADE["vocabularies"][name]
    meta = {"model": "gpt2", "pre": case, "merges": held["merges"]} if name == "gpt2" else {
        "model": "llama", "scores": np.array(held["scores"], np.float32), "add_space_prefix": held["space_prefix"],
        "unknown_token_id": 0}  # fmt: skip
    meta |= {"tokens": held["tokens"], "token_type": np.array(held["kinds"], np.int32), "bos_token_id": 1,
             "eos_token_id": 2, "add_bos_token": False, **changes}  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in meta.items() if value is not None}


def small(tokens, kinds=None, **changes) -> dict:
    """A SentencePiece-style vocabulary of `<unk> <s> </s>` and `tokens`, better ones first."""
    tokens = ["<unk>", "<s>", "</s>", *tokens]
    kinds = [2, 3, 3, *(kinds or [1] * (len(tokens) - 3))]
    meta = {"model": "llama", "tokens": tokens, "scores": [-float(i) for i in range(len(tokens))], "token_type": kinds,
            "add_space_prefix": False, **changes}  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in meta.items() if value is not None}


@pytest.mark.parametrize("case", MADE["cases"])
def test_ids_are_those_of_the_models_own_tokenizers(case):
    tokenizer = build_tokenizer("x", meta_of(case))
    for text, ids in zip(MADE["texts"], MADE["cases"][case]["ids"], strict=True):
        assert tokenizer.encode(text) == ids, ascii(text)
        composed = case in PRE_TYPES and PRE_TYPES[case].nfc
        if "<s>" not in text or case not in ("prefixed", "plain"):  # a space is put after those special tokens
            decoded = tokenizer.decode(ids, skip_special=False)
            assert decoded == (unicodedata.normalize("NFC", text) if composed else text), ascii(text)


def test_the_texts_tell_all_rules_apart_and_every_name_is_covered():
    for a, b in itertools.combinations(set(MADE["cases"]) & set(PRE_TYPES), 2):
        same = MADE["cases"][a]["ids"] == MADE["cases"][b]["ids"]
        assert not same or {a, b} == {"llama-bpe", "dbrx"}, (
            a,
            b,
        )  # these differ in ignore_merges and add_bos, see below
    assert PRE_TYPES.keys() == {*MADE["cases"], *ALIASES} - {"prefixed", "plain"}
    for name, other in ALIASES.items():
        assert PRE_TYPES[name] == PRE_TYPES[other], name


def test_a_piece_that_is_a_token_stays_whole_where_merges_are_ignored():
    tokens = ["a", "b", "c", "ab", "abc"]
    meta = {"tokens": tokens, "token_type": [1] * 5, "merges": ["a b"], "add_bos_token": False}
    ids = {pre: build_tokenizer("x", meta_of("dbrx", pre=pre, **meta)).encode("abc") for pre in ("llama-bpe", "dbrx")}
    assert ids == {"llama-bpe": [4], "dbrx": [3, 2]}


def test_gemma_3_is_tokenized_as_by_transformers():
    name = "gemma-3-270m"
    if name not in registry.REGISTRY or not registry.path_of(name).exists():
        pytest.skip(f"{name} is not in the cache ({registry.cache_dir()}); `jaxemo pull {name}` fetches it")
    tokenizer = build_tokenizer(name, open_gguf(registry.path_of(name)).meta)
    golden = json.loads((GOLDEN / "gemma-3-270m-tokens.json").read_text())
    assert tokenizer.prefix == (2,) and tokenizer.bos == 2 and tokenizer.stop_ids == (1, 106)
    for text, ids in zip(golden["texts"], golden["ids"], strict=True):
        assert tokenizer.encode(text) == [2, *ids], ascii(text)


def test_gemmas_runs_of_spaces_are_merged_and_other_models_are_matched():
    tokens, kinds = ["▁", "x", "▁x", "  ", "   "], [1, 1, 1, 4, 4]
    gemma = build_tokenizer("x", small(tokens, kinds, add_bos_token=False) | {"general.architecture": "gemma3"})
    other = build_tokenizer("x", small(tokens, kinds, add_bos_token=False) | {"general.architecture": "llama"})
    assert [gemma.encode(" " * n + "x") for n in (1, 2, 4)] == [[5], [6, 4], [6, 6, 4]]
    assert [other.encode(" " * n + "x") for n in (1, 2, 4)] == [[5], [6, 4], [7, 5]]
    assert all(model.decode(model.encode("    x")) == "    x" for model in (gemma, other))


def test_the_best_score_merges_first_and_the_rest_falls_back_to_bytes():
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens, kinds = ["ab", "bc", "a", "b", "c", *bytes_], [1] * 5 + [6] * 256
    tokenizer = build_tokenizer("x", small(tokens, kinds))
    assert tokenizer.encode("abc") == [1, 3, 7]  # text begins with <s> where the metadata say nothing
    assert tokenizer.encode("é")[1:] == [8 + 0xC3, 8 + 0xA9] and tokenizer.decode([8 + 0xC3, 8 + 0xA9]) == "é"
    scores = [0.0, 0.0, 0.0, -2.0, -1.0, *[-3.0] * 259]
    assert build_tokenizer("x", small(tokens, kinds, scores=scores)).encode("abc") == [1, 5, 4]
    assert build_tokenizer("x", small(["a"])).encode("aéé")[1:] == [3, 0]  # without bytes, <unk>, once


def test_listed_merges_of_gemma_4_run_over_text_with_its_spaces_marked():
    tokens = ["a", "b", "▁", "▁a", "▁ab", "\n", "\n\n"]
    meta = small(
        tokens, model="gemma4", merges=["▁ a", "▁a b", "\n \n"], scores=None, bos_token_id=1, unknown_token_id=0
    )
    assert build_tokenizer("x", meta).encode("a ab\n\n") == [1, 3, 7, 9]


def test_white_space_after_phi_3s_special_tokens_is_theirs():
    meta = small(["<|user|>", "h", "i", "\n"], [3, 1, 1, 1], add_bos_token=False)
    assert build_tokenizer("x", meta | {"general.architecture": "phi3"}).encode("<|user|>\nhi") == [3, 4, 5]
    assert build_tokenizer("x", meta | {"general.architecture": "llama"}).encode("<|user|>\nhi") == [3, 6, 4, 5]


def test_a_byte_level_text_begins_with_a_space_where_the_metadata_say_so():
    """As ByteLevel(add_prefix_space=True) does it; the other pre-tokenizers cannot say it themselves."""
    ours = build_tokenizer("x", meta_of("gpt-2", add_space_prefix=True)).backend
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    for text in MADE["texts"]:
        got = ours.pre_tokenizer.pre_tokenize_str(ours.normalizer.normalize_str(text))
        assert [piece for piece, _ in got] == [piece for piece, _ in theirs.pre_tokenize_str(text)], ascii(text)


@pytest.mark.parametrize("pre, adds", [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)])
def test_texts_begin_with_bos_where_the_pre_type_says_so_and_the_metadata_do_not(pre, adds):
    assert bool(build_tokenizer("x", meta_of(pre, add_bos_token=None)).prefix) == adds
    assert not build_tokenizer("x", meta_of(pre, add_bos_token=False)).prefix


def test_what_ends_an_answer():
    ends = ["<|end|>", "<|return|>", "<|call|>", "<|eot_id|>", "<eos>", "<other>", "a", "</p>"]
    kinds = [3] * 6 + [1, 4]
    ids = dict(zip(ends, range(3, 11), strict=True))

    def stops(**changes):
        tokenizer = build_tokenizer("x", small(ends, kinds, **changes))
        return {tokenizer.backend.id_to_token(i) for i in tokenizer.stop_ids}

    named = {"<|return|>", "<|call|>", "<|eot_id|>", "<eos>", "</s>"}
    assert stops() == named  # with <|return|> and <|call|>, <|end|> only ends a message
    assert stops(eos_token_id=ids["<other>"]) == named | {"<other>"}
    assert stops(eot_token_id=ids["a"], eom_token_id=ids["</p>"]) == named | {"a", "</p>"}
    assert build_tokenizer("x", small(["<|end|>"], [3])).stop_ids == (2, 3)


BPE = meta_of("gpt-2")["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    "case, changes, words",
    [
        ("gpt-2", {"model": "t5"}, ["'t5'", "gpt2, llama"]),
        ("gpt-2", {"model": "bert"}, ["'bert'"]),
        ("gpt-2", {"model": "rwkv"}, ["'rwkv'"]),
        ("gpt-2", {"model": "plamo2"}, ["'plamo2'"]),
        ("gpt-2", {"model": 5}, ["tokenizer.ggml.model", "type"]),
        ("gpt-2", {"pre": "default"}, ["pre-type 'default'"]),
        ("gpt-2", {"pre": None}, ["tokenizer.ggml.pre is missing"]),
        ("gpt-2", {"merges": None}, ["tokenizer.ggml.merges is missing"]),
        ("gpt-2", {"merges": ["a b", "zzz yyy"]}, ["'zzz yyy'"]),
        ("gpt-2", {"merges": ["ab"]}, ["'ab'"]),
        ("gpt-2", {"merges": ["a b c"]}, ["'a b c'"]),
        ("gpt-2", {"merges": [3]}, ["merge 3"]),
        ("gpt-2", {"tokens": None}, ["tokenizer.ggml.tokens is missing"]),
        ("gpt-2", {"tokens": []}, ["tokenizer.ggml.tokens"]),
        ("gpt-2", {"tokens": [*BPE[:-1], BPE[0]]}, ["twice", ascii(BPE[0])]),
        ("gpt-2", {"token_type": [1, 1]}, [f"{len(BPE)} tokens", "[2]"]),
        ("gpt-2", {"token_type": [1.5] * len(BPE)}, ["token types"]),
        ("gpt-2", {"token_type": [6] + [1] * (len(BPE) - 1)}, ["[6]"]),
        ("gpt-2", {"token_type": [9] + [1] * (len(BPE) - 1)}, ["[9]"]),
        ("gpt-2", {"bos_token_id": len(BPE)}, ["bos_token_id"]),
        ("gpt-2", {"eos_token_id": -5}, ["eos_token_id"]),
        ("gpt-2", {"eos_token_id": "2"}, ["eos_token_id"]),
        ("gpt-2", {"add_bos_token": 1}, ["add_bos_token"]),
        ("gpt-2", {"add_bos_token": True, "bos_token_id": None}, ["bos_token_id"]),
        ("gpt-2", {"add_eos_token": True}, ["add_eos_token"]),
        ("plain", {"remove_extra_whitespaces": True}, ["remove_extra_whitespaces"]),
        ("plain", {"scores": None}, ["tokenizer.ggml.scores is missing"]),
        ("plain", {"scores": [1.0]}, ["scores"]),
        ("plain", {"unknown_token_id": 1000}, ["unknown_token_id", "1000"]),
        (
            "plain",
            {"tokens": ["x" * 300, *map(str, range(999))], "token_type": [1] * 1000},
            ["token 0", "300 characters"],
        ),
        ("plain", {"scores": np.full(1000, np.nan)}, ["scores"]),
    ],
)
def test_what_is_not_understood_is_refused_by_name(case, changes, words):
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer("some.gguf", meta_of(case, **changes))
    assert str(caught.value).startswith("some.gguf: ")
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_chat_template_is_taken_along_and_must_be_text():
    meta = meta_of("gpt-2")
    assert build_tokenizer("x", meta).chat_template is None
    assert build_tokenizer("x", meta | {"tokenizer.chat_template": "{{ 1 }}"}).chat_template == "{{ 1 }}"
    with pytest.raises(CheckpointError, match="chat_template"):
        build_tokenizer("x", meta | {"tokenizer.chat_template": ["{{ 1 }}"]})
