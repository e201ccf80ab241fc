"""Text to rows of token ids and back: tokenizer, chat template, right padding, and selections of tokens.

A *selection* names tokens of each row by absolute position: the same tokens with and without a KV cache.

    "all"         every token, generated ones too       slice(5, None)   from position 5 on, generated ones too
    "prompt"      the prompt                            slice(-3, None)  from the prompt's third token from the end on
    "generated"   what comes after the prompt           7 or -1          one position (from the prompt's end if < 0)
    "last"        the prompt's last token               [0, 3, 4]        several positions
"""

import datetime
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

Chat = Sequence[dict[str, str]]  # [{"role": "user", "content": "..."}, ...]
Array = jax.Array | np.ndarray  # trees are built on the host and enter compiled passes as they are
Selection = str | slice | int | Sequence[int]
END = np.iinfo(np.int32).max  # "no end": past every position


@flax.struct.dataclass
class TokenBatch:
    """Right-padded rows: `ids [B, T]` int32 and their `lengths [B]`. Padding is id 0 and is never attended to."""

    ids: Array
    lengths: Array


def bucket(n: int, smallest: int = 8) -> int:
    """The length that `n` tokens are padded to: four sizes an octave, so few shapes compile and little is wasted."""
    step = max(smallest, 1 << max(0, (n - 1).bit_length() - 3))
    return max(smallest, -(-n // step) * step)


def pad(rows: Sequence[Sequence[int]], length: int | None = None) -> TokenBatch:
    """Right-pad rows of token ids to `length` (by default the bucket of the longest)."""
    if not len(rows):
        raise ValueError("no rows: a batch needs at least one text")
    lengths = [len(row) for row in rows]
    if 0 in lengths:
        raise ValueError(f"row {lengths.index(0)} has no tokens; the model needs at least one to read")
    ids = np.zeros((len(rows), length or bucket(max(lengths))), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return TokenBatch(ids, np.asarray(lengths, np.int32))


def as_batch(ids, vocab_size: int) -> TokenBatch:
    """A TokenBatch as it is, or an integer array `[B, T]` whose rows are all full; token ids are checked."""
    given = isinstance(ids, TokenBatch)
    array = np.asarray(ids.ids if given else ids)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or 0 in array.shape:
        raise ValueError(f"token ids must be a non-empty integer array [B, T], not {array.dtype}{list(array.shape)}")
    B, T = array.shape
    lengths = np.asarray(ids.lengths, np.int32) if given else np.full(B, T, np.int32)
    if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
        raise ValueError(f"lengths must be {B} numbers from 1 to {T}, not {lengths}")
    if array.min() < 0 or array.max() >= vocab_size:
        bad = array[(array < 0) | (array >= vocab_size)][0]
        raise ValueError(f"token id {bad} is outside the vocabulary of {vocab_size}")
    return TokenBatch(array.astype(np.int32), lengths)


def length_batches(rows: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[list[int], TokenBatch]]:
    """Rows sorted by length into batches of one shape for each length bucket: (indices of the rows, batch).

    A batch holds at most `max_tokens` tokens, padding included, but at least one row. The last batch of a bucket is
    filled up with copies of its first row, which no index names.
    """
    by_bucket: dict[int, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        by_bucket.setdefault(bucket(len(rows[i])), []).append(i)
    batches = []
    for length, members in by_bucket.items():
        size = max(1, min(max_tokens // length, len(members)))
        for at in range(0, len(members), size):
            indices = members[at : at + size]
            filled = indices + [indices[0]] * (size - len(indices))
            batches.append((indices, pad([rows[i] for i in filled], length)))
    return batches


class Span(NamedTuple):
    """Positions `start <= position < stop` of one row."""

    start: int
    stop: int


def spans(selection: Selection, length: int, new_tokens: int = 0) -> list[Span]:
    """The absolute spans that `selection` names in a row of `length` prompt tokens and up to `new_tokens` generated.

    Raises ValueError where it names none: an intervention or a measurement that never happens is a mistake.
    """
    total = length + new_tokens
    named = {
        "all": Span(0, END),
        "prompt": Span(0, length),
        "generated": Span(length, END),
        "last": Span(length - 1, length),
    }
    if isinstance(selection, str):
        if selection not in named:
            raise ValueError(
                f"unknown token selection {selection!r}; known are {', '.join(named)}, slices and positions"
            )
        found = [named[selection]]
    elif isinstance(selection, slice):
        if selection.step not in (None, 1):
            raise ValueError(f"token selection {selection} has a step; list the positions instead")
        start, stop = selection.start or 0, END if selection.stop is None else selection.stop
        found = [Span(max(0, start + length) if start < 0 else start, stop + length if stop < 0 else stop)]
    else:
        positions = [selection] if isinstance(selection, int | np.integer) else list(selection)
        found = []
        for position in sorted({int(p) + length if p < 0 else int(p) for p in positions}):
            if not 0 <= position < total:
                raise ValueError(
                    f"token selection {selection!r}: position {position} is outside this row's {total} tokens"
                )
            if found and found[-1].stop == position:
                found[-1] = Span(found[-1].start, position + 1)
            else:
                found.append(Span(position, position + 1))
    if not any(max(0, span.start) < min(span.stop, total) for span in found):
        generated = f" and {new_tokens} to be generated" if new_tokens else " and none to be generated"
        raise ValueError(f"token selection {selection!r} is empty for a row of {length} prompt tokens{generated}")
    return found


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a checkpoint says beside it: special ids and the chat template."""

    def __init__(self, backend, *, bos=None, eos=None, add_bos=False, chat_template=None, stop_ids=()):
        self.backend = backend
        self.bos, self.eos = bos, eos  # token ids or None
        self.add_bos = add_bos  # begin every plain text with `bos`
        self.chat_template = chat_template  # jinja source or None
        self.stop_ids = tuple(stop_ids)  # ids that end an answer

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text. Special tokens written out in the text are recognised, as in transformers."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if self.add_bos and self.bos is not None else ids

    def encode_chat(self, chat: Chat, add_generation_prompt: bool = True) -> list[int]:
        return self.backend.encode(self.render(chat, add_generation_prompt), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, index: int) -> str:
        """The text of one token, for display."""
        return self.backend.decode([int(index)], skip_special_tokens=False)

    def render(self, chat: Chat, add_generation_prompt: bool = True) -> str:
        """The chat as text in the model's own template, ready for the assistant's answer."""
        if not self.chat_template:
            raise ValueError("this model has no chat template; give plain texts instead of chats")
        for turn in chat:
            if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
                raise ValueError(f"a chat is a list of {{'role': ..., 'content': ...}}, not {turn!r}")
        name = {i: self.backend.id_to_token(i) if i is not None else "" for i in (self.bos, self.eos)}
        template = _environment().from_string(self.chat_template)
        return template.render(messages=list(chat), add_generation_prompt=add_generation_prompt,
                               bos_token=name[self.bos], eos_token=name[self.eos])  # fmt: skip


def _environment():
    """Jinja as chat templates expect it, sandboxed: a template comes with the weights and is not to be trusted."""
    import jinja2
    import jinja2.sandbox

    def raise_exception(message):
        raise ValueError(f"the chat template refuses this chat: {message}")

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


def encode(tokenizer: Tokenizer, inputs: str | Chat | Sequence[str | Chat]) -> list[list[int]]:
    """Token ids of one or several texts and chats (a chat is rendered up to the start of the assistant's answer)."""

    def is_chat(value: Any) -> bool:
        return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], dict)

    rows: list[Any] = [inputs] if isinstance(inputs, str) or is_chat(inputs) else list(inputs)
    encoded = []
    for i, row in enumerate(rows):
        if isinstance(row, str):
            encoded.append(tokenizer.encode(row))
        elif is_chat(row):
            encoded.append(tokenizer.encode_chat(row))
        else:
            raise TypeError(
                f"row {i} is {type(row).__name__}; expected a text or a chat (a list of role/content turns)"
            )
    return encoded
