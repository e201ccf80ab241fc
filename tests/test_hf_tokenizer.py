"""Tokenizers of model directories: what transformers made of the same texts, and damaged files refused by name."""

import json
import pathlib
import random
import shutil

import pytest
from jaxemo.checkpoints import CheckpointError, huggingface

GOLDEN = pathlib.Path(__file__).parent / "golden" / "tokenizers"  # by tests/parity/hf_tokenizers.py
STYLES = sorted(path.stem for path in GOLDEN.glob("*.json"))
# What ends an answer: the end of the text, and of a turn.
ENDS = {
    "gemma": ["<eos>", "<end_of_turn>"], "glm4": ["<|endoftext|>", "<|user|>"], "gpt2": ["<|endoftext|>"],
    "llama2": ["</s>"], "llama3": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "qwen2": ["<|endoftext|>", "<|im_end|>"],
}  # fmt: skip


def edit(path, **changes):
    table = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({k: v for k, v in {**table, **changes}.items() if v is not ...}))


@pytest.fixture
def folder(tmp_path):
    """A copy of a directory in the style of Llama 3, to change."""
    return pathlib.Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "model"))


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        huggingface.tokenizer(folder)
    for word in (str(folder), *words):
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_chats_are_those_of_transformers(style):
    tokenizer = huggingface.tokenizer(GOLDEN / style)
    expected = json.loads((GOLDEN / f"{style}.json").read_text(encoding="utf-8"))
    assert len(expected["texts"]) > 50 and tokenizer.bos == expected["bos"] and tokenizer.eos == expected["eos"]
    for row in expected["texts"]:
        assert tokenizer.encode(row["text"]) == row["ids"], ascii(row["text"])
        assert tokenizer.decode(row["ids"], skip_special=False) == row["decoded"]
    for row in expected["chats"]:
        assert tokenizer.render(row["chat"]) == row["text"] and tokenizer.encode_chat(row["chat"]) == row["ids"]
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.stop_ids] == ENDS[style]


def test_a_directory_without_a_tokenizer_has_none(folder):
    (folder / "tokenizer.json").unlink()
    assert huggingface.tokenizer(folder) is None
    assert "no tokenizer.json" in huggingface.no_tokenizer(folder)
    (folder / "tokenizer.model").touch()
    assert huggingface.tokenizer(folder) is None
    assert str(folder / "tokenizer.model") in huggingface.no_tokenizer(folder)


def test_template_of_each_place(folder):
    path, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    edit(settings, chat_template="of the settings")
    edit(folder / "chat_template.json", chat_template="of the table")
    assert "start_header_id" in huggingface.tokenizer(folder).chat_template
    path.unlink()
    assert huggingface.tokenizer(folder).chat_template == "of the settings"
    edit(settings, chat_template=[{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}])
    assert huggingface.tokenizer(folder).chat_template == "b"
    edit(settings, chat_template=...)
    assert huggingface.tokenizer(folder).chat_template == "of the table"
    (folder / "chat_template.json").unlink()
    tokenizer = huggingface.tokenizer(folder)
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.render([{"role": "user", "content": "x"}])


def test_other_special_tokens_are_given_to_the_template(folder):
    edit(folder / "tokenizer_config.json", pad_token={"content": "<|eot_id|>"})
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ pad_token }}{{ messages[0]['content'] }}{{ eos_token }}"
    )
    chat = [{"role": "user", "content": "x"}]
    assert huggingface.tokenizer(folder).render(chat) == "<|begin_of_text|><|eot_id|>x<|eot_id|>"


def test_ends_are_gathered_from_every_file(folder):
    edit(folder / "config.json", eos_token_id=3, text_config={"eos_token_id": [5]})
    edit(folder / "generation_config.json", eos_token_id=[7, 9])
    tokenizer = huggingface.tokenizer(folder)
    assert {3, 5, 7, 9, tokenizer.eos} < set(tokenizer.stop_ids)
    for wrong in ("2", -1, [True], 2**31, {"a": 1}):
        edit(folder / "generation_config.json", eos_token_id=wrong)
        refused(folder, "generation_config.json", "eos_token_id")


