"""`twinflow train`: from a folder of images, or prompts, and a config file to a few-step pipeline."""

import argparse
import gc
import traceback

from twinflow.train.config.command_line import add_options as add_train_options
from twinflow.train.config.command_line import require_known
from twinflow.train.config.settings import settings_from

__all__ = ["add_options", "require_known", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_train_options(parser)
    parser.description = (
        "Trains on a folder of images with captions, or on prompts alone, and goes on where the same command was "
        "stopped. Options override those of the config file."
    )
    text = "print the settings, the plan of a step and the forecast of its memory, and stop"
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help=text)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
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
