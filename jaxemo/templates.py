"""Chat templates: run one on a chat, and find where each turn's text went.

A template is a Jinja program that comes with the weights: code from a stranger. It runs in Jinja's sandbox, narrowed
to what chat templates use, and every step and every value it makes is counted. The counting is cooperative (no thread,
signal or process): loops, calls, filters, comparisons and output look at the clock, and what can make much out of
little (`*`, `**`, `~`, join, replace, ...) is measured before it is done.
"""

import contextvars
import dataclasses
import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes
from jinja2.compiler import CodeGenerator

SECONDS = 1.0  # for one chat; templates take milliseconds
SOURCE = 1 << 16  # characters of a template, which compile in 2 s at most
SMALLEST = 1 << 20  # characters that any template may write: room for long fixed texts
FACTOR = 16  # ... or this many times the chat: templates repeat a turn a few times at most
WORK = 64  # what is made on the way, in all, in units of what may be written
DEPTH = 64  # calls within calls
ITEM = 16  # what an element of a list, or a step, counts as, in characters

LEFT_OUT = "the template leaves it out"
REPEATED = "the template writes it more than once"
CHANGED = "the template changes it, or what is around it, depending on its text"
FAILED = "the template fails, or takes too long, when the turn's text is replaced to find it"


class _Refused(ValueError):
    """Raised by what is in here; anything else that comes out of a template is its own mistake."""


@dataclasses.dataclass
class _Meter:
    """What one rendering may still do."""

    deadline: float
    limit: int  # characters of a value, an element counting as ITEM
    now: datetime.datetime
    known: dict[int, int]  # weights of the chat's own turns, which templates gather again and again
    spent: int = 0
    depth: int = 0


_METER: contextvars.ContextVar[_Meter] = contextvars.ContextVar("chat template")


def _tick(cost: int = ITEM) -> _Meter:
    meter = _METER.get()
    meter.spent += cost
    if time.monotonic() > meter.deadline:
        raise _Refused(f"the chat template was stopped after {SECONDS:g} s: it loops, or the chat is too long for it")
    if meter.spent > WORK * meter.limit:
        raise _Refused(f"the chat template was stopped: it makes more than {WORK * meter.limit} characters on its way")
    return meter


def _fit(size: int) -> None:
    limit = _METER.get().limit
    if size > limit:
        raise _Refused(f"the chat template was stopped: it makes a value of more than {limit} characters")


