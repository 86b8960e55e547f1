"""The `twinflow` command line. Status: 0 done, 1 it cannot be done (nothing fits), 2 a mistake in the command."""

import argparse
import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version

from twinflow.cli.parser import EXAMPLES, Parser
from twinflow.environment import pip_install
from twinflow.errors import ArgumentError, ArgumentTypeError
from twinflow.suggest import did_you_mean, nearest

# command -> its purpose; each is a module of this package, imported when it is asked for
COMMANDS = {
    "doctor": "check whether training can start on this machine, and what is missing",
    "plan": "forecast the memory and time of a training step, without a GPU and without weights",
    "train": "train a few-step model on a folder of images, or on prompts alone",
    "sample": "draw images with a run or an export",
    "export": "write a run's weights as files for diffusers or ComfyUI",
    "report": "write what a run measured and drew as one HTML page",
}
_EPILOG = f"""{EXAMPLES}
  twinflow plan --model sd3.5-medium --gpu rtx-4090
  twinflow train --preset sd3.5-medium-lora --instance_data_dir photos \\
      --output_dir run
  twinflow sample run --prompt "a red fox" --steps 2

`twinflow COMMAND --help` shows the options of a command, with examples."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DEBUG = "show the traceback of an error"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal's encoding lacks is written out, and ends nothing
            stream.reconfigure(errors="backslashreplace")
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    name = next((word for word in words if not word.startswith("-")), "")
    debug = any(word in ("--debug", "--debug=true") for word in words)
    if not debug:
        _quiet_libraries()
    try:
        status = _run(name, words)
        sys.stdout.flush()  # here, where a reader that has gone is noticed
        return status
    except (Exception, KeyboardInterrupt) as error:
        exit_status = _status(error)
        if exit_status is None:
            raise
        if isinstance(error, BrokenPipeError):  # whoever read the output has gone, and there is nobody to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif debug:
            traceback.print_exc()
        elif exit_status != 2 or os.environ.get("RANK", "0") == "0":  # a mistake is the same on every rank
            message = "stopped" if isinstance(error, KeyboardInterrupt) else _message(error)
            print(f"{f'twinflow {name}'.strip()}: {' '.join(message.split())}", file=sys.stderr)
        return exit_status


def _run(name: str, words: list[str]) -> int:
    parser = Parser(prog="twinflow", description="Trains and samples few-step image models.", epilog=_EPILOG)
    parser.add_argument("--debug", action="store_true", help=_DEBUG)
    release = version("twinflow") if "--version" in words else ""
    parser.add_argument("--version", action="version", version=f"twinflow {release}", help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    module = None
    for command, purpose in COMMANDS.items():
        subparser = commands.add_parser(command, help=purpose)
        if command == name:
            module, chosen = import_module(f"twinflow.cli.{command}"), subparser
            module.add_options(chosen)
            with suppress(argparse.ArgumentError):  # the command has a --debug of its own
                chosen.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=_DEBUG)
    if name and module is None:
        near = did_you_mean([*map(repr, nearest(name, COMMANDS))])
        parser.error(f"there is no command {name!r}{f'; {near}' if near else ''}")
    options, extra = parser.parse_known_args(words)
    assert module is not None  # argparse requires a command
    if extra:
        chosen.refuse(extra[0], words)
    chosen.settle(options, words)
    return module.run(options)


def _status(error: BaseException) -> int | None:
    """The exit status that an error means; None: it is a bug of ours, to be shown whole."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("twinflow"):
        return None
    if isinstance(getattr(error, "exit_status", None), int):
        return error.exit_status  # type: ignore[attr-defined]
    if isinstance(error, OSError):
        return 1 if error.errno in _NO_ROOM or isinstance(error, BrokenPipeError) else 2
    if isinstance(error, (FloatingPointError, KeyboardInterrupt)) or type(error).__name__ == "OutOfMemoryError":
        return 1
    return 2 if isinstance(error, (ValueError, ArgumentTypeError, ImportError)) else None


def _message(error: BaseException) -> str:
    """What to say of an error, without the function that raised it or a system error's number."""
    if isinstance(error, (ArgumentError, ArgumentTypeError)):
        return error.without_function
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} must be installed ({pip_install(error.name or '')})"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "OutOfMemoryError":
        return f"no memory left: {str(error).split('. ')[0]}"  # torch goes on for a paragraph
    return str(error) or type(error).__name__


def _quiet_libraries() -> None:
    """Keeps other libraries from reporting, when they are imported, which of their optional parts are missing."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
