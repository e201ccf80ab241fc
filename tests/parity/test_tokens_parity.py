"""Token ids and chat templates against transformers."""

import sys
import unicodedata

import pytest
import transformers
from jaxemo.checkpoints import loading, registry
from jaxemo.checkpoints.gguf_tokenizer import PRE_TYPES
from parity_texts import CHATS, varied_strings
from tokenizers import pre_tokenizers


def is_digit(c: str) -> bool:
    return unicodedata.category(c).startswith("N")  # what the Digits pre-tokenizer isolates


def test_token_ids(lm, oracle_tokenizer, peer_tokenizer):
    strings = varied_strings()
    assert len(set(strings)) == len(strings) >= 500
    differ, lossy = [], 0
    for text in strings:
        ids = lm.tokenizer.encode(text)
        assert ids == oracle_tokenizer(text, add_special_tokens=False).input_ids, ascii(text)
        assert ids == oracle_tokenizer(text).input_ids, ascii(text)  # this model adds no tokens of its own
        assert lm.tokenizer.decode(ids, skip_special=False) == oracle_tokenizer.decode(
            ids, clean_up_tokenization_spaces=False
        ), ascii(text)
        lossy += lm.tokenizer.decode(ids, skip_special=False) != text
        if ids != peer_tokenizer(text, add_special_tokens=False).input_ids:
            differ.append(text)
    print(f"\n{len(strings)} strings: ids identical, decoded text identical ({lossy} do not round-trip on either side); "
          f"transformers without the model's pre-tokenizer differs on {len(differ)}")  # fmt: skip
    assert differ, "the strings no longer show the difference that the oracle's pre-tokenizer is there for"
    for text in differ:
        assert any(map(is_digit, text)), ascii(text)


def test_chat_templates(lm, oracle_tokenizer):
    for chat in CHATS:
        for prompt in (True, False):
            text = oracle_tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
            ids = oracle_tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            assert lm.tokenizer.render(chat, add_generation_prompt=prompt) == text
            assert lm.tokenizer.encode_chat(chat, add_generation_prompt=prompt) == ids
    print(f"\n{len(CHATS)} chats: text and ids identical, with and without the generation prompt")


def test_split_of_every_character(lm, smollm_pre_tokenizer):
    """Our Regex cuts as ByteLevel(use_regex=True) does, next to a letter, digit, sign, apostrophe and white space."""
    theirs = {"gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True), "smollm": smollm_pre_tokenizer}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ours = {name: pre_tokenizers.Sequence([*PRE_TYPES[name].cut, byte_level]) for name in theirs}
    # Every assigned character but surrogates, which are no text, and a few private and unassigned ones.
    characters = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    characters += ["\u0378", "\ue000", "\U0010ffff"]
    for name in ours:
        for c in characters:
            text = f"a{c} {c}7{c}{c}!{c}  {c}'{c}\n{c}\t's{c}"
            assert ours[name].pre_tokenize_str(text) == theirs[name].pre_tokenize_str(text), (name, ascii(text))
    assert str(lm.tokenizer.backend.pre_tokenizer) == str(ours["smollm"])
    spaces = [c for c in characters if c.isspace() or unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf")]
    for name in ours:
        for a in spaces:
            for b in spaces:
                text = f"x{a}{b}y{b}{a}{b} 1{a}{a}"
                assert ours[name].pre_tokenize_str(text) == theirs[name].pre_tokenize_str(text), (name, ascii(text))
    print(f"\n{len(characters)} characters, and all pairs of {len(spaces)} spaces and control characters, split alike")


def test_token_ids_of_gemma():
    """A SentencePiece-style vocabulary, whose GGUF transformers reads as it should."""
    if not registry.path_of("gemma-3-270m").exists():
        pytest.skip("Gemma's terms are not accepted here: `jaxemo pull gemma-3-270m --accept-terms`")
    path = registry.pull("gemma-3-270m")
    _, tokenizer = loading.open_model(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    strings = varied_strings()
    for text in strings:
        ids = tokenizer.encode(text)
        assert ids == theirs(text).input_ids, ascii(text)
        assert tokenizer.decode(ids, skip_special=False) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    print(f"\n{len(strings)} strings: ids and decoded text identical")
