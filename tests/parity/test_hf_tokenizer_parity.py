"""Tokenizers of model directories against transformers, which reads the same directories."""

import json

import pytest
import transformers
from hf_tokenizers import STYLES, save
from jaxemo.checkpoints import huggingface
from parity_texts import CHATS, varied_strings

# The class that published models of the style name. transformers builds its own backend for these, and does not read
# all of tokenizer.json. LlamaTokenizer is left out: see the last test.
CLASSES = {"qwen2": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer", "gemma": "GemmaTokenizer"}


def edit(path, **changes):
    table = json.loads(path.read_text()) if path.is_file() else {}
    table = {key: value for key, value in {**table, **changes}.items() if value is not ...}
    path.write_text(json.dumps(table))


def compare(folder, peer, texts=None):
    mine = huggingface.tokenizer(folder)
    strings = (varied_strings() if texts is None else texts) + sorted(
        t.content for t in peer.added_tokens_decoder.values()
    )
    for text in strings:
        ids = peer(text).input_ids
        assert mine.encode(text) == ids, ascii(text)
        assert mine.decode(ids, skip_special=False) == peer.decode(ids, clean_up_tokenization_spaces=False), ascii(text)
        assert mine.decode(ids) == peer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert mine.eos == peer.eos_token_id
    for chat in CHATS if peer.chat_template else []:
        for prompt in (True, False):
            text = peer.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
            ids = peer.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            assert mine.render(chat, add_generation_prompt=prompt) == text
            assert mine.encode_chat(chat, add_generation_prompt=prompt) == ids
    return mine, len(strings)


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_chats(tmp_path, style):
    save(style, tmp_path)
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    mine, n = compare(tmp_path, peer)
    assert mine.bos == peer.bos_token_id
    compare(tmp_path, transformers.AutoTokenizer.from_pretrained(tmp_path), varied_strings()[::7])
    begins = [peer.convert_ids_to_tokens(i) for i in mine.encode("")]
    print(f"\n{style}: {n} strings and {len(CHATS)} chats identical; texts begin with {begins}")


@pytest.mark.parametrize("style", CLASSES)
def test_the_class_that_published_models_name(tmp_path, style):
    save(style, tmp_path)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class=CLASSES[style])
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(peer).__name__ == CLASSES[style]
    _, n = compare(tmp_path, peer)
    print(f"\n{CLASSES[style]}: {n} strings identical")


def test_end_from_config_alone(tmp_path):
    """GPT-2's tokenizer_config.json names no token."""
    save("gpt2", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    mine, _ = compare(tmp_path, peer)
    assert mine.stop_ids == (peer.eos_token_id,)


def test_files_of_older_versions(tmp_path):
    """Special tokens in tables beside tokenizer.json, some of them only there; several named templates in a list."""
    save("qwen2", tmp_path)
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text())
    table = {str(t.pop("id")): t for t in [dict(t) for t in state["added_tokens"]]}
    state["added_tokens"] = state["added_tokens"][:2]
    path.write_text(json.dumps(state))
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": template}]
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=table, chat_template=named, add_bos_token=True,
         additional_special_tokens=["<|im_start|>"], tokenizer_class="PreTrainedTokenizerFast")  # fmt: skip
    mine, _ = compare(tmp_path, transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert mine.encode("<|im_end|>") == [mine.eos]


def test_special_tokens_map(tmp_path):
    """Tokens named there become special though tokenizer.json has them as ordinary ones of its vocabulary."""
    save("llama2", tmp_path)
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] == "<unk>"]
    path.write_text(json.dumps(state))
    edit(tmp_path / "tokenizer_config.json", bos_token=..., eos_token=..., unk_token=..., add_bos_token=False)
    mark = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    edit(tmp_path / "special_tokens_map.json", bos_token={"content": "<s>", **mark}, eos_token={"content": "</s>", **mark},
         unk_token="<unk>")  # fmt: skip
    mine, _ = compare(tmp_path, transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert (mine.bos, mine.eos, mine.prefix) == (1, 2, (1,))


def test_llama_2_is_cut_as_its_file_says(tmp_path):
    """transformers' LlamaTokenizer replaces tokenizer.json's normaliser with one that leaves out some spaces.

    SentencePiece puts a space before a text, whatever it begins with, and so does tokenizer.json (`Prepend`); the class
    does not before one that begins with a space, nor after a special token. What the model was trained on is kept.
    """
    save("llama2", tmp_path)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    peer, mine = transformers.AutoTokenizer.from_pretrained(tmp_path), huggingface.tokenizer(tmp_path)
    assert type(peer).__name__ == "LlamaTokenizer"
    specials = sorted(t.content for t in peer.added_tokens_decoder.values())
    differ = [text for text in varied_strings() if mine.encode(text) != peer(text).input_ids]
    print(f"\n{len(differ)} of {len(varied_strings())} strings differ from transformers' LlamaTokenizer")
    for text in differ:
        assert text.startswith((" ", "▁")) or any(token in text for token in specials), ascii(text)
