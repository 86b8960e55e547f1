"""`twinflow doctor`: whether training can start on this machine, and the command that installs what is missing."""

import argparse
import json
from collections.abc import Iterator, Sequence

from twinflow.cli.machine import Library, Machine, inspect_machine


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.description = (
        "Lists versions, GPUs, kernels, room on the disk and what is missing, with the command that installs it. The "
        "status is 0 where training could start here, 1 where something that it needs is missing."
    )
    parser.add_argument("--json", action="store_true", help="all of it as JSON, memory and room in GB (1e9 bytes)")


def run(options: argparse.Namespace) -> int:
    """Looks around, and says what was found; 1 where training could not start."""
    found = inspect_machine()
    print(json.dumps(found.to_dict(), indent=1) if options.json else "\n".join(_report(found)))
    return 1 if found.problems else 0


def _report(found: Machine) -> Iterator[str]:
    # Plain text, not rich's tables: rich may be what is missing.
    versions = [("python", found.python, found.system), ("twinflow", found.twinflow, "")]
    yield from _aligned([*versions, *map(_row, found.libraries)])
    yield ""
    for gpu in found.gpus:
        yield f"GPU      {gpu['name']}, {gpu['free_gb']:.1f} of {gpu['total_gb']:.1f} GB free"
    yield f"CUDA     {found.cuda or 'none'} in torch, driver {found.driver or 'none'}"
    for folder, free in found.disks.items():
        yield f"disk     {free:.1f} GB free in {folder}"
    yield f"hub      {'logged in' if found.logged_in else 'no token; for gated models run `hf auth login`'}"
    kernels = [kernel for kernel in found.kernels if kernel[2] != "-"]
    if kernels:
        yield ""
        yield from _aligned([("kernel", "device", "backend", "why"), *kernels])
    yield ""
    for warning in found.warnings:
        yield f"warning  {warning}"
    for problem in found.problems:
        yield f"missing  {problem}"
    yield "twinflow train can start here" if not found.problems else "twinflow train cannot start here"


def _row(library: Library) -> tuple[str, str, str]:
    if library.version is None and not library.needed:
        return library.name, "-", f"{library.purpose}: {library.cure}"
    state = "; ".join(part for part in (library.wrong, library.cure) if part)
    return library.name, library.version or "-", state or library.purpose


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
