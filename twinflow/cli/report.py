"""`twinflow report`: a run as one HTML page."""

import argparse

from twinflow.cli.parser import EXAMPLES, Parser, as_path


def add_options(parser: Parser) -> None:
    """Declares the options."""
    parser.description = "Writes what a run measured and drew as one HTML page that needs no network."
    parser.epilog = f"{EXAMPLES}\n  twinflow report run\n  twinflow report run --out report.html"
    parser.add_argument("run_folder", type=as_path, metavar="RUN", help="folder of the run: its output_dir")
    parser.add_argument("--out", type=as_path, metavar="FILE", help="the page (default: report.html in RUN)")


def run(options: argparse.Namespace) -> int:
    """Writes the page, and prints its path."""
    from twinflow.report import write_report
    from twinflow.train.config.run_folder import RunFolder

    print(write_report(RunFolder(options.run_folder), options.out))
    return 0
