"""`Parser`: a command's arguments: lists as people type them, mistakes in a line, defaults and examples in the help."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from twinflow.suggest import did_you_mean, nearest

_NEGATIVE = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
EXAMPLES = "examples:"  # how the part of a help begins whose lines stay as they are


def as_path(text: str) -> Path:
    """A path as it is typed: `~` is the home folder, also where a shell leaves it, as in --out=~/pictures."""
    return Path(os.path.expanduser(text))


class Parser(argparse.ArgumentParser):
    """As argparse's, with no guessing of abbreviations and with lists.

    A list is an option with `nargs="+"` and `action="append"`: `--x a b` and `--x a --x b` are the same. It takes all
    words up to the next option, and so may a switch with `nargs="?"` take one; `is_positional` tells which word is not
    theirs but the command's positional argument (`nargs="?"`), and `needs_positional` whether there must be one.
    """

    is_positional: Callable[[str], bool]
    needs_positional = False

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Help)
        self.is_positional = lambda word: False
        super().__init__(**options, allow_abbrev=False)
        self._negative_number_matcher = _NEGATIVE  # Python's own takes -1e-4 for an option

    def error(self, message: str) -> NoReturn:
        """Ends the process with a line, of the first rank where several say the same."""
        more = "" if message.endswith("?") else f"; `{self.prog} --help` shows all"
        self.exit(2, f"{self.prog}: {message}{more}\n" if os.environ.get("RANK", "0") == "0" else None)

    def settle(self, options: argparse.Namespace, words: Sequence[str]) -> None:
        """Joins the parts of each list, and gives the positional argument the word that an option before it took.

        Args:
            options: as parsed; changed in place.
            words: that were parsed.
        """
        lists = {action.dest for action in self._actions if action.nargs == "+"}
        switches = {action.dest for action in self._actions if action.nargs == "?" and action.option_strings}
        place = next((action for action in self._actions if action.nargs == "?" and not action.option_strings), None)
        for name in (lists | switches) & vars(options).keys():
            value = getattr(options, name)
            if name in lists:
                for part in value or ():
                    if place is not None and len(part) > 1 and self._reclaim(options, place, part[-1]):
                        part.pop()
                setattr(options, name, [word for part in value or () for word in part])
            elif place is not None and self._reclaim(options, place, value):
                setattr(options, name, True)
        if place is None:
            return
        value = getattr(options, place.dest)
        if value is None and self.needs_positional:
            self.error(f"the following arguments are required: {place.metavar}")
        if value is not None and not self.is_positional(str(value)) and str(value) in words:
            self._refuse_value(str(value), words)

    def _reclaim(self, options: argparse.Namespace, place: argparse.Action, word: object) -> bool:
        if not isinstance(word, str) or not self.is_positional(word) or getattr(options, place.dest) is not None:
            return False
        setattr(options, place.dest, place.type(word) if callable(place.type) else word)
        return True

    def _refuse_value(self, word: str, words: Sequence[str]) -> None:
        """Ends the process where a word stands behind an option that has its value already."""
        before = [*words][: [*words].index(word)]
        option = next((k for k in reversed(range(len(before))) if before[k].startswith("--")), None)
        if option is not None and (option < len(before) - 1 or "=" in before[option]):
            name = before[option].partition("=")[0]
            self.error(f"there is no place for {word!r} after {name} and its value")

    def refuse(self, extra: str, words: Sequence[str]) -> NoReturn:
        """Ends the process with an argument that nothing takes: an unknown option, or a value too many."""
        option = extra.partition("=")[0]
        if not option.startswith("-"):
            self._refuse_value(extra, words)
            self.error(f"there is no place for {extra!r}")
        before = next((word for word in reversed(words[: [*words].index(extra)]) if word.startswith("--")), "")
        if not option.startswith("--") and before:
            form = f"{before.partition('=')[0]}={extra}"
            self.error(f"there is no option {option!r}; a value that begins with a dash is written {form}")
        shown = (action for action in self._actions if action.help != argparse.SUPPRESS)
        known = [name.lstrip("-") for action in shown for name in action.option_strings]
        near = did_you_mean([f"--{name}" for name in nearest(option.lstrip("-"), known, "twinflow_")])
        self.error(f"there is no option {option!r}{f'; {near}' if near else ''}")


class _Help(argparse.HelpFormatter):
    """Adds defaults where the text does not say them, leaves examples as they are, and fits wide terminals."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **options)
        self._max_help_position = max(24, min(38, self._width // 3))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLES) else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        silent = default in (None, argparse.SUPPRESS, []) or default is False or "(default" in text
        return text if silent or not action.option_strings else f"{text} (default: %(default)s)"
