"""Padding, buckets, token selections, chat templates."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxemo import tokens
from jaxemo.tokens import TokenBatch, as_batch, bucket, length_batches, pad, spans

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
    from jinja2.exceptions import SecurityError

    with pytest.raises(SecurityError):
        with_template(source).render(CHAT)


@pytest.mark.parametrize("source", ["{{ ''.__class__ }}", "{{ '{0.__class__}'.format(1) }}", "{{ cycler.__init__ }}"])
def test_a_template_sees_nothing_of_python(with_template, source):
    assert with_template(source).render(CHAT) == ""


def test_chats_that_are_none_are_refused(with_template, tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.render(CHAT)
    for turn in ({"role": "user"}, {"role": "user", "content": "x", "name": "y"}, "hello"):
        with pytest.raises(ValueError, match="a chat is a list of"):
            with_template(TEMPLATE).render([turn])


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
    tokenizer = make_tokenizer(add_bos=True)
    assert tokenizer.encode("a</s>") == [256, 97, 257]
    assert tokenizer.decode([256, 97, 257]) == "a"
    assert tokenizer.decode([256, 97, 257], skip_special=False) == "<s>a</s>"
    assert (tokenizer.token(257), tokenizer.token(97)) == ("</s>", "a")
