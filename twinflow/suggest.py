"""`lookup()`, `nearest()`, `did_you_mean()`: what to say of a name that a table does not have."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from twinflow.errors import ArgumentError

Entry = TypeVar("Entry")


def lookup(
    table: Mapping[str, Entry], name: str, function: str, argument: str, *, also: str = "", hint: str = ""
) -> Entry:
    """The entry of that name.

    Args:
        table: name -> entry.
        name: a key of the table.
        function, argument, hint: for the message, as of `ArgumentError`.
        also: what the argument may be beside the names, such as "auto or ".

    Raises:
        ArgumentError: no such name; the message has the three most like it first, then the others.
    """
    if name in table:
        return table[name]
    close = difflib.get_close_matches(str(name).lower(), table, n=3, cutoff=0.4)
    others = ", ".join(known for known in table if known not in close)
    wanted = " or ".join(close) + (f" (others: {others})" if others else "") if close else f"one of {others}"
    raise ArgumentError(function, argument, f"{also}{wanted}", repr(name), hint)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> list[str]:
    """The known names that may be meant: the one that is much like it, with or without a prefix, or up to three."""
    names = [*known]
    near = difflib.get_close_matches(name, names, 1, 0.85)
    near = near or (difflib.get_close_matches(prefix + name, names, 1, 0.8) if prefix else [])
    return near or difflib.get_close_matches(name, names, 3, 0.6)


def did_you_mean(names: Sequence[str]) -> str:
    """A question for these names, of `nearest`; "": there are none."""
    return f"did you mean {', '.join(names[:-1])}{' or ' if names[:-1] else ''}{names[-1]}?" if names else ""
