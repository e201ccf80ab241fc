"""Padding, buckets, token selections, chat templates."""

import datetime
import functools
import itertools
import json
import pathlib
import time
import tracemalloc

import chat_templates
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from jaxemo import templates, tokens
from jaxemo.tokens import TokenBatch, Tokenizer, Turn, as_batch, bucket, length_batches, pad, spans, turns_of

# ---- buckets and padding ---------------------------------------------------------------------------------------------


@hypothesis.given(st.integers(1, 100_000), st.sampled_from([1, 8, 16]))
def test_a_bucket_holds_its_tokens_and_wastes_little(n, smallest):
    """Four sizes an octave: at most a quarter is padding, or less than `smallest` tokens."""
    size = bucket(n, smallest)
    assert n <= size < n + max(smallest, n / 4 + 1)
    assert bucket(size, smallest) == size
    assert bucket(n + 1, smallest) >= size


def test_buckets_are_few():
    assert [bucket(n) for n in (1, 8, 9, 33, 64, 65, 100, 1000)] == [8, 8, 16, 40, 64, 80, 112, 1024]
    assert len({bucket(n) for n in range(1, 4097)}) <= 32  # programs to compile for every length up to 4096


@hypothesis.given(st.lists(st.lists(st.integers(1, 96), min_size=1, max_size=40), min_size=1, max_size=6))
def test_pad_puts_the_padding_on_the_right(rows):
    batch = pad(rows)
    assert batch.ids.dtype == batch.lengths.dtype == np.int32
    assert batch.ids.shape == (len(rows), bucket(max(map(len, rows))))
    for row, ids, n in zip(rows, batch.ids, batch.lengths, strict=True):
        assert n == len(row) and ids[:n].tolist() == row and not ids[n:].any()


def test_pad_refuses_nothing():
    with pytest.raises(ValueError, match="no rows"):
        pad([])
    with pytest.raises(ValueError, match="row 1 has no tokens"):
        pad([[1], [], [2]])


@hypothesis.given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 200))
def test_length_batches_hold_every_row_once(lengths, max_tokens):
    rows = [[i + 1] * n for i, n in enumerate(lengths)]
    batches = length_batches(rows, max_tokens)
    assert sorted(i for indices, _ in batches for i in indices) == list(range(len(rows)))
    for indices, batch in batches:
        assert len(batch.ids) == 1 or batch.ids.size <= max_tokens
        assert all(batch.ids[at, : lengths[i]].tolist() == rows[i] for at, i in enumerate(indices))
        assert np.unique(batch.ids[:, 0], return_counts=True)[1].max() <= 2, "what fills a batch up crowds out nothing"
    shapes = {batch.ids.shape for _, batch in batches}
    assert len(shapes) == len({bucket(n) for n in lengths})


def test_as_batch_takes_full_rows():
    batch = as_batch(np.array([[1, 2, 3], [4, 5, 6]], np.int64), 97)
    assert batch.ids.dtype == np.int32 and batch.lengths.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros(3, int), r"integer array \[B, T\], not int64\[3\]"),
        (np.zeros((2, 3)), r"not float64\[2, 3\]"),
        (np.zeros((2, 3), bool), r"not bool\[2, 3\]"),
        (np.zeros((2, 0), int), r"not int64\[2, 0\]"),
        (np.array([[1, 97]]), "token id 97 is outside the vocabulary of 97"),
        (np.array([[1, -1]]), "token id -1 is outside"),
        (np.array([[1, 2**32 + 5]]), "token id 4294967301 is outside"),
        (TokenBatch(np.zeros((2, 3)), np.array([1, 3])), r"not float64\[2, 3\]"),
        (TokenBatch(np.zeros((2, 3), int), np.array([1, 4])), r"lengths must be 2 numbers from 1 to 3, not \[1 4\]"),
        (TokenBatch(np.zeros((2, 3), int), np.array([0, 3])), "lengths must be 2 numbers"),
        (TokenBatch(np.zeros((2, 3), int), np.array([3])), "lengths must be 2 numbers"),
    ],
)
def test_as_batch_refuses(ids, message):
    with pytest.raises(ValueError, match=message):
        as_batch(ids, 97)


