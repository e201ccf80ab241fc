"""Chats through templates in the manner of many families, against transformers' apply_chat_template."""

import json
import pathlib
import sys

import pytest

from jaxemo.tokens import Tokenizer

TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "golden")]
import make_chats  # noqa: E402
from chat_templates import CHATS, TEMPLATES, TOKENIZERS  # noqa: E402


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_and_ids(name):
    """Every template and chat, with and without the generation prompt, thinking on and off, and today's date."""
    same = refused = 0
    for template, source in TEMPLATES.items():
        ours = Tokenizer(TOKENIZERS[name](), bos=1, eos=2, chat_template=source)
        theirs = make_chats.peer(name, template)
        for chat in CHATS:
            for prompt in (True, False):
                for thinking in (False, True):
                    variables = {"enable_thinking": thinking, "thinking": thinking}
                    ours.template_vars |= variables
                    text, ids = make_chats.row(theirs, chat, prompt, **variables)
                    if text is None:
                        with pytest.raises(ValueError, match="refuses this chat"):
                            ours.render(chat, prompt)
                        refused += 1
                        continue
                    assert ours.render(chat, prompt) == text, (template, chat)
                    assert ours.encode_chat(chat, prompt) == ids, (template, chat)
                    same += 1
    print(f"\n{name}: {len(TEMPLATES)} templates, text and ids identical for {same} chats; both refuse {refused}")
    assert same > 200


def test_the_golden_file_is_what_transformers_says():
    assert json.loads((TESTS / "golden" / "chats.json").read_text(encoding="ascii")) == [
        list(row) for row in make_chats.rows()
    ]
