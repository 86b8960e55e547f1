"""`Kind`: which values an option takes, and how JSON or a command line is read as one."""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinflow.errors import ArgumentError

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Kind:
    """A set of values.

    Args:
        wanted: the set in words, for the message "<option> must be <wanted>, got <actual>".
        read: JSON value or text -> value; raises ValueError, TypeError, KeyError or OverflowError for any other.
        instead: refused value -> what to use instead, for the message.
        metavar: a value's name in the help.
    """

    wanted: str
    read: Callable[[Any], Any]
    instead: Mapping[str, str] = field(default_factory=dict, hash=False)
    metavar: str = "VALUE"

    def convert(self, name: str, value: Any) -> Any:
        """The value of the option called `name`; ArgumentError: it is not of this kind."""
        try:
            return self.read(value)
        except (ValueError, TypeError, KeyError, OverflowError):
            hint = self.instead.get(value, "") if isinstance(value, str) else ""
            raise ArgumentError("train", name, self.wanted, shown(value), hint) from None


def shown(value: object) -> str:
    """A value as one line of at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out integers of more than 4300 digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    return float(value)


def whole(low: int, high: int = _MOST) -> Kind:
    """Integers in [low, high]."""

    def read(value: Any) -> int:
        number = _number(value)
        if number != math.floor(number) or not low <= number <= high:
            raise ValueError
        return int(number)

    return Kind(f"an integer >= {low}" if high == _MOST else f"an integer from {low} to {high}", read, metavar="N")


def number(low: float, high: float = 1e30, *, open_low: bool = False, open_high: bool = False) -> Kind:
    """Finite numbers between two bounds, which belong to them unless open."""

    def read(value: Any) -> float:
        number = _number(value)
        if not low <= number <= high or (open_low and number == low) or (open_high and number == high):  # so with NaN
            raise ValueError
        return number

    if high == 1e30:
        return Kind(f"a number {'>' if open_low else '>='} {low:g}", read, metavar="X")
    bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    return Kind(f"a number in {bounds}", read, metavar="X")


def choice(*names: str, instead: Mapping[str, str] | None = None, **same: str) -> Kind:
    """One of the names; `same`: other name -> the name that it stands for; `instead`: for refused names."""

    def read(value: Any) -> str:
        name = same.get(value, value) if isinstance(value, str) else value
        if not isinstance(name, str) or name not in names:
            raise ValueError
        return name

    return Kind(f"one of {', '.join(names)}", read, instead or {}, "NAME")


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
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(map(str, texts)):
        raise TypeError
    return tuple(map(_text, texts))


def _size(value: Any) -> tuple[int, int]:
    parts = value.lower().split("x") if isinstance(value, str) else value
    parts = [parts, parts] if isinstance(parts, (int, float)) else list(parts)
    width, height = map(PIXELS.read, parts * 2 if len(parts) == 1 else parts)
    return width, height


def _path(value: Any) -> Path:
    return Path(os.path.expanduser(_text(str(value) if isinstance(value, Path) else value)))


def _path_of_any_bytes(value: Any) -> Path:
    text = str(value) if isinstance(value, Path) else value
    if not isinstance(text, str) or "\0" in text:
        raise TypeError
    os.fsencode(text)  # bytes that are no UTF-8 stand in it as lone surrogates
    return Path(os.path.expanduser(text))


def absolute(value: Any) -> Any:
    """A path, or the name of a folder that exists, from the root on; others, and places that are no UTF-8, stay."""
    if not (isinstance(value, Path) or (isinstance(value, str) and os.path.isdir(value))):
        return value
    found = Path(value).absolute()
    with suppress(UnicodeEncodeError):
        str(found).encode()
        return str(found) if isinstance(value, str) else found
    return value


PIXELS = whole(16, 65536)
BOOL = Kind("true or false", _bool, metavar="BOOL")
TEXT = Kind("a string", _text, metavar="TEXT")
NAME_OR_PATH = Kind("a name or a path in UTF-8", lambda value: os.path.expanduser(_text(value)), metavar="NAME")
TEXTS = Kind("a string or a list of strings", _texts, metavar="TEXT")
PATH = Kind("a path in UTF-8", _path, metavar="PATH")  # safetensors opens no other
DATA_PATH = Kind("a path", _path_of_any_bytes, metavar="PATH")
PATHS = (NAME_OR_PATH, PATH, DATA_PATH)
SIZE = Kind("pixels as 1024 or 1024x768", _size, metavar="SIZE")
RAW = Kind("", lambda value: value)  # `objective` reads it