# ---- selections ------------------------------------------------------------------------------------------------------

sizes = {"length": st.integers(1, 12), "new": st.integers(0, 6)}


def named(found, total):
    """The positions of a row of `total` tokens that spans name."""
    return [t for t in range(total) if any(span.start <= t < span.stop for span in found)]


@hypothesis.given(start=st.none() | st.integers(-14, 20), stop=st.none() | st.integers(-14, 20), **sizes)
def test_slices_are_list_slices_counted_from_the_prompts_ends(start, stop, length, new):
    """Negative numbers count from the prompt's end, as a list's do; an open end runs on through what is generated."""
    prompt = list(range(length))
    want = list(range(length + new))[slice(
        start if start is None or start >= 0 else max(0, start + length),
        stop if stop is None or stop >= 0 else max(0, stop + length),
    )]  # fmt: skip
    if not new:
        assert want == prompt[start:stop]
    if want:
        assert named(spans(slice(start, stop), length, new), length + new) == want
    else:
        with pytest.raises(ValueError, match="is empty for a row of"):
            spans(slice(start, stop), length, new)


@hypothesis.given(positions=st.lists(st.integers(-12, 17), min_size=1, max_size=6), **sizes)
def test_positions_count_from_the_prompts_ends(positions, length, new):
    want = sorted({p + length if p < 0 else p for p in positions})
    selection = positions[0] if len(positions) == 1 else positions
    if want[0] >= 0 and want[-1] < length + new:
        found = spans(selection, length, new)
        assert named(found, length + new) == want
        assert all(a.stop < b.start for a, b in itertools.pairwise(found))  # no two that could be one
    else:
        with pytest.raises(ValueError, match="is outside this row's"):
            spans(selection, length, new)


@hypothesis.given(**sizes)
def test_names(length, new):
    everything = list(range(length + new))
    assert named(spans("all", length, new), length + new) == everything
    assert named(spans("prompt", length, new), length + new) == everything[:length]
    assert named(spans("last", length, new), length + new) == [length - 1]
    if new:
        assert named(spans("generated", length, new), length + new) == everything[length:]
    else:
        with pytest.raises(ValueError, match=r"'generated' is empty for a row of .* and none to be generated"):
            spans("generated", length, new)


@hypothesis.given(start=st.none() | st.integers(0, 8), **sizes)
def test_a_selection_is_the_same_tokens_however_many_are_to_come(start, length, new):
    """Positions are absolute: room for more tokens adds to a selection and never moves it."""
    hypothesis.assume((start or 0) < length)
    for selection in (slice(start, None), "all", "prompt", "last", [0], -1):
        short, long = spans(selection, length), spans(selection, length, new)
        assert [t for t in named(long, length + new) if t < length] == named(short, length)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("user", "unknown token selection 'user'; known are all, prompt"),
        (slice(0, 4, 2), "has a step"),
        ([], "is empty"),
    ],
)
def test_impossible_selections_are_refused(selection, message):
    with pytest.raises(ValueError, match=message):
        spans(selection, 5, 3)


def test_positions_may_be_numpy_integers():
    assert spans(np.int64(2), 5) == spans([2], 5) == spans(np.array([2, 2]), 5) == [(2, 3)]


# ---- texts and chats -------------------------------------------------------------------------------------------------

TEMPLATE = """{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
<|im|>{{ message['role'] }}: {{ message['content'] | trim }}{{ eos_token }}
    {%- if message.content == 'stop' %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<|im|>assistant:
{%- endif %}"""
CHAT = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hé <b>"}]


@pytest.fixture(scope="module")
def with_template(make_tokenizer):
    return lambda source: make_tokenizer(chat_template=source)


