"""`Parser`: a command's arguments: lists as people type them, mistakes in a line, defaults and examples in the help."""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from twinflow.suggest import nearest

EXAMPLES = "examples:"  # how the part of a help begins whose lines stay as they are


class Parser(argparse.ArgumentParser):
    """As argparse's, with no guessing of abbreviations and with lists.

    A list is an option with `nargs="+"` and `action="append"`: `--x a b` and `--x a --x b` are the same. It takes all
    words up to the next option, and so may a switch with `nargs="?"` take one; `is_positional` tells which word is not
    theirs but the command's positional argument (`nargs="?"`), and `needs_positional` whether there must be one.
    """

    is_positional: Callable[[str], bool] | None = None
    needs_positional = False

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Help)
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Ends the process with a line, of the first rank where several say the same."""
        more = "" if message.endswith("?") else f"; `{self.prog} --help` shows all"
        self.exit(2, f"{self.prog}: {message}{more}\n" if os.environ.get("RANK", "0") == "0" else None)

    def settle(self, options: argparse.Namespace) -> None:
        """Joins the parts of each list, and gives the positional argument the word that an option before it took."""
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
        if place is not None and self.needs_positional and getattr(options, place.dest) is None:
            self.error(f"the following arguments are required: {place.metavar}")

    def _reclaim(self, options: argparse.Namespace, place: argparse.Action, word: object) -> bool:
        if self.is_positional is None or getattr(options, place.dest) is not None:
            return False
        if not isinstance(word, str) or not self.is_positional(word):
            return False
        setattr(options, place.dest, place.type(word) if callable(place.type) else word)
        return True

    def refuse(self, extra: str, arguments: Sequence[str]) -> NoReturn:
        """Ends the process with an argument that nothing takes: an unknown option, or a value too many."""
        option, index = extra.partition("=")[0], [*arguments].index(extra)
        before = next((word for word in reversed(arguments[:index]) if word.startswith("--")), "").partition("=")[0]
        if option.startswith("-") and not option.startswith("--") and before:
            self.error(f"there is no option {option!r}; a value that begins with a dash is written {before}={extra}")
        if not option.startswith("-"):
            self.error(f"there is no place for {extra!r}{f' after {before} and its value' if before else ''}")
        shown = (action for action in self._actions if action.help != argparse.SUPPRESS)
        near = nearest(option.lstrip("-"), [name.lstrip("-") for action in shown for name in action.option_strings],
                       "twinflow_")  # fmt: skip
        self.error(f"there is no option {option!r}{f'; did you mean --{near}?' if near else ''}")


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
