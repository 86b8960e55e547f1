"""`twinflow train`: from a folder of images, or prompts, and a config file to a few-step pipeline."""

import argparse
import gc
import traceback
from typing import Any

from twinflow.cli.parser import EXAMPLES, Parser, as_path
from twinflow.train.config import simpletuner
from twinflow.train.config.option_types import BOOL, TEXTS
from twinflow.train.config.resolve import ALIASES, read_config
from twinflow.train.config.settings import OPTIONS, Option, TrainSettings

_EPILOG = f"""{EXAMPLES}
  twinflow train --preset sd3.5-medium-lora --instance_data_dir photos \\
      --output_dir run --dry-run
  twinflow train --preset sd3.5-medium-lora --instance_data_dir photos \\
      --output_dir run --validation_prompts "a red fox" "a blue jay"
  twinflow train config.json --learning_rate 5e-5
  accelerate launch --num_processes 4 -m twinflow train config.json"""


def add_options(parser: Parser) -> None:
    """Declares the config file and every option, without defaults: what is not given stays out of the namespace."""
    parser.usage, parser.epilog = "%(prog)s [CONFIG] [--OPTION VALUE ...]", _EPILOG
    parser.description = (
        "Trains a few-step model on a folder of images with captions, or on prompts alone. The same command resumes a "
        "run that was stopped. Options override those of the config file, which may be one of SimpleTuner's."
    )
    parser.is_positional = lambda word: word.endswith(".json")
    parser.add_argument("config", nargs="?", type=as_path, metavar="CONFIG", help="a JSON file of the options below")
    text = "print the settings, the network calls of a step and the forecast of its memory, and stop"
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help=text)
    spellings: dict[str, list[str]] = {name: [name] for name in OPTIONS}
    for alias, name in ALIASES.items():
        spellings[name].append(alias)
    groups = {group: parser.add_argument_group(group) for group in dict.fromkeys(o.group for o in OPTIONS.values())}
    for name, option in OPTIONS.items():
        _add(groups[option.group], option, name, f"--{name}", _help(option))
        others = {f"--{form}" for known in spellings[name] for form in (known, known.replace("_", "-"))} - {f"--{name}"}
        if others:
            _add(parser, option, name, *sorted(others), argparse.SUPPRESS)
    for name in simpletuner.OPTIONS:
        flags = sorted({f"--{name}", f"--{name.replace('_', '-')}"})
        parser.add_argument(*flags, dest=name, nargs="?", const=True, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _help(option: Option) -> str:
    default = str(option.default).lower() if isinstance(option.default, bool) else option.default
    silent = option.default in (None, (), "") or option.default is False
    return f"{option.help}{'' if silent else f' (default: {default})'}".replace("%", "%%")


def _add(parser: Any, option: Option, name: str, *flags_and_help: str) -> None:
    *flags, text = flags_and_help
    more: dict[str, Any] = {"action": "append", "nargs": "+"} if option.kind is TEXTS else {}
    switch = option.kind is BOOL or isinstance(option.default, bool)
    if switch:
        more = {"nargs": "?", "const": True}
    metavar = BOOL.metavar if switch else option.kind.metavar
    parser.add_argument(*flags, dest=name, default=argparse.SUPPRESS, metavar=metavar, help=text, **more)


def settings_from(options: argparse.Namespace) -> TrainSettings:
    """The settings of a command line that `add_options` declared; ValueError: one line that says what is wrong."""
    overrides = {name: value for name, value in vars(options).items() if name in OPTIONS or name in simpletuner.REFUSED}
    if overrides.get("debug") is False:  # of the whole command line, whose absence is False
        del overrides["debug"]
    return read_config(options.config, overrides)


def run(options: argparse.Namespace) -> int:
    """Trains, or prints what training would do."""
    settings = settings_from(options)
    if options.dry_run:
        from rich.console import Console

        from twinflow.train.dry_run import dry_run

        dry_run(settings, Console())
        return 0
    from accelerate.state import PartialState

    from twinflow.train.run import train

    try:
        train(settings)
    except Exception:
        if settings.debug and not options.debug:  # the config file asks for it
            traceback.print_exc()
        raise
    gc.collect()  # DDP's wrapper goes before the group that it uses
    PartialState().destroy_process_group()
    return 0