def test_a_template_is_rendered_up_to_the_answer(with_template):
    tokenizer = with_template(TEMPLATE)
    text = "<|im|>system: Be kind.</s><|im|>user: Hé <b></s>"  # a block's own line leaves nothing behind
    assert tokenizer.render(CHAT) == text + "<|im|>assistant:"
    assert tokenizer.render(CHAT, add_generation_prompt=False) == text
    assert tokenizer.encode_chat(CHAT) == tokenizer.backend.encode(text + "<|im|>assistant:").ids
    assert tokenizer.render([{"role": "user", "content": "stop"}, CHAT[0]], False) == "<|im|>user: stop</s>"


def test_tojson_leaves_letters_alone(with_template):
    assert with_template("{{ messages | tojson }}").render([CHAT[1]]) == '[{"role": "user", "content": "Hé <b>"}]'


def test_a_template_may_refuse_a_chat(with_template):
    with pytest.raises(ValueError, match="the chat template refuses this chat: no tools here"):
        with_template(TEMPLATE).render([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ('a' | attr('__class__')).__mro__[1] }}",
        "{{ raise_exception.__globals__['datetime'] }}",
        "{{ messages.append({}) }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(with_template, source):
    """A template comes with the weights, from anywhere."""
    with pytest.raises(ValueError, match=r"SecurityError: .*unsafe|No filter named 'attr'"):
        with_template(source).render(CHAT)


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__ }}", "{{ '{0.__class__}'.format(1) }}", "{{ cycler.__init__ }}", "{{ messages.append }}"],
)
def test_a_template_sees_nothing_of_python(with_template, source):
    assert with_template(source).render(CHAT) == ""


def test_chats_that_are_none_are_refused(with_template, tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.render(CHAT)
    for turn in ({"role": "user"}, {"role": "user", "content": "x", "name": "y"}, "hello"):
        with pytest.raises(ValueError, match="a chat is a list of"):
            with_template(TEMPLATE).render([turn])
    with pytest.raises(ValueError, match="role and content are texts, not"):
        with_template(TEMPLATE).render([{"role": "user", "content": None}])
    with pytest.raises(ValueError, match="at least one turn"):
        with_template(TEMPLATE).render([])


def test_encode_takes_texts_and_chats_alone_or_together(with_template):
    tokenizer = with_template(TEMPLATE)
    plain, chat = tokenizer.encode("hé"), tokenizer.encode_chat(CHAT)
    assert plain == [104, 0xC3, 0xA9]
    assert tokens.encode(tokenizer, "hé") == tokens.encode(tokenizer, ["hé"]) == [plain]
    assert tokens.encode(tokenizer, CHAT) == tokens.encode(tokenizer, [CHAT]) == [chat]
    assert tokens.encode(tokenizer, ["hé", CHAT]) == [plain, chat]
    with pytest.raises(TypeError, match="row 1 is int; expected a text or a chat"):
        tokens.encode(tokenizer, ["hé", 3])


def test_special_tokens(make_tokenizer):
    tokenizer = make_tokenizer(prefix=[256])
    assert tokenizer.encode("a</s>") == [256, 97, 257]
    assert tokenizer.decode([256, 97, 257]) == "a"
    assert tokenizer.decode([256, 97, 257], skip_special=False) == "<s>a</s>"
    assert (tokenizer.token(257), tokenizer.token(97)) == ("</s>", "a")


def test_a_template_is_compiled_once(with_template):
    """Once for each tokenizer, and again for another template."""
    tokenizer = with_template(TEMPLATE)
    first = tokenizer.render(CHAT)
    compiled = tokenizer._compiled
    assert tokenizer.render(CHAT) == first and tokenizer._compiled is compiled
    tokenizer.chat_template = "{{ messages[1].content }}"
    assert tokenizer.render(CHAT) == "Hé <b>"


def test_thinking_is_off_unless_asked_for(with_template):
    tokenizer = with_template("{{ [enable_thinking, thinking, pad_token, tools, documents, bos_token] }}")
    assert tokenizer.render(CHAT) == "[False, False, Undefined, None, None, '<s>']"
    tokenizer.template_vars |= {"enable_thinking": True, "pad_token": "<pad>"}
    assert tokenizer.render(CHAT) == "[True, False, '<pad>', None, None, '<s>']"


def test_golden_chats():
    """Text and token ids that transformers makes of eight chats by eleven templates, under three tokenizers."""
    rows = json.loads((pathlib.Path(__file__).parent / "golden" / "chats.json").read_text(encoding="ascii"))
    assert len(rows) == 2 * len(chat_templates.TEMPLATES) * len(chat_templates.CHATS)
    backends = {name: make() for name, make in chat_templates.TOKENIZERS.items()}
    for template, name, number, prompt, text, ids in rows:
        source = chat_templates.TEMPLATES[template]
        variables = {"date": "26 Jul 2024"}
        tokenizer = Tokenizer(backends[name], bos=1, eos=2, chat_template=source, template_vars=variables)
        chat = chat_templates.CHATS[number]
        if text is None:
            with pytest.raises(ValueError, match="the chat template refuses this chat"):
                tokenizer.render(chat, prompt)
        else:
            assert tokenizer.render(chat, prompt) == text
            assert tokenizer.encode_chat(chat, prompt) == ids


# ---- hostile templates -----------------------------------------------------------------------------------------------

LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"


def grow(by, start="'ab'"):
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {by} %}}{END}"


