"""Text to rows of token ids and back: tokenizer, chats, right padding, and selections of tokens.

A *selection* names tokens of each row by absolute position: the same tokens with and without a KV cache.

    "all"         every token, generated ones too       slice(5, None)   from position 5 on, generated ones too
    "prompt"      the prompt                            slice(-3, None)  from the prompt's third token from the end on
    "generated"   what comes after the prompt           7 or -1          one position (from the prompt's end if < 0)
    "last"        the prompt's last token               [0, 3, 4]        several positions

In rows made from chats, the turns have names as well. A turn is its content's tokens, without the template's own
around it; a token that holds some of both belongs to the content.

    "user"        all turns of a role                   "user:-1"        its last turn ("assistant:0" the first, ...)
    "turn:2"      the chat's third turn, of any role    "before_answer"  the last token before the assistant's answer
"""

import bisect
import datetime
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

from jaxemo import templates

Chat = Sequence[dict[str, str]]  # [{"role": "user", "content": "..."}, ...]
Array = jax.Array | np.ndarray  # trees are built on the host and enter compiled passes as they are
Selection = str | slice | int | Sequence[int]
END = np.iinfo(np.int32).max  # "no end": past every position


BEFORE_ANSWER = "before_answer"
NAMES = (BEFORE_ANSWER, "system", "user", "assistant", "tool", "developer")  # other roles come after these
UNKNOWN = (templates.LEFT_OUT, templates.REPEATED, templates.CHANGED, templates.FAILED,
           "the tokenizer does not say which characters its tokens stand for")  # fmt: skip


class Turn(NamedTuple):
    """Where the content of one turn lies: positions `start <= position < stop`, or `start = -1 - i` for UNKNOWN[i].

    The position before the answer is kept as a turn of one token, named BEFORE_ANSWER, after the others.
    """

    name: str
    start: int
    stop: int


@flax.struct.dataclass
class TokenBatch:
    """Right-padded rows: `ids [B, T]` int32 and their `lengths [B]`. Padding is id 0 and is never attended to.

    `turns [B, N, 3]` int32 holds the turns of rows made from chats (index in `names`, start, stop; the index is -1
    past a row's last), or is None. It is an array so that whatever picks or reorders rows takes it along.
    """

    ids: Array
    lengths: Array
    turns: Array | None = None
    names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=NAMES)


class Ids(list[int]):
    """The token ids of a chat, with its turns. A piece of it is a plain list: positions there would be others."""

    turns: tuple[Turn, ...] = ()


