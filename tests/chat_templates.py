"""Chat templates in the manner of published families, chats, and small tokenizers, for several tests. No test in here.

The templates were written for these tests: they do what the families' own do to a chat (trim it, fold the system turn
into the user's, drop earlier thoughts, date it, ...), with markers as those have them.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

TEMPLATES = {
    # A default system turn; nothing is trimmed.
    "chatml": """{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a small model.<|im_end|>\\n' }}
{%- endif -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}""",
    # Thoughts go from answers before the last question, and are written anew after it.
    "think": """{%- set ns = namespace(last=-1) -%}
{%- for m in messages[::-1] -%}
    {%- if ns.last < 0 and m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) -%}
        {%- set ns.last = messages|length - 1 - loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
    {%- if m.role == 'assistant' -%}
        {%- set text, thought = m.content, '' -%}
        {%- if '</think>' in text -%}
            {%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if loop.index0 > ns.last and (loop.last or thought) -%}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') -}}
        {%- else -%}
            {{- text -}}
        {%- endif -%}
    {%- else -%}
        {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}""",
    # A dated system turn even where there is none; all is trimmed.
    "headers": """{{ bos_token }}
{%- if date is not defined %}{% set date = strftime_now('%d %b %Y') if strftime_now is defined else '1 Jan 2024' %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, rest = messages[0]['content'] | trim, messages[1:] %}
{%- else %}
    {%- set system, rest = '', messages %}
{%- endif %}
{{- '<|start|>system<|stop|>\\n\\n' }}
{{- 'Knowledge ends: December 2023\\n' }}
{{- 'Today: ' + date + '\\n\\n' + system + '<|end|>' }}
{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{%- for m in rest %}
    {{- '<|start|>' + m['role'] + '<|stop|>\\n\\n' + m['content'] | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\\n\\n' }}{% endif %}""",
    # The system turn inside the first question; no generation prompt.
    "inst": """{%- if messages[0].role == 'system' -%}
{%- set system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for m in turns -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('user and assistant must take turns') }}{%- endif -%}
{%- if m.role == 'user' -%}
{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}
{%- else -%}{{ ' ' ~ m.content.strip() ~ ' ' ~ eos_token }}{%- endif -%}
{%- endfor -%}""",
    # The system turn before the last question; a list built turn by turn.
    "inst_last": """{%- set ns = namespace(turns=[], system=none) -%}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{%- set ns.system = m.content -%}{%- else -%}{%- set ns.turns = ns.turns + [m] -%}{%- endif -%}
{%- endfor -%}
{%- set asked = ns.turns | selectattr('role', 'equalto', 'user') | list -%}
{{- bos_token -}}
{%- for m in ns.turns -%}
{%- if m.role == 'user' -%}
{%- if m == asked[-1] and ns.system is not none -%}{{ '[INST] ' + ns.system + '\\n\\n' + m.content + '[/INST]' }}
{%- else -%}{{ '[INST] ' + m.content + '[/INST]' }}{%- endif -%}
{%- elif m.role == 'assistant' -%}{{ ' ' + m.content | trim + eos_token }}
{%- else -%}{{ raise_exception('no role ' ~ m.role) }}{%- endif -%}
{%- endfor -%}""",
    # The assistant has another name; the system turn is folded into the first question.
    "model": """{{ bos_token }}
{%- set prefix = messages[0]['content'] | trim + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{%- for m in (messages[1:] if prefix else messages) %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{ '<turn>' + role + '\\n' + (prefix if loop.first else '') }}
{%- if m['content'] is string %}{{ m['content'] | trim }}
{%- elif m['content'] is iterable %}{% for part in m['content'] %}{{ part['text'] | trim }}{% endfor %}{% endif %}
{{ '</turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}
""",
    # Markers that swallow the white space after them; an end marker where no prompt is asked for.
    "swallow": """{% for m in messages %}
{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    # Blocks that mark what is trained on; `continue`.
    "generation": """{%- for m in messages %}
{%- if m.role == 'tool' %}{% continue %}{% endif %}
{%- if m.role == 'assistant' %}
{{ 'Assistant: ' }}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
{%- else %}
{{ m.role | capitalize + ': ' + m.content + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{ 'Assistant:' }}
{%- endif %}""",
    # Macros, and thinking switched off by another name.
    "macro": """{%- macro turn(role, text) -%}{{ '<|start|>' ~ role ~ '<|stop|>' ~ text ~ '<|end|>\\n' }}{%- endmacro -%}
{%- macro wrapped(m) -%}{{ turn(m.role, caller(m.content)) }}{%- endmacro -%}
{%- set extra = namespace(text='Answer at once.' if thinking is defined and not thinking else 'Think first.') -%}
{%- if documents -%}{%- set extra.text = extra.text ~ documents | map(attribute='text') | join('; ') -%}{%- endif -%}
{%- for m in messages -%}
{%- if loop.first and m.role == 'system' -%}{{ turn('system', m.content ~ ' ' ~ extra.text) }}
{%- else -%}
{%- if loop.first -%}{{ turn('system', extra.text) }}{%- endif -%}
{%- call(text) wrapped(m) -%}{{ text }}{%- endcall -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant<|stop|>' ~ ('' if thinking else '</think>') }}{%- endif -%}""",
    # Content quoted as JSON: the text is there only where it needs no quoting.
    "json": """{{ bos_token }}{% for m in messages %}{{ m.content | tojson }}{{ {'from': m.role} | tojson(separators=(',', ':')) }}
{% endfor %}{{ '>' if add_generation_prompt }}""",
    # Old turns are dropped, the first question is said twice.
    "forgetful": """{%- set asked = messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list -%}
{{- 'About: ' ~ asked | first | default('?', true) ~ '\\n' -}}
{%- for m in messages -%}
{%- if loop.revindex <= 3 -%}{{ '%s> %s\\n' % (m.role | upper, m.content.rstrip()) }}{%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT>' if add_generation_prompt -}}""",
}


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A system turn if given, then user and assistant in turn."""
    turns = [{"role": "system", "content": system}] if system is not None else []
    return turns + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CHATS = [
    chat("Hello there."),
    chat("Hello there.", system="Be the kind one."),
    chat("  What is  the time?\n", "It is late.", "And now?", system=" You know the time. "),
    chat("Größe? 中文 😀", "Ja: 5 µm.\n\nNoch etwas?", 'é\u0301 <b>&amp;</b> "quoted"', "Then\tthe end. "),
    chat("Why?", "<think>\nthe question\n</think>\n\nThe answer.", "And why not?", "<think>again</think>\nThe same."),
    chat("", "", "x", system=""),
    chat("[INST] assistant: <|end|> </s>", "<|im_end|>\nuser\n", "user\nassistant\n"),
    [{"role": role, "content": f"said by {role}"} for role in ("user", "assistant", "tool", "user", "user")],
]

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>"]
SWALLOW = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
MERGES = ["h e", "t he", "_ t", "_ the", "_the _t", "_ a", "i n", "i s", ": _", "> N", "N N", ". N", ". _", "m o", "r _",
          "N H", "N W", "l l", "he ll", "e _", "_ B", "_ [", "? N", "o :", "s t"]  # fmt: skip


def _bpe(space: str, newline: str, alphabet: list[str], **options) -> Tokenizer:
    vocab = {token: i for i, token in enumerate([*SPECIAL, *SWALLOW])}
    merges = []
    for letter in alphabet:
        vocab.setdefault(letter, len(vocab))
    for line in MERGES:
        left, right = line.replace("_", space).replace("N", newline).split(" ")
        if left in vocab and right in vocab:
            vocab.setdefault(left + right, len(vocab))
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.add_special_tokens([*SPECIAL, *(AddedToken(text, rstrip=True, special=True) for text in SWALLOW)])
    return tokenizer


def byte_level(nfc: bool = False) -> Tokenizer:
    """Bytes as letters, not split into words: tokens reach across the bounds of contents."""
    tokenizer = _bpe("Ġ", "Ċ", sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As SentencePiece models are: a space put first, spaces as letters, bytes only for what has no letter."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127)), "é"]
    tokenizer = _bpe("▁", "\n", alphabet, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = {"byte_level": byte_level, "nfc": lambda: byte_level(nfc=True), "byte_fallback": byte_fallback}