HOSTILE = [
    # time
    f"{LOOP}{LOOP}{END}{END}",
    f"{LOOP}{LOOP}{{% if i == 1 %}}{{% break %}}{{% endif %}}{LOOP}{END}{END}{END}",
    "{% for i in range(99999)|map('string')|map('upper') %}{% for j in range(99999) if j == 'x' %}{% endfor %}{% endfor %}",
    f"{LOOP}{{{{ range(99999)|map('string')|select('equalto', 'x')|list }}}}{END}",
    f"{{% generation %}}{LOOP}{LOOP}{END}{END}{{% endgeneration %}}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% set a, b = 'a' * 500000 + 'b', 'a' * 1000000 %}" + "{% if a in b %}{% endif %}" * 400,
    f"{{% set r = range(99999) %}}{LOOP.replace('range(99999)', 'r') * 2}{END * 2}",
    "{% set u = 2**61 - 1 %}{{ range(0, u * 60000, u)|unique|list }}",
    # large numbers
    "{% for i in range(10**9) %}{% endfor %}", "{{ 10**(10**9) }}", "{{ 2**4000 * 2**4000 }}", "{{ 9" + "9" * 9999 + " }}",
    # large texts and lists
    "{{ 'x' * 10**9 }}", "{{ 10**9 * 'x' }}", "{{ [0] * 10**9 }}", "{{ (0,) * 10**9 }}", f"{LOOP}{'x' * 999}{END}",
    f"{{% set x %}}{LOOP}{'x' * 999}{END}{{% endset %}}", f"{{% macro m() %}}{LOOP}{'x' * 999}{END}{{% endmacro %}}{{{{ m() }}}}",
    grow("ns.x ~ ns.x"), grow("ns.x + ns.x"), grow("ns.x|replace('a', ns.x)"), grow("ns.x.replace('', ns.x)"),
    grow("ns.x.join(ns.x)"), grow("ns.x|join(ns.x)"), grow("'%s%s' % (ns.x, ns.x)"), grow("'{0}{0}'.format(ns.x)"),
    grow("'%s%s'|format(ns.x, ns.x)"), grow("(ns.x ~ '\\na')|indent(ns.x|length)"), grow("[ns.x, ns.x]"), grow("ns.x + ns.x", "[1]"),
    grow("(ns.x, ns.x)") + "{{ {ns.x: 1} }}", grow("{'a': ns.x, 'b': ns.x}") + "{{ ns.x|tojson }}", grow("dict(a=ns.x, b=ns.x)"),
    f"{{% set ns = namespace(x=()) %}}{LOOP}{{% set ns.x = (ns.x,) %}}{{% if {{ns.x: 1}} %}}{{% endif %}}{END}",
    "{% set b = 'a' * 1000000 %}" + "".join(f"{{% set v{i} = b[1:] %}}" for i in range(200)),
    "{% set b = 'a' * 1000000 %}" + "".join(f"{{% set v{i} = b.upper() %}}" for i in range(200)),
    # widths
    "{{ 'x'|center(10**9) }}", "{{ 'x'.center(10**9) }}", "{{ 'x'.ljust(10**9) }}", "{{ '1'.zfill(10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}", "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10**9, 1) }}", "{{ ('%(a)999d' * 100000) % {'a': 1} }}",
    "{{ ('{0:999}' * 100000).format(1) }}", "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}", "{{ '{a:1000000000}'.format_map({'a': 1}) }}", "{{ 'a\n'|indent(10**9, true) }}",
    "{{ messages|tojson(indent=10**9) }}", "{{ messages|tojson(indent='x' * 1000000) }}", "{{ [1, 2]|tojson(separators=('x' * 100000, 'y')) }}", "{{ lipsum(n=10**9) }}",
    "{{ [1]|batch(10**9, 'x')|list }}", "{{ strftime_now('%1000000000d') }}", "{{ 1.5|round(10**9, 'ceil') }}",
    "{{ (5).to_bytes(10**9) }}", "{{ raise_exception('x' * 1000000) }}",
    # what Jinja or Python cannot read
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ " + "-" * 5000 + "1 }}", "{{ 1" + "+1" * 5000 + " }}",
    "{{ a" + ".b" * 5000 + " }}", "{% if 1 %}" * 500 + "{% endif %}" * 500, f"{LOOP}" * 50 + END * 50, "{% for %}", "x" * (1 << 18),
    # other files, and names that Python reads
    "{% include 'x' %}", "{% import 'os' as os %}", "{% extends 'x' %}", "{{ namespace(__html__=1) }}",
    "{% set ns = namespace() %}{% set ns.__html__ = 1 %}", "{% autoescape true %}{% endautoescape %}", "{{ nothing.at.all }}",
]  # fmt: skip


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: source[:50].replace("\n", " "))
def test_hostile_templates_are_stopped(with_template, source, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    tracemalloc.start()
    started = time.monotonic()
    try:
        with pytest.raises(ValueError, match="the chat template") as error:
            with_template(source).render(CHAT)
        assert len(str(error.value)) < 1200
        took, (_, peak) = time.monotonic() - started, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"{took:.2f} s, {peak / 2**20:.0f} MiB")
    assert took < 2 and peak < 128 * 2**20


