"""The weights of a run that `twinflow export` and `twinflow sample` take: which, and from where."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twinflow.train.restore import RestoredRun


def add_weight_options(parser: argparse.ArgumentParser) -> None:
    """Declares what chooses among a run's weights."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--ema", action="store_true", help="the average of the weights (default: where the run has one)")
    group.add_argument("--student", action="store_true", help="the trained weights themselves")
    parser.add_argument("--checkpoint", default="latest", metavar="NAME", help="latest, or a checkpoint's name or path")
    parser.add_argument(
        "--model", metavar="PIPELINE", help="folder or hub name of the pipeline underneath (default: the run's)"
    )


def chosen_weights(options: argparse.Namespace, run: Path) -> "RestoredRun":
    """The weights of a run that the options choose; names on standard error what is passed over.

    Raises:
        ValueError: no run, no whole checkpoint, no average where one is asked for, or no pipeline underneath.
    """
    from twinflow.train.restore import restore_run

    ema = True if options.ema else False if options.student else None
    with named_model(options):
        found = restore_run(run, checkpoint=options.checkpoint, ema=ema, model=options.model)
    for complaint in found.complaints:
        say(options, f"warning: {complaint}")
    return found


@contextmanager
def named_model(options: argparse.Namespace) -> Iterator[None]:
    """Makes a missing pipeline underneath a matter of `--model`."""
    training = "train: pretrained_model_name_or_path"
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(training):
            raise
        hint = "; name another with --model" if options.model is None else ""
        raise ValueError(f"{options.command}: model{str(error).removeprefix(training)}{hint}") from error


def described(found: "RestoredRun") -> str:
    """Which weights they are, in words."""
    which = "student weights" if found.teacher is None else "EMA weights"
    return f"{which} after {found.step} step{'' if found.step == 1 else 's'}"


def say(options: argparse.Namespace, line: str) -> None:
    """A line beside what the command gives out."""
    print(f"twinflow {options.command}: {line}", file=sys.stderr)