def test_harmony_ends_with_the_answer_and_not_with_a_message(folder):
    state = json.loads((folder / "tokenizer.json").read_text())
    names = iter(["<|return|>", "<|call|>", "<|end|>"])
    for token in state["added_tokens"][1:4]:
        token["content"] = next(names)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = huggingface.tokenizer(folder)
    tokens = [tokenizer.backend.id_to_token(i) for i in tokenizer.stop_ids]
    assert {"<|return|>", "<|call|>"} <= set(tokens)
    edit(folder / "config.json", eos_token_id=...)
    edit(folder / "generation_config.json", eos_token_id=...)
    tokenizer = huggingface.tokenizer(folder)
    assert "<|end|>" not in [tokenizer.backend.id_to_token(i) for i in tokenizer.stop_ids]


def test_truncation_and_padding_of_the_file_do_nothing(folder):
    edit(folder / "tokenizer.json",
         truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
         padding={"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                  "pad_token": "!"})  # fmt: skip
    text = "one two three four five six seven eight"
    assert huggingface.tokenizer(folder).encode(text) == huggingface.tokenizer(GOLDEN / "llama3").encode(text)


def test_files_that_are_not_understood_are_refused(folder):
    settings = folder / "tokenizer_config.json"
    token = {"content": "<|eot_id|>", "special": True}
    for table, words in [
        ({"3": token}, "'<|eot_id|>' is token 3"),
        ({"x": token}, "not a table from token ids"),
        ([1], "not a table from token ids"),
        ({"900": {**token, "content": "<new>"}}, "'<new>' is token 900"),
        ({"3": {"content": 7}}, "does not describe a token"),
        ({"3": {**token, "lstrip": "yes"}}, "does not describe a token"),
    ]:
        edit(settings, added_tokens_decoder=table)
        refused(folder, "tokenizer_config.json", words)
    edit(settings, added_tokens_decoder=..., chat_template=7)
    (folder / "chat_template.jinja").unlink()
    refused(folder, "tokenizer_config.json", "chat_template")
    settings.write_text('{"a": 1, "a": 2}')
    refused(folder, "tokenizer_config.json", "'a' stands there twice")
    settings.write_text('{"a": ' + "[" * 100_000)
    refused(folder, "tokenizer_config.json")
    settings.write_text('{"a": ' + "[" * 40 + "]" * 40 + "}")
    refused(folder, "tokenizer_config.json", "deep")


def test_tokens_after_a_text_are_refused(folder):
    state = json.loads((folder / "tokenizer.json").read_text())
    template = state["post_processor"]["processors"][1]
    template["single"].append(template["single"].pop(0))
    (folder / "tokenizer.json").write_text(json.dumps(state))
    refused(folder, "tokenizer.json", "only tokens before a text")


def test_a_text_that_begins_with_another_token_than_bos_is_refused(folder):
    edit(folder / "tokenizer_config.json", bos_token="<|eom_id|>")
    refused(folder, "begin with '<|begin_of_text|>'", "bos_token is '<|eom_id|>'")
    edit(folder / "tokenizer_config.json", bos_token=...)
    tokenizer = huggingface.tokenizer(folder)
    assert tokenizer.bos == tokenizer.encode("x")[0] == huggingface.tokenizer(GOLDEN / "llama3").bos


def test_a_damaged_tokenizer_is_refused(folder):
    """Whatever the tokenizers package does with it, panics included."""
    path = folder / "tokenizer.json"
    whole, read = path.read_text(encoding="utf-8"), 0
    for i in range(150):
        rng = random.Random(i)
        at, end = sorted(rng.randrange(len(whole)) for _ in range(2))
        if i % 2:
            end = min(end, at + rng.randrange(9))
        text = whole[:at] + rng.choice(["", "7", '"', "[]", "null", "{}", "�", whole[at:end] * 2]) + whole[end:]
        path.write_text(text, encoding="utf-8")
        try:
            tokenizer = huggingface.tokenizer(folder)
            tokenizer.encode("Hello, world")
            read += 1
        except CheckpointError as error:
            assert str(folder) in str(error) and len(str(error)) < 1000
    print(f"{read} of 150 damaged tokenizers are read")
    assert read < 75
