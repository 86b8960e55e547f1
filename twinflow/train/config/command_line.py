"""The options of `twinflow train` on the command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twinflow.train.config.option_types import BOOL, PATH, TEXT, TEXTS
from twinflow.train.config.options import ALIASES, OPTIONS, Option, unknown
from twinflow.train.config.simpletuner import HARMLESS, UNSUPPORTED


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the config file and every option, as `--name` and with dashes; only what is given enters the namespace.

    Args:
        parser: of the command; abbreviations are switched off, so that an unknown option is never taken for another.
    """
    parser.allow_abbrev = False
    parser.usage = "%(prog)s [CONFIG] [--OPTION VALUE ...]"
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="a JSON file of the options below")
    spellings: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        spellings.setdefault(name, []).append(alias)
    groups = {group: parser.add_argument_group(group) for group in dict.fromkeys(o.group for o in OPTIONS.values())}
    for option in OPTIONS.values():
        default = "" if option.default in (None, (), "") else f" (default: {option.default})"
        text = f"{option.help}{default}".replace("%", "%%")
        _add(groups[option.group], option, option.name, text)
        for alias in (option.name.replace("_", "-"), *spellings.get(option.name, ())):
            if alias != option.name:
                _add(parser, option, alias, argparse.SUPPRESS)
            if "_" in alias:
                _add(parser, option, alias.replace("_", "-"), argparse.SUPPRESS)
    for name in (*UNSUPPORTED, *HARMLESS):
        flags = sorted({f"--{name}", f"--{name.replace('_', '-')}"})
        parser.add_argument(*flags, dest=name, nargs="?", const=True, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add(parser: Any, option: Option, spelling: str, text: str) -> None:
    more: dict[str, Any] = {"action": "append"} if option.kind is TEXTS else {}
    if option.kind is BOOL or isinstance(option.default, bool):
        more = {"nargs": "?", "const": True}
    metavar = {BOOL: "BOOL", PATH: "PATH", TEXT: "TEXT", TEXTS: "TEXT"}.get(option.kind, "VALUE")
    parser.add_argument(
        f"--{spelling}", dest=option.name, default=argparse.SUPPRESS, metavar=metavar, help=text, **more
    )


def given_options(namespace: argparse.Namespace) -> dict[str, Any]:
    """The options of a parsed command line, by name; an absent `--debug` may be there as False."""
    found = {name: value for name, value in vars(namespace).items() if name in OPTIONS or name in UNSUPPORTED}
    return {name: value for name, value in found.items() if not (name == "debug" and value is False)}


def require_known(extra: Sequence[str]) -> None:
    """Raises ValueError for what argparse's `parse_known_args` could not place, with the nearest known name."""
    if extra:
        raise unknown(extra[0].partition("=")[0])
