"""`lookup()`: an entry of a table by its name, and a message with the nearest names where there is none."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def lookup(table: Mapping[str, Entry], name: str, argument: str, *, also: str = "", hint: str = "") -> Entry:
    """The entry of that name.

    Args:
        table: name -> entry.
        name: what was asked for.
        argument: the function and the argument, for the message.
        also: what would be accepted beside the names.
        hint: what to do instead.

    Raises:
        ValueError: no such name; the message has those most like it first, then the others.
    """
    if name in table:
        return table[name]
    close = difflib.get_close_matches(str(name).lower(), table, n=3, cutoff=0.4)
    others = ", ".join(known for known in table if known not in close)
    wanted = " or ".join(close) + (f" (others: {others})" if others else "") if close else f"one of {others}"
    raise ValueError(f"{argument} must be {also}{wanted}, got {name!r}{hint}")
