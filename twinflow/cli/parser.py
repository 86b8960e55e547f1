"""`Parser`: a command's arguments: mistakes in a line, defaults in the help, no guessing of abbreviations."""

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """As argparse's, with other defaults."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Help)
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Ends the process with a line."""
        more = "" if message.endswith("?") else f"; `{self.prog} --help` shows all"
        self.exit(2, f"{self.prog}: {message}{more}\n")

    def refuse(self, extra: str) -> NoReturn:
        """Ends the process with an argument that nothing takes, and the nearest option."""
        option, known = extra.partition("=")[0], [name for action in self._actions for name in action.option_strings]
        if option.startswith("-"):
            self.error(f"there is no option {option!r}{did_you_mean(option, known)}")
        self.error(f"there is no place for {option!r}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question for the one of some names that is most like another; "": none is."""
    found = difflib.get_close_matches(name, [*known], 1, 0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


class _Help(argparse.HelpFormatter):
    """Adds defaults where there are some and the text does not say them."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        nothing = default is None or default is False or default == [] or default is argparse.SUPPRESS
        shown = bool(action.option_strings) and not nothing
        return f"{text} (default: %(default)s)" if shown and "(default" not in text else text