def _weight(value: Any) -> int:
    """Characters and elements of a value, as if nothing in it were shared: what printing or comparing it would walk."""
    if isinstance(value, str):
        return len(value)
    meter, total, stack = _METER.get(), 0, [value]
    while stack:
        item = stack.pop()
        total += ITEM
        if isinstance(item, str):
            total += len(item)
        elif id(item) in meter.known:
            total += meter.known[id(item)]
        elif isinstance(item, Mapping):
            stack += [*item, *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            stack += item
        if total > meter.limit:
            break
    return total


def _weighed(value: Any) -> Any:
    """The value, once it is known to be small enough and is paid for."""
    if isinstance(value, str):
        _fit(len(value))
        _tick(len(value))
    elif isinstance(value, list | tuple | set | frozenset | Mapping):
        _fit(_weight(value))
        _tick(ITEM * len(value))
    return value


def _ticking(values: Iterable) -> Iterator:
    for value in values:
        _tick()
        yield value


def _counted(value: Any) -> Any:
    return _ticking(value) if isinstance(value, Iterator) else value


# ---- what templates may use ------------------------------------------------------------------------------------------

METHODS = {  # type → its methods
    str: "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit isidentifier "
    "islower isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace "
    "rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper",
    dict: "copy get items keys values",
    list: "copy count index",
    tuple: "count index",
}  # fmt: skip
_ALLOWED = {kind: frozenset(names.split()) for kind, names in METHODS.items()}
OBJECTS = (jinja2.runtime.LoopContext, jinja2.runtime.Macro, jinja2.runtime.BlockReference,
           jinja2.runtime.TemplateReference, jinja2.utils.Namespace, jinja2.utils.Cycler, jinja2.utils.Joiner)  # fmt: skip
FILTERS = (
    "abs capitalize count d default dictsort e escape first float int items last length list lower map max min reject "
    "rejectattr reverse safe select selectattr sort string title trim unique upper wordcount"
)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that Python or Jinja read for themselves."""

    def __init__(*args, **kwargs):
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        if any(not isinstance(name, str) or name.startswith("_") for name in attributes):
            raise _Refused("the chat template gives a namespace a name that starts with an underscore")
        jinja2.utils.Namespace.__init__(self, attributes)

    def __repr__(self):  # Jinja's walks what may be nested without end
        return "<namespace>"


def _raise_exception(message):
    raise _Refused(f"the chat template refuses this chat: {str(message)[:1000]}")


def _strftime_now(form):
    if len(form) > 100 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise _Refused(f"the chat template asks for the date as {form[:100]!r}")
    return _METER.get().now.strftime(form)


def _replace(text, old, new, count=None):
    text, old, new = str(text), str(old), str(new)
    _fit(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _joined(separator, values):
    texts = []
    for value in _ticking(values):
        texts.append(_weighed(str(value)))
    _fit(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


@jinja2.pass_environment
def _join(environment, value, d="", attribute=None):
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    return _joined(str(d), value)


def _indent(s, width=4, first=False, blank=False):
    by = len(width) if isinstance(width, str) else int(width)
    _fit(len(s) + by * (len(s) + 1))
    return jinja2.filters.do_indent(s, width, first, blank)


def _round(value, precision=0, method="common"):
    if abs(precision) > 20:
        raise _Refused(f"the chat template rounds to {precision} digits")
    return jinja2.filters.do_round(value, precision, method)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    by = indent if isinstance(indent, int) else len(indent or "")
    if by > 64 or any(len(text) > 64 for text in separators or ()):
        raise _Refused("the chat template asks for JSON with very wide spaces")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _concatenated(encoder.iterencode(value))


def _check_format(form: str, values: Any) -> None:
    """Refuse widths that values or large numbers set; the rest makes each value at most once a field."""
    if re.search(r"\d{4}|\*|:[^}]*\{", form):
        raise _Refused(f"the chat template formats text with a width that is not understood: {form[:100]!r}")
    _fit(len(form) + (form.count("%") + form.count("{")) * (1000 + _weight(values)))


def _format(value, *args, **kwargs):
    _check_format(str(value), kwargs or args)
    return str(value) % (kwargs or args)


def _concatenated(pieces: Iterable[str]) -> str:
    kept, total = [], 0
    for piece in pieces:
        _tick()
        total += len(piece)
        _fit(total)
        kept.append(piece)
    return _weighed("".join(kept))


@jinja2.pass_context  # so that Jinja cannot evaluate constants when it compiles, where nothing is counted
def _finalize(context, value):
    return _weighed(str(value))


def _guard(function: Callable) -> Callable:
    """A filter or test whose use is counted."""

    @functools.wraps(function)  # with Jinja's mark of what to pass first
    def guarded(*args, **kwargs):
        _tick()
        return _weighed(function(*map(_counted, args), **kwargs))

    return guarded


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the model writes, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _CodeGenerator(CodeGenerator):
    """Jinja's compiler, with the counting put where Jinja offers no hook."""

    def _wrapped(self, visit, node, frame):
        self.write("environment.weighed(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node, frame):
        self._wrapped(super().visit_List, node, frame)

    def visit_Dict(self, node, frame):
        self._wrapped(super().visit_Dict, node, frame)

    def visit_Tuple(self, node, frame):
        if node.ctx == "load":
            self._wrapped(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node, frame):
        if isinstance(node.arg, nodes.Slice):
            self._wrapped(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Concat(self, node, frame):
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")

    def visit_Compare(self, node, frame):
        self.write("(environment.tick() and ")
        super().visit_Compare(node, frame)
        self.write(")")

    def visit_For(self, node, frame):
        # Before the loop's `if`, so that elements left out count as well.
        node.iter = nodes.Call(nodes.EnvironmentAttribute("ticking"), [node.iter], [], None, None)
        super().visit_For(node, frame)

    def visit_NSRef(self, node, frame):
        if node.attr.startswith("_"):
            self.fail(f"a namespace cannot have {node.attr!r}", node.lineno)
        super().visit_NSRef(node, frame)

    def visit_ScopedEvalContextModifier(self, node, frame):
        self.fail("a chat is not HTML: autoescape has no place here", node.lineno)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    weighed, ticking = staticmethod(_weighed), staticmethod(_ticking)
    concat = concatenated = staticmethod(_concatenated)

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_finalize,
                         extensions=[_Generation, jinja2.ext.loopcontrols])  # fmt: skip
        own = {
            "format": _format,
            "indent": _indent,
            "join": _join,
            "replace": _replace,
            "round": _round,
            "tojson": _tojson,
        }
        own |= {name: self.filters[name] for name in FILTERS.split()}
        self.filters = {name: _guard(function) for name, function in own.items()}
        self.tests = {name: _guard(function) for name, function in self.tests.items()}
        self.globals = {
            **{name: self.globals[name] for name in ("range", "cycler", "joiner")},
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace, "raise_exception": _raise_exception, "strftime_now": _strftime_now,
        }  # fmt: skip

    @staticmethod
    def tick() -> bool:
        return _tick() is not None

    def is_safe_attribute(self, obj, attr, value):
        if not super().is_safe_attribute(obj, attr, value):
            return False
        return isinstance(obj, OBJECTS) or any(isinstance(obj, kind) and attr in _ALLOWED[kind] for kind in _ALLOWED)

    def wrap_str_format(self, value):
        made = super().wrap_str_format(value)
        if made is None or value.__name__ != "format":
            return None  # and is not among METHODS

        def formatted(*args, **kwargs):
            _check_format(value.__self__, [args, kwargs])
            return made(*args, **kwargs)

        return formatted

    def call(self, context, obj, /, *args, **kwargs):
        meter = _tick()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", None)
        if isinstance(owner, str) and name in ("replace", "join"):
            obj = functools.partial(_replace if name == "replace" else _joined_strings, owner)
        meter.depth += 1
        if meter.depth > DEPTH:
            raise _Refused(f"the chat template was stopped: its calls are nested more than {DEPTH} deep")
        try:
            return _weighed(super().call(context, obj, *map(_counted, args), **kwargs))
        finally:
            meter.depth -= 1

    def call_binop(self, context, operator, left, right):
        _tick()
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(0, right)}
            if bits.get(operator, 0) > 4096:
                raise _Refused(f"the chat template computes a number that is too large, with {operator}")
        elif operator == "*" and isinstance(left, int) != isinstance(right, int):
            sequence, times = (right, left) if isinstance(left, int) else (left, right)
            _fit(_weight(sequence) * (times if isinstance(times, int) else 1))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        elif operator == "+" and isinstance(left, str | list | tuple):
            _fit(_weight(left) + _weight(right))
        return _weighed(super().call_binop(context, operator, left, right))


def _joined_strings(separator, values):
    values = list(values)
    if not all(isinstance(value, str) for value in values):
        raise TypeError("join: not all are strings")
    return _joined(separator, values)


# ---- rendering -------------------------------------------------------------------------------------------------------


def compile(source: str) -> jinja2.Template:
    """The template of Jinja `source`. Raises ValueError where it is not one."""
    if len(source) > SOURCE:
        raise ValueError(f"the chat template has {len(source)} characters; at most {SOURCE} are read")
    try:
        return _Environment().from_string(source)
    except Exception as error:  # Jinja and Python refuse in many ways, and the text may be anything
        where = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ValueError(f"the chat template cannot be read{where}: {str(error)[:1000]}") from error


def render(
    template: jinja2.Template,
    chat: Sequence[Mapping[str, str]],
    variables: Mapping[str, Any],
    now: datetime.datetime | None = None,
    deadline: float | None = None,
) -> str:
    """The chat as the template writes it, with `variables` (`add_generation_prompt`, `bos_token`, ...) at its disposal.

    Raises ValueError where the template refuses the chat, fails on it, or runs longer (SECONDS, or until `deadline` of
    `time.monotonic`) or writes more than it may: 1 MiB, or 16 times a chat that is long, with 64 KiB to spare.
    """
    messages = [dict(turn) for turn in chat]  # its own: a template changes nothing of the caller's
    size = sum(ITEM + len(turn["role"]) + len(turn["content"]) for turn in messages)
    meter = _Meter(
        deadline=time.monotonic() + SECONDS if deadline is None else deadline,
        limit=max(SMALLEST, FACTOR * size + (1 << 16)),
        now=datetime.datetime.now() if now is None else now,
        known={id(turn): 5 * ITEM + sum(len(key) + len(text) for key, text in turn.items()) for turn in messages},
    )
    token = _METER.set(meter)
    try:
        return template.render(messages=messages, tools=None, documents=None, **variables)
    except _Refused:
        raise
    except Exception as error:  # whatever a stranger's program does wrong
        raise ValueError(
            f"the chat template failed on this chat: {type(error).__name__}: {str(error)[:1000]}"
        ) from error
    finally:
        _METER.reset(token)


def contents(
    write: Callable[[Sequence[Mapping[str, str]]], str], chat: Sequence[Mapping[str, str]], text: str
) -> list[tuple[int, int] | str]:
    """Where each turn's content lies in `text = write(chat)`: (start, stop) in characters, or why that is unknown.

    The turn's content is replaced by a word found nowhere else. If what stands before and after the word also begins
    and ends `text`, what is between is what the template made of the content; it must be a piece of it, for templates
    cut off white space, and thoughts in earlier turns. Nothing is guessed: in any other case the place is unknown.
    """
    taken = "\n".join([text, *(turn["content"] for turn in chat)])
    word = "qzxjk"
    while word in taken:
        word += "q7"
    found: list[tuple[int, int] | str] = []
    for i, turn in enumerate(chat):
        try:
            parts = write([*chat[:i], {**turn, "content": word}, *chat[i + 1 :]]).split(word)
        except ValueError:
            found.append(FAILED)
            continue
        if len(parts) != 2:
            found.append(LEFT_OUT if len(parts) == 1 else REPEATED)
            continue
        before, after = parts
        start, stop = len(before), len(text) - len(after)
        same = (
            start <= stop and text.startswith(before) and text.endswith(after) and text[start:stop] in turn["content"]
        )
        found.append((start, stop) if same else CHANGED)
    return found