def test_long_chats_are_within_the_bounds(with_template):
    """2,000 turns of 2,000 characters, gathered turn by turn, and one of 4 million."""
    tokenizer = with_template(chat_templates.TEMPLATES["inst_last"])
    text = tokenizer.render(chat_templates.chat(*["many words " * 182] * 200))
    assert text.count("many words") == 200 * 182
    text = tokenizer.render(chat_templates.chat("many words " * 400_000))
    assert text.count("many words") == 400_000


# ---- where the turns are ---------------------------------------------------------------------------------------------


@functools.cache
def backend(name):
    return chat_templates.TOKENIZERS[name]()


def family(template, name="byte_level"):
    return Tokenizer(backend(name), bos=1, eos=2, chat_template=chat_templates.TEMPLATES[template])


def turns_by_bytes(tokenizer, text, ids, places):
    """(first, past the last) token that holds a byte of each place: from the tokens' own bytes, not their offsets.

    Only for byte-level tokenizers without a normaliser, and texts without markers that swallow white space.
    """
    ends = np.cumsum([len(tokenizer.backend.decode([i], skip_special_tokens=False).encode()) if i < 11 else
                      len(tokenizer.backend.id_to_token(i)) for i in ids])  # fmt: skip
    assert ends[-1] == len(text.encode())
    found = []
    for start, stop in places:
        a, b = len(text[:start].encode()), len(text[:stop].encode())
        holds = [t for t, end in enumerate(ends) if max(a, ends[t - 1] if t else 0) < min(b, end)]
        found.append((holds[0], holds[-1] + 1) if holds else None)
    return found


