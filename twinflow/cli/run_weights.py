"""`choose_weights()`: the weights of a run that `twinflow export` and `twinflow sample` use."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from twinflow.errors import ArgumentError

if TYPE_CHECKING:
    from twinflow.train.restore import RestoredRun


def add_weight_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options that choose among a run's weights."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--ema", action="store_true", help="the average of the weights (default: if the run has one)")
    group.add_argument("--student", action="store_true", help="the trained weights themselves")
    text = "latest, or a checkpoint's name or path"
    parser.add_argument("--checkpoint", type=os.path.expanduser, default="latest", metavar="NAME", help=text)
    text = "hub name or folder of the base pipeline (default: the run's)"
    parser.add_argument("--model", type=os.path.expanduser, metavar="PIPELINE", help=text)


def choose_weights(options: argparse.Namespace, run: Path) -> "RestoredRun":
    """The weights of a run that the options choose; prints a note about each checkpoint that is passed over.

    Raises:
        ValueError: no run, no whole checkpoint, no average where `--ema` wants one, or no base pipeline.
    """
    from twinflow.train.restore import restore_run

    ema = True if options.ema else False if options.student else None
    with model_option(options):
        restored = restore_run(run, checkpoint=options.checkpoint, ema=ema, model=options.model)
    for complaint in restored.complaints:
        print_note(options, f"warning: {complaint}")
    return restored


@contextmanager
def model_option(options: argparse.Namespace) -> Iterator[None]:
    """Turns an error about the run's pipeline into one about `--model`."""
    try:
        yield
    except ArgumentError as error:
        if error.argument != "pretrained_model_name_or_path":
            raise
        hints = [error.hint] if error.hint else []
        hints += ["name another with --model"] if options.model is None else []
        raise error.renamed(options.command, "model", hint="; ".join(hints)) from error


def describe_weights(restored: "RestoredRun") -> str:
    """Which weights they are, in words."""
    which = "student weights" if restored.teacher is None else "EMA weights"
    return f"{which} after {restored.step} step{'' if restored.step == 1 else 's'}"


def print_note(options: argparse.Namespace, line: str) -> None:
    """Prints a line on standard error, beside what the command prints as its result."""
    print(f"twinflow {options.command}: {line}", file=sys.stderr)
