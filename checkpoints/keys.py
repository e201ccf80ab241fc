"""Read a checkpoint's configuration key by key; a key that nobody asked for is one that is not understood."""

from collections.abc import Iterable, Mapping
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that is damaged or not understood. The message names the file and what in it is at fault."""


REQUIRED: Any = object()


class Keys:
    """`keys(name, default)` is a value, `default` where it is absent or null; `finish` refuses what was never asked for.

    `where` and `what` begin every message: the file, and which part of it; `names` says what the file itself calls a key.
    """

    def __init__(
        self, where: str, values: Mapping[str, Any], what: str = "configuration", names: Mapping[str, str] | None = None
    ):
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where}: {what} is {type(values).__name__}, not a table of keys")
        self.where, self.what, self.names = where, what, names or {}
        self._values = values
        self._left = {name for name, value in values.items() if value is not None}  # null says "not set"

    def __call__(self, name: str, default: Any = REQUIRED) -> Any:
        self._left.discard(name)
        value = self._values.get(name)
        if value is None:
            if default is REQUIRED:
                raise CheckpointError(f"{self.where}: the {self.what} key {self.names.get(name, name)} is missing")
            return default
        return value

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def has(self, name: str) -> bool:
        """Whether the key stands there at all, null included."""
        return name in self._values

    def set(self, name: str, value: Any) -> None:
        """Put a family's default where a configuration says nothing, or what a key means here in its place."""
        self._values = {**self._values, name: value}

    def fault(self, name: str, problem: str) -> CheckpointError:
        shown = self.names.get(name, name)
        return CheckpointError(f"{self.where}: {self.what} key {shown} is {self._values.get(name)!r}; {problem}")

    def whole(self, name: str, default: Any = REQUIRED) -> Any:
        value = self(name, default)
        if value is default:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
            raise self.fault(name, "expected a whole number")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        value = self(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise self.fault(name, "expected a finite number")
        return float(value)

    def positive(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.number(name, default)
        if value is not default and value <= 0:
            raise self.fault(name, "expected a number above 0")
        return value

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        value = self(name)
        if not isinstance(value, list | tuple) or len(value) != count:
            raise CheckpointError(f"{self.where}: {self.what} key {name} should be a list of {count} numbers")
        if not all(isinstance(v, int | float) and 0 < v < 1e300 for v in value):
            raise CheckpointError(f"{self.where}: {self.what} key {name} holds something other than positive numbers")
        return tuple(float(v) for v in value)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        value = self(name, default)
        if not isinstance(value, bool):
            raise self.fault(name, "expected true or false")
        return value

    def one_of(self, name: str, known: Mapping[str, Any], default: Any = REQUIRED) -> Any:
        """What `known` says of the value."""
        value = self(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.fault(name, f"supported: {', '.join(known)}")
        return known[value]

    def insist(self, name: str, *allowed: Any) -> None:
        """A key that may stand here only with a value that changes nothing (or be absent)."""
        value = self(name, None)
        if value is not None and value not in allowed:
            raise self.fault(name, "this is not supported")

    def ignore(self, *names: str) -> None:
        self._left -= set(names)

    def finish(self, inert: Iterable[str] = ()) -> None:
        """Refuse every key that was neither read nor is known to leave the computation alone."""
        if unknown := sorted(self._left - set(inert)):
            raise CheckpointError(
                f"{self.where}: unknown {self.what} keys {', '.join(self.names.get(name, name) for name in unknown)}"
            )
