"""`nearest()`: for messages about a name that is not known."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names most like a wrong one, first, the others in brackets; all of them where none is like it."""
    names = list(known)
    close = difflib.get_close_matches(str(name).lower(), names, n=3, cutoff=0.4)
    rest = ", ".join(n for n in names if n not in close)
    if not close:
        return f"one of {rest}"
    return " or ".join(close) + (f" (others: {rest})" if rest else "")
