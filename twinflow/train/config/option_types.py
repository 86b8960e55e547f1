"""`Kind`: what a value of an option may be, and how it is read from JSON or from the command line."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Args:
        wanted: in words, for the message `train: <name> must be <wanted>, got <actual>`.
        read: a JSON value or a text -> the value; raises ValueError, TypeError, KeyError or OverflowError.
        instead: refused value -> what to use instead, for the message.
    """

    wanted: str
    read: Callable[[Any], Any]
    instead: Mapping[str, str] = field(default_factory=dict, hash=False)

    def convert(self, name: str, value: Any) -> Any:
        """The value of an option.

        Raises:
            ValueError: it is not of this kind.
        """
        try:
            return self.read(value)
        except (ValueError, TypeError, KeyError, OverflowError):
            hint = self.instead.get(value, "") if isinstance(value, str) else ""
            hint = f": {hint}" if hint else ""
            raise ValueError(f"train: {name} must be {self.wanted}, got {shown(value)}{hint}") from None


def shown(value: object) -> str:
    """A value as one line of at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out integers of more than 4300 digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole(low: int, high: int = _MOST) -> Kind:
    """Integers in [low, high]."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError
        number = float(value)
        if number != math.floor(number) or not low <= number <= high:
            raise ValueError
        return int(number)

    return Kind(f"an integer >= {low}" if high == _MOST else f"an integer from {low} to {high}", read)


def number(low: float, high: float = 1e30, *, open_low: bool = False, open_high: bool = False) -> Kind:
    """Finite numbers between two bounds, which belong to them unless open."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError
        found = float(value)
        if not low <= found <= high or (open_low and found == low) or (open_high and found == high):  # so with NaN
            raise ValueError
        return found

    if high == 1e30:
        return Kind(f"a number {'>' if open_low else '>='} {low:g}", read)
    return Kind(f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}", read)


def choice(*names: str, instead: Mapping[str, str] | None = None, **same: str) -> Kind:
    """One of the names; `same`: other name -> the name that it stands for; `instead`: for refused names."""

    def read(value: Any) -> str:
        found = same.get(value, value) if isinstance(value, str) else value
        if found not in names or not isinstance(found, str):
            raise ValueError
        return found

    return Kind(f"one of {', '.join(names)}" if len(names) > 1 else names[0], read, instead or {})


def _bool(value: Any) -> bool:
    if not isinstance(value, (bool, int, str)):
        raise TypeError
    return _BOOLS[str(value).strip().lower()]


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise TypeError
    value.encode()  # a lone surrogate, which JSON can hold, cannot be printed or written
    return value


def _texts(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not all(map(str, found)):
        raise TypeError
    return tuple(map(_text, found))


def _size(value: Any) -> tuple[int, int]:
    parts = value.lower().split("x") if isinstance(value, str) else value
    parts = [parts, parts] if isinstance(parts, (int, float)) else list(parts)
    if len(parts) == 1:
        parts *= 2
    width, height = map(PIXELS.read, parts)
    return width, height


def _path(value: Any) -> Path:
    return Path(_text(str(value) if isinstance(value, Path) else value))


def _raw(value: Any) -> Any:
    return value


PIXELS = whole(16, 65536)
BOOL = Kind("true or false", _bool)
TEXT = Kind("a string", _text)
TEXTS = Kind("a string or a list of strings", _texts)
PATH = Kind("a path", _path)
SIZE = Kind("pixels as 1024 or 1024x768", _size)
RAW = Kind("", _raw)  # read elsewhere
