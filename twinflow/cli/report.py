"""`twinflow report`: a run as one HTML page."""

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.description = "Writes what a run measured and drew into one HTML page that needs no network."
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run, output_dir of its config")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in RUN)")


def run(options: argparse.Namespace) -> int:
    """Writes the page, and prints where it is."""
    from twinflow.report import write_report
    from twinflow.train.config.run_folder import RunFolder

    print(write_report(RunFolder(options.run_folder), options.out))
    return 0