letters = st.sampled_from([*"aehl .:[\n\t", "é", "\u0301", "中", "😀", "the ", "\n\n"])
words = st.lists(letters, max_size=8).map("".join)
# Templates that write every turn once, and which roles they trim.
TRIMMED = {"chatml": "", "headers": ("system", "user", "assistant"), "inst": ("user", "assistant"), "inst_last": ("assistant",),
           "model": ("system", "user", "assistant"), "generation": ""}  # fmt: skip


@hypothesis.given(contents=st.lists(words, min_size=1, max_size=4), system=st.none() | words, prompt=st.booleans(),
                  template=st.sampled_from(sorted(TRIMMED)))  # fmt: skip
@hypothesis.settings(max_examples=150)
def test_turns_are_the_tokens_that_hold_their_bytes(contents, system, prompt, template):
    """Against the bytes of the tokens; where the contents are, the test knows by searching for them."""
    # Contents that occur once, whatever the template writes, so that they can be searched for.
    chat = [{**t, "content": f"{t['content']}«{i}»{t['content']}"} for i, t in
            enumerate(chat_templates.chat(*contents, system=system))]  # fmt: skip
    tokenizer = family(template)
    ids, text = tokenizer.encode_chat(chat, prompt), tokenizer.render(chat, prompt)
    places = []
    for turn in chat:
        kept = turn["content"].strip() if turn["role"] in TRIMMED[template] else turn["content"]
        assert text.count(kept) == 1
        places.append((text.index(kept), text.index(kept) + len(kept)))
    content = [turn for turn in ids.turns if turn.name != "before_answer"]
    assert [turn.name for turn in content] == [turn["role"] for turn in chat]
    assert [turn[1:] for turn in content] == turns_by_bytes(tokenizer, text, ids, places)
    if prompt:
        assert ids.turns[-1] == ("before_answer", len(ids) - 1, len(ids))
    elif chat[-1]["role"] == "assistant":
        assert ids.turns[-1] == ("before_answer", content[-1].start - 1, content[-1].start)
    else:
        assert ids.turns[-1] == content[-1]


@hypothesis.given(contents=st.lists(words, min_size=1, max_size=4), system=st.none() | words, prompt=st.booleans(),
                  template=st.sampled_from(sorted(chat_templates.TEMPLATES)),
                  name=st.sampled_from(sorted(chat_templates.TOKENIZERS)))  # fmt: skip
@hypothesis.settings(max_examples=150)
def test_a_turns_tokens_say_its_content(contents, system, prompt, template, name):
    """And those inside it nothing else: the tokens but the first and last decode to a part of the content."""

    def plain(text):  # decoders of SentencePiece put spaces beside special tokens
        text = backend(name).normalizer.normalize_str(text) if name == "nfc" else text
        return text.replace(" ", "")

    chat = chat_templates.chat(*contents, system=system)
    tokenizer = family(template, name)
    ids = tokenizer.encode_chat(chat, prompt)
    for turn, (role, start, stop) in zip(chat, ids.turns, strict=False):
        assert role == turn["role"]
        if start < 0:
            assert template in ("forgetful", "json")
        elif start == stop or not turn["content"]:
            assert start == stop and not turn["content"].strip()
        else:
            assert plain(turn["content"].strip()) in plain(tokenizer.decode(ids[start:stop], skip_special=False))
            inner = plain(tokenizer.decode(ids[start + 1 : stop - 1], skip_special=False)).strip("�")
            assert inner in plain(turn["content"])


def said(tokenizer, ids, selection):
    return [tokenizer.decode(ids[a:b], skip_special=False) for a, b in spans(selection, len(ids), turns=ids.turns)]


