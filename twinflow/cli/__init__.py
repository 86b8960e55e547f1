"""The `twinflow` command line. Status: 0 done, 1 it cannot be done (nothing fits), 2 a mistake in what was asked."""

import argparse
import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version

from twinflow.cli.parser import Parser, did_you_mean
from twinflow.cli.print_error import print_error

# command -> what it is for; each is a file of twinflow/commands, imported when it is asked for
COMMANDS = {
    "train": "from a folder of images, or prompts, and a config file to a few-step pipeline",
    "plan": "what a training step will need, without a GPU and without weights",
    "sample": "images from a run or an export",
    "export": "a run's weights as files for diffusers or ComfyUI",
    "report": "what a run measured and drew, as one HTML page",
    "doctor": "whether training can start here, and what is missing",
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        The exit status.
    """
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    name = next((argument for argument in given if not argument.startswith("-")), "")
    debug = any(argument in ("--debug", "--debug=true") for argument in given)
    if not debug:
        _quiet_libraries()
    try:
        status = _run(name, given)
        sys.stdout.flush()  # here, where a reader that has gone is noticed
        return status
    except (Exception, KeyboardInterrupt) as error:
        known = _status(error)
        if known is None:
            raise
        if isinstance(error, BrokenPipeError):  # whoever read the output has gone, and there is nobody to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif debug:
            traceback.print_exc()
        elif known != 2 or os.environ.get("RANK", "0") == "0":  # a mistake is the same on every rank
            print_error(name, "stopped" if isinstance(error, KeyboardInterrupt) else error)
        return known


def _run(name: str, given: list[str]) -> int:
    parser = Parser(prog="twinflow", description="Few-step image generation.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    release = version("twinflow") if "--version" in given else ""
    parser.add_argument("--version", action="version", version=f"twinflow {release}", help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module = None
    for command, purpose in COMMANDS.items():
        subparser = commands.add_parser(command, help=purpose)
        if command == name:
            module = import_module(f"twinflow.cli.{command}")
            module.add_options(subparser)
            chosen = subparser
            with suppress(argparse.ArgumentError):  # the command has a --debug of its own
                text = "show the traceback of an error"
                subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=text)
    if name and module is None:
        parser.error(f"there is no command {name!r}{did_you_mean(name, COMMANDS)}")
    options, extra = parser.parse_known_args(given)
    assert module is not None  # argparse requires a command
    if extra and hasattr(module, "require_known"):
        module.require_known(extra)
    if extra:
        chosen.refuse(extra[0])
    return module.run(options)


def _status(error: BaseException) -> int | None:
    """The exit status that an error means; None: it is a bug of ours, to be shown whole."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("twinflow"):
        return None
    if isinstance(getattr(error, "exit_status", None), int):
        return error.exit_status  # type: ignore[attr-defined]
    if isinstance(error, TypeError):
        return 2 if " must be " in str(error) else None
    if isinstance(error, OSError):
        return 1 if error.errno in _NO_ROOM or isinstance(error, BrokenPipeError) else 2
    if isinstance(error, (FloatingPointError, KeyboardInterrupt)) or type(error).__name__ == "OutOfMemoryError":
        return 1
    return 2 if isinstance(error, (ValueError, ImportError)) else None


def _quiet_libraries() -> None:
    """Keeps other libraries from reporting, when they are imported, which of their optional parts are missing."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
