"""Makes chats.json: what transformers writes for every template, chat and tokenizer of `tests/chat_templates.py`.

    .venv-parity/bin/python tests/golden/make_chats.py

`tests/test_tokens.py` reads it, where there is no transformers; `tests/parity/test_chat_parity.py` holds it to account.
"""

import json
import pathlib
import sys

import transformers
from jinja2 import TemplateError

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from chat_templates import CHATS, TEMPLATES, TOKENIZERS  # noqa: E402

VARIABLES = {"enable_thinking": False, "thinking": False}
DATE = {"date": "26 Jul 2024"}  # or the file would change with the day


def peer(tokenizer: str, template: str) -> transformers.PreTrainedTokenizerFast:
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS[tokenizer](), bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = TEMPLATES[template]
    return made


def row(tokenizer, chat, prompt, **variables):
    """The text and its token ids, or None twice where the template refuses the chat."""
    options = {"add_generation_prompt": prompt, **VARIABLES, **variables}
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except TemplateError:
        return None, None
    return text, tokenizer.apply_chat_template(chat, return_dict=False, **options)


def rows() -> list:
    """[template, tokenizer, number of the chat, add_generation_prompt, text, ids]; each chat under one tokenizer."""
    found = []
    for t, template in enumerate(TEMPLATES):
        peers = [(name, peer(name, template)) for name in TOKENIZERS]
        for i, chat in enumerate(CHATS):
            for prompt in (True, False):
                name, tokenizer = peers[(t + i) % len(peers)]
                found.append([template, name, i, prompt, *row(tokenizer, chat, prompt, **DATE)])
    return found


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows())
    (HERE / "chats.json").write_text(f"[\n{lines}\n]\n", encoding="ascii")