def test_turns_by_name():
    tokenizer = family("chatml")
    chat = chat_templates.chat("One?", "Two.", "Three?", system="Zero.")
    ids = tokenizer.encode_chat(chat)
    assert said(tokenizer, ids, "system") == said(tokenizer, ids, "turn:0") == ["Zero."]
    assert said(tokenizer, ids, "user") == ["One?\n"[:-1], "Three?"]
    assert (
        said(tokenizer, ids, "user:0") == said(tokenizer, ids, "user:-2") == said(tokenizer, ids, "turn:1") == ["One?"]
    )
    assert said(tokenizer, ids, "assistant:-1") == said(tokenizer, ids, "turn:-2") == ["Two."]
    assert spans("before_answer", len(ids), turns=ids.turns) == spans("last", len(ids))
    # A finished answer has a last token before it as well.
    ids = tokenizer.encode_chat(chat[:3], add_generation_prompt=False)
    [(start, stop)] = spans("before_answer", len(ids), turns=ids.turns)
    assert stop == start + 1 == spans("assistant", len(ids), turns=ids.turns)[0].start
    assert tokenizer.decode(ids[start:stop], skip_special=False) == "\n"


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            "user",
            r"'user' \(row 3\); known are all, .*; this row has the turns system \(turn:0\), assistant \(turn:1\);",
        ),
        ("turn:2", "unknown token selection 'turn:2'"),
        ("turn:-3", "unknown token selection 'turn:-3'"),
        ("turn", "unknown token selection 'turn'"),
        ("turn:x", "unknown token selection 'turn:x'"),
        ("assistant:1", "unknown token selection 'assistant:1'"),
        ("before_answer", "there is no before_answer, since neither an answer nor a generation prompt ends the chat"),
        (
            "system",
            r"'system' \(row 3\): it is not known which tokens the turn 'system' is: the template writes it more",
        ),
        ("assistant", r"'assistant' is empty for a row of 9 prompt tokens and none to be generated \(row 3\)"),
    ],
)
def test_turns_that_are_not_there_are_refused(selection, message):
    turns = [Turn("system", -2, -2), Turn("assistant", 4, 4)]
    with pytest.raises(ValueError, match=message):
        spans(selection, 9, turns=turns, row=3)


def test_a_row_without_turns_says_so():
    with pytest.raises(
        ValueError, match=r"'user' \(row 1\); .*; this row has no turns, since it was not made from a chat"
    ):
        spans("user", 5, row=1)


def test_spans_that_meet_are_one():
    """A token that two contents share is not steered twice."""
    turns = [Turn("user", 1, 4), Turn("user", 3, 6), Turn("user", 6, 7), Turn("user", 8, 9), Turn("user", 2, 3)]
    assert spans("user", 9, turns=turns) == [(1, 7), (8, 9)]


def test_places_that_cannot_be_verified_are_unknown():
    """What the template repeats, leaves out, changes or writes differently because of what it says."""

    def unknown(template, chat, **variables):
        tokenizer = family(template)
        tokenizer.template_vars |= variables
        return [
            tokens.UNKNOWN[-1 - turn.start] if turn.start < 0 else None for turn in tokenizer.encode_chat(chat).turns
        ]

    chat = chat_templates.chat("One?", "Two.", "Three?", "4", "5")
    assert unknown("forgetful", chat) == [None, templates.LEFT_OUT] + [None] * 4
    assert unknown("forgetful", chat[:1]) == [templates.REPEATED, None]
    assert unknown("json", chat_templates.chat('"quoted"', "not")) == [templates.CHANGED, None, None]
    thoughts = chat_templates.chat("Why?", "<think>\nhm\n</think>\n\nSo.", "Oh?", "<think>hm</think>So.")
    assert unknown("think", thoughts) == [None, None, None, templates.CHANGED, None]
    # Without a generation prompt the place before such an answer is unknown too.
    ids = family("think").encode_chat(thoughts, add_generation_prompt=False)
    assert ids.turns[-1] == ("before_answer", ids.turns[-2].start, ids.turns[-2].start)