def bucket(n: int, smallest: int = 8) -> int:
    """The length that `n` tokens are padded to: four sizes an octave, so few shapes compile and little is wasted."""
    step = max(smallest, 1 << max(0, (n - 1).bit_length() - 3))
    return max(smallest, -(-n // step) * step)


def pad(rows: Sequence[Sequence[int]], length: int | None = None) -> TokenBatch:
    """Right-pad rows of token ids to `length` (by default the bucket of the longest)."""
    if not len(rows):
        raise ValueError("no rows: a batch needs at least one text")
    lengths = np.array([len(row) for row in rows], np.int32)
    if 0 in lengths:
        raise ValueError(f"row {lengths.argmin()} has no tokens; the model needs at least one to read")
    ids = np.zeros((len(rows), length or bucket(int(lengths.max()))), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    turns = [getattr(row, "turns", ()) for row in rows]
    if not any(turns):
        return TokenBatch(ids, lengths)
    names = NAMES + tuple(sorted({turn.name for row in turns for turn in row} - set(NAMES)))
    where = np.full((len(rows), max(map(len, turns)), 3), -1, np.int32)
    for i, row in enumerate(turns):
        where[i, : len(row)] = np.array([(names.index(name), *span) for name, *span in row]).reshape(-1, 3)
    return TokenBatch(ids, lengths, where, names)


def rows_of(batch: TokenBatch) -> list[Ids]:
    """Every row's token ids without padding, which know its turns."""
    rows = []
    for ids, n, turns in zip(np.asarray(batch.ids).tolist(), np.asarray(batch.lengths), turns_of(batch), strict=True):
        rows.append(Ids(ids[:n]))
        rows[-1].turns = turns
    return rows


def turns_of(batch: TokenBatch) -> list[tuple[Turn, ...]]:
    """Every row's turns; none for rows that were not made from chats."""
    if batch.turns is None:
        return [()] * len(batch.lengths)
    rows = np.asarray(batch.turns).tolist()
    return [tuple(Turn(batch.names[name], start, stop) for name, start, stop in row if name >= 0) for row in rows]


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
    if not given or ids.turns is None:
        return TokenBatch(array.astype(np.int32), lengths)
    turns = np.asarray(ids.turns)
    if turns.ndim != 3 or turns.shape[::2] != (B, 3) or (turns[..., 2] > lengths[:, None]).any():
        raise ValueError(
            f"turns {list(turns.shape)} do not belong to rows of {lengths} tokens; tokenize the chats again"
        )
    return TokenBatch(array.astype(np.int32), lengths, turns, ids.names)


def length_batches(rows: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[list[int], TokenBatch]]:
    """Rows sorted by length into batches of one shape for each length bucket: (indices of the rows, batch).

    A batch holds at most `max_tokens` tokens, padding included, but at least one row; a bucket with fewer rows than that has
    a power of two of them, so that few shapes compile. Its last batch is filled up with other rows of the bucket, which no
    index names; where these are too few, with a second copy of some, but never a third.
    """
    by_bucket: dict[int, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        by_bucket.setdefault(bucket(len(rows[i])), []).append(i)
    batches = []
    for length, members in by_bucket.items():
        size = max(1, min(max_tokens // length, 1 << (len(members) - 1).bit_length()))
        for at in range(0, len(members), size):
            indices = members[at : at + size]
            filled = indices + members[: size - len(indices)]
            batches.append((indices, pad([rows[i] for i in filled], length)))
    return batches


class Span(NamedTuple):
    """Positions `start <= position < stop` of one row."""

    start: int
    stop: int


def spans(
    selection: Selection, length: int, new_tokens: int = 0, turns: Sequence[Turn] = (), row: int | None = None
) -> list[Span]:
    """The absolute spans, in order and apart, that `selection` names in a row of `length` prompt tokens, up to
    `new_tokens` generated ones, and `turns`.

    Raises ValueError, naming the `row`, where it names none: an intervention or a measurement that never happens is a
    mistake.
    """
    total = length + new_tokens
    where = "" if row is None else f" (row {row})"
    named = {
        "all": Span(0, END),
        "prompt": Span(0, length),
        "generated": Span(length, END),
        "last": Span(length - 1, length),
    }
    if isinstance(selection, str):
        found = [named[selection]] if selection in named else _turn_spans(selection, turns, ", ".join(named), where)
    elif isinstance(selection, slice):
        if selection.step not in (None, 1):
            raise ValueError(f"token selection {selection} has a step; list the positions instead")
        start, stop = selection.start or 0, END if selection.stop is None else selection.stop
        found = [Span(max(0, start + length) if start < 0 else start, stop + length if stop < 0 else stop)]
    else:
        positions = np.atleast_1d(np.asarray(selection, object)).tolist()
        if not all(isinstance(p, int | np.integer) and not isinstance(p, bool) for p in positions):
            raise ValueError(
                f"token selection {selection!r}: expected a name, a slice, or whole numbers for positions{where}"
            )
        found = [Span(p, p + 1) for p in sorted({int(p) + length if p < 0 else int(p) for p in positions})]
        for position, _ in found:
            if not 0 <= position < total:
                raise ValueError(
                    f"token selection {selection!r}: position {position} is outside this row's {total} tokens{where}"
                )
    if not any(max(0, span.start) < min(span.stop, total) for span in found):
        generated = f" and {new_tokens} to be generated" if new_tokens else " and none to be generated"
        raise ValueError(
            f"token selection {selection!r} is empty for a row of {length} prompt tokens{generated}{where}"
        )
    apart = found[:1]  # no token twice, and no two spans that could be one
    for span in found[1:]:
        if span.start <= apart[-1].stop:
            apart[-1] = Span(apart[-1].start, max(apart[-1].stop, span.stop))
        else:
            apart.append(span)
    return apart


def _turn_spans(selection: str, turns: Sequence[Turn], others: str, where: str) -> list[Span]:
    name, _, number = selection.partition(":")
    content = [turn for turn in turns if turn.name != BEFORE_ANSWER]
    chosen = content if name == "turn" and number else [turn for turn in turns if turn.name == name]
    if number:
        at = int(number) if number.removeprefix("-").isdecimal() else len(chosen)
        chosen = [chosen[at]] if -len(chosen) <= at < len(chosen) else []
    if not chosen:
        known = ", ".join(f"{turn.name} (turn:{i})" for i, turn in enumerate(content))
        if content and len(content) == len(turns):
            known += f"; there is no {BEFORE_ANSWER}, since neither an answer nor a generation prompt ends the chat"
        has = f"this row has the turns {known}" if turns else "this row has no turns, since it was not made from a chat"
        raise ValueError(
            f"unknown token selection {selection!r}{where}; known are {others}, slices and positions; {has}"
        )
    for turn in chosen:
        if turn.start < 0:
            raise ValueError(f"token selection {selection!r}{where}: it is not known which tokens the turn {turn.name!r} is: "
                             f"{UNKNOWN[-1 - turn.start]}")  # fmt: skip
    return sorted(Span(turn.start, turn.stop) for turn in chosen if turn.start < turn.stop)


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a checkpoint says beside it: special ids and the chat template.

    `template_vars` is what the chat template is given besides the chat, `add_generation_prompt`, `bos_token` and
    `eos_token`. It switches thinking off, by the names that templates have for that; a checkpoint adds its other
    special tokens (`{"pad_token": "<pad>"}`), a user whatever else a template reads.
    """

    def __init__(self, backend, *, bos=None, eos=None, prefix=(), chat_template=None, stop_ids=(), template_vars=None):
        if backend.post_processor is not None and b'"trim_offsets":true' in backend.post_processor.__getstate__():
            # It would place special tokens, which are not asked for here, and take white space out of tokens' offsets.
            backend.post_processor = None
        self.backend = backend
        self.bos, self.eos = bos, eos  # token ids or None
        self.prefix = tuple(prefix)  # token ids that every plain text begins with; chats have theirs in the template
        self.chat_template = chat_template  # jinja source or None
        self.stop_ids = tuple(stop_ids)  # ids that end an answer
        self.template_vars = {"enable_thinking": False, "thinking": False, **(template_vars or {})}
        self._compiled = (None, None)  # (source, template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text. Special tokens written out in the text are recognised, as in transformers."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [*self.prefix, *ids]

    def encode_chat(self, chat: Chat, add_generation_prompt: bool = True) -> Ids:
        """Token ids of the rendered chat, which know where its turns lie."""
        now, deadline = datetime.datetime.now(), time.monotonic() + templates.SECONDS

        def write(turns):
            return self._render(turns, add_generation_prompt, now, deadline)

        text = write(chat)
        encoded = self.backend.encode(text, add_special_tokens=False)
        ids = Ids(encoded.ids)
        places = templates.contents(write, chat, text)
        added = self.backend.get_added_tokens_decoder()
        ids.turns = _turns(chat, places, ids, encoded.offsets, added, len(text), add_generation_prompt)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, index: int) -> str:
        """The text of one token, for display."""
        return self.backend.decode([int(index)], skip_special_tokens=False)

    def render(self, chat: Chat, add_generation_prompt: bool = True) -> str:
        """The chat as text in the model's own template, by default ready for the assistant's answer.

        Raises ValueError where there is no template, the chat is none, or the template refuses it or does not end.
        """
        return self._render(chat, add_generation_prompt)

    def _render(self, chat, add_generation_prompt, now=None, deadline=None) -> str:
        if not self.chat_template:
            raise ValueError(
                "this model has no chat template; give plain texts instead of chats (`--raw` on the command line)"
            )
        for turn in chat:
            if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
                raise ValueError(f"a chat is a list of {{'role': ..., 'content': ...}}, not {turn!r}")
            if not isinstance(turn["role"], str) or not isinstance(turn["content"], str):
                raise ValueError(f"a turn's role and content are texts, not {turn!r}")
        if not chat:
            raise ValueError("a chat needs at least one turn")
        if self._compiled[0] != self.chat_template:
            self._compiled = self.chat_template, templates.compile(self.chat_template)
        name = {i: self.backend.id_to_token(i) if i is not None else "" for i in (self.bos, self.eos)}
        variables = {"bos_token": name[self.bos], "eos_token": name[self.eos], **self.template_vars}
        return templates.render(self._compiled[1], chat, {**variables, "add_generation_prompt": add_generation_prompt},
                                now, deadline)  # fmt: skip


def _turns(chat, places, ids, offsets, added: Mapping[int, Any], size: int, prompted: bool) -> tuple[Turn, ...]:
    """The turns of a chat of `size` characters, from its contents' `places` in it and its tokens' `offsets`."""
    # In order, no further than the text, and all in it: else the offsets mean something else.
    starts, stops = [start for start, _ in offsets], [stop for _, stop in offsets]
    sound = starts == sorted(starts) and stops == sorted(stops) and all(a <= b <= size for a, b in offsets)

    turns, first = [], len(ids)
    for turn, place in zip(chat, places, strict=True):
        if isinstance(place, str) or not sound:
            first = -1 - UNKNOWN.index(place if isinstance(place, str) else UNKNOWN[-1])
            turns.append(Turn(turn["role"], first, first))
            continue
        start, stop = place
        first = bisect.bisect_right(stops, start)
        last = bisect.bisect_left(starts, stop) if start < stop else first
        # An added token may swallow the white space beside it: what it is remains the template's.
        if first < last and starts[first] < start and ids[first] in added:
            first += 1
        if first < last and stops[last - 1] > stop and ids[last - 1] in added:
            last -= 1
        turns.append(Turn(turn["role"], first, max(first, last)))
    if prompted:
        first = len(ids)
    if prompted or chat[-1]["role"] == "assistant":
        turns.append(Turn(BEFORE_ANSWER, first - 1, first) if first >= 0 else Turn(BEFORE_ANSWER, first, first))
    return tuple(turns)


def encode(
    tokenizer: Tokenizer, inputs: str | Chat | Sequence[str | Chat], add_generation_prompt: bool = True
) -> list[list[int]]:
    """Token ids of one or several texts and chats (a chat is rendered up to the start of the assistant's answer).

    Without the generation prompt a chat ends as it does: with the answer, where its last turn is the assistant's.
    """

    def is_chat(value: Any) -> bool:
        return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], dict)

    if isinstance(inputs, dict) or not hasattr(inputs, "__iter__"):
        raise TypeError(
            f"{type(inputs).__name__} is neither a text, nor a chat (a list of role/content turns), nor a list of them"
        )
    rows: list[Any] = [inputs] if isinstance(inputs, str) or is_chat(inputs) else list(inputs)
    encoded: list[list[int]] = []
    for i, row in enumerate(rows):
        if isinstance(row, str):
            encoded.append(tokenizer.encode(row))
        elif is_chat(row):
            encoded.append(tokenizer.encode_chat(row, add_generation_prompt))
        else:
            raise TypeError(
                f"row {i} is {type(row).__name__}; expected a text or a chat (a list of role/content turns); token ids are "
                "given as an array, numpy.array(ids) [B, T]"
            )
    return encoded