@pytest.mark.parametrize(
    ("write", "place"),
    [
        (lambda text: f"<{text}>", (1, 4)),
        (lambda text: f"<{text.strip()}>", (1, 2)),
        (lambda text: f"{len(text)}<{text}>", templates.CHANGED),  # before it, as long as it would be
        (lambda text: f"<{text}>{len(text)}", templates.CHANGED),  # after it
        (lambda text: f"<{text}>" if len(text) > 3 else "<", templates.CHANGED),  # before and after overlap
        (lambda text: f"<{text.upper()}>", templates.LEFT_OUT),
        (lambda text: f"<{text}{text}>", templates.REPEATED),
        (lambda text: f"<{text.replace('b', 'd')}>", templates.CHANGED),
    ],
)
def test_a_place_is_verified_on_both_sides(write, place):
    chat = [{"role": "user", "content": " b "}]
    assert templates.contents(lambda chat: write(chat[0]["content"]), chat, write(" b ")) == [place]


def test_thoughts_that_are_dropped_are_no_part_of_a_turn():
    tokenizer = family("think")
    ids = tokenizer.encode_chat(chat_templates.chat("Why?", "<think>\nhm\n</think>\n\nSo.", "Oh?"))
    assert said(tokenizer, ids, "assistant") == ["So."]
    assert tokenizer.decode(ids, skip_special=False).endswith("assistant\n<think>\n\n</think>\n\n")


def test_markers_that_swallow_white_space_are_no_part_of_a_turn():
    tokenizer = family("swallow")
    ids = tokenizer.encode_chat(chat_templates.chat("\n Hi. "))
    assert said(tokenizer, ids, "user") == ["Hi. "]


def test_offsets_without_white_space_are_not_used():
    """A post-processor that trims offsets would take a turn's first space from it."""
    from tokenizers import processors

    source = chat_templates.TEMPLATES["chatml"]
    chat = chat_templates.chat("  a  ", " \n")
    plain = Tokenizer(chat_templates.byte_level(), chat_template=source).encode_chat(chat)
    backend = chat_templates.byte_level()
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True)])
    trimmed = Tokenizer(backend, chat_template=source).encode_chat(chat)
    assert trimmed == plain and trimmed.turns == plain.turns


def test_the_date_is_the_same_while_turns_are_found(with_template, monkeypatch):
    class Clock(datetime.datetime):
        moment = 0

        @classmethod
        def now(cls):
            cls.moment += 1
            return cls(2024, 1, 1, 0, 0, cls.moment)

    monkeypatch.setattr(datetime, "datetime", Clock)
    tokenizer = with_template("{{ strftime_now('%H:%M:%S') }} {{ messages[0].content }}")
    assert tokenizer.encode_chat(CHAT[1:]).turns[0].start >= 0
    assert tokenizer.render(CHAT) != tokenizer.render(CHAT)


# ---- turns in batches ------------------------------------------------------------------------------------------------


def test_turns_travel_with_their_rows():
    """Padded, sorted into batches, picked and reordered as arrays; a part of a row has none."""
    tokenizer = family("model")
    rows = tokens.encode(tokenizer, [
        chat_templates.chat("A long question, " * 5, "yes", "no"), "a plain text",
        [{"role": "critic", "content": "No."}, {"role": "user", "content": "Oh!"}],
    ])  # fmt: skip
    batch = pad(rows)
    assert batch.names == (*tokens.NAMES, "critic")
    assert turns_of(batch) == [rows[0].turns, (), rows[2].turns]
    assert turns_of(as_batch(batch, 1000)) == turns_of(batch)
    picked = jax.tree.map(lambda x: x[[2, 0]], batch)
    assert turns_of(picked) == [rows[2].turns, rows[0].turns]
    assert turns_of(as_batch(picked, 1000)) == turns_of(picked)
    assert hash(jax.tree.structure(picked)) == hash(jax.tree.structure(batch))
    for indices, part in length_batches(rows, 64):
        assert turns_of(part)[: len(indices)] == [tuple(getattr(rows[i], "turns", ())) for i in indices]
    assert turns_of(pad([rows[0][:4]])) == [()] and pad([rows[1]]).turns is None
    for wrong in (batch.replace(turns=batch.turns[:2]), batch.replace(lengths=batch.lengths // 2)):
        with pytest.raises(ValueError, match="do not belong to rows of"):
            as_batch(wrong, 1000)
