"""`twinflow plan`: the memory and time of a training step, before a card is rented."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinflow.cli.parser import EXAMPLES, Parser, as_path
from twinflow.errors import ArgumentError, require

if TYPE_CHECKING:
    from rich.console import Console

    from twinflow.memory.planner.forecast import Forecast
    from twinflow.memory.planner.workload import Workload


_EPILOG = f"""{EXAMPLES}
  twinflow plan --model sd3.5-medium --gpu rtx-4090
  twinflow plan --model qwen-image --full --gpu h200 --batch 8 --png plan.png
  twinflow plan --model flux.1 --lora-rank 32 --memory-gb 30 --json -
  twinflow plan --model all"""


def add_options(parser: Parser) -> None:
    """Declares the options."""
    parser.description = "Forecasts the peak memory and the least time of a training step under every memory preset."
    parser.epilog = _EPILOG
    parser.add_argument("--model", required=True, metavar="NAME", help="such as qwen-image; all: every model")
    text = "card, such as a100-40gb, h200, rtx-4090"
    parser.add_argument("--gpu", default="a100-80gb", metavar="NAME", help=text)
    text = "GB (1e9 bytes) that the allocator may use (default: the card's)"
    parser.add_argument("--memory-gb", type=float, metavar="GB", help=text)
    text = "pixels: an edge, or WIDTHxHEIGHT"
    parser.add_argument("--resolution", default="1024", metavar="SIZE", help=text)
    text = "rows of an optimizer step on this card"
    parser.add_argument("--batch", type=int, default=4, metavar="N", help=text)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--lora-rank", type=int, metavar="N", help="rank of the LoRA (default: the model's usual one)")
    group.add_argument("--full", action="store_true", help="train all weights")
    parser.add_argument("--recipe", default="partition", metavar="NAME", help="partition or all_terms")
    parser.add_argument("--order", type=int, default=2, metavar="N", help="teacher steps of the rollout")
    text = "how the model takes both times, as of `twinflow train`"
    parser.add_argument("--conditioning", default="dual", metavar="NAME", help=text)
    text = "length of the prompts (default: the model's usual one)"
    parser.add_argument("--text-tokens", type=int, metavar="N", help=text)
    text = "bfloat16, float32 (autocast), int8 or nf4 (default: bfloat16; float32 with --full)"
    parser.add_argument("--base", metavar="NAME", help=text)
    parser.add_argument("--optimizer", default="adamw", metavar="NAME", help="adamw, adamw8bit or sgd")
    text = "leave out DMD2, SANA-Sprint and the published schedule"
    parser.add_argument("--no-peers", action="store_true", help=text)
    text = "write everything as JSON; -: to the terminal"
    parser.add_argument("--json", type=as_path, metavar="FILE", help=text)
    parser.add_argument("--png", type=as_path, metavar="FILE", help="write the picture of the forecasts")


def _check_writable(*paths: Path | None) -> None:
    """Raises before minutes are spent on files that could not be written."""
    for path in paths:
        exists = path is None or str(path) == "-" or path.absolute().parent.is_dir()
        require(exists, "plan", "files", "into a folder that exists", path, verb="go")


def run(options: argparse.Namespace) -> int:
    """Prints the forecasts; an error of status 1 where no preset fits."""
    from twinflow.memory.planner.choose import choose, forecasts
    from twinflow.memory.planner.forecast import Planner
    from twinflow.memory.planner.gpus import gpu_of
    from twinflow.memory.planner.report import as_json, notes, table

    _check_writable(options.json, options.png)
    if options.model == "all":
        return _plan_all(options)
    gpu, workload = gpu_of(options.gpu), _workload(options, options.model)
    usable = gpu.usable_gb if options.memory_gb is None else options.memory_gb
    require(usable > 0, "plan", "memory_gb", "> 0", usable)
    planner = Planner(workload, gpu)
    rows = forecasts(planner)
    best: Forecast | None = None
    refusal: ValueError | None = None
    try:
        best = choose(planner, usable, rows)
        rows = rows if best in rows else [best, *rows]
    except ValueError as error:
        refusal = error
    rows = sorted(rows, key=lambda row: (row is not best, not row.fits(usable))) + _peers(options, workload)
    console = _console(options)
    console.print(table(rows, usable, best, console.width))
    for line in notes(rows, usable, gpu.name if options.memory_gb is None else "the budget", console.width):
        console.print(line, style="dim", highlight=False)
    _write(options, [rows], [as_json(rows, best)])
    if refusal is not None:
        refusal.exit_status = 1  # type: ignore[attr-defined]  # no mistake in the command: it cannot be done
        raise refusal
    assert best is not None
    console.print(f"> {best.preset}", highlight=False)
    return 0


def _console(options: argparse.Namespace) -> "Console":
    """The terminal; standard error where the JSON goes to standard output."""
    from rich.console import Console

    return Console(stderr=options.json is not None and str(options.json) == "-")


def _workload(options: argparse.Namespace, model: str) -> "Workload":
    from twinflow.memory.planner.workload import workload_of

    settings: dict[str, Any] = {
        "batch": options.batch, "recipe": options.recipe, "order": options.order, "optimizer": options.optimizer,
        "conditioning": options.conditioning, "text_tokens": options.text_tokens,
        "resolution": _resolution(options.resolution),
    }  # fmt: skip
    if options.base is not None:
        settings["base"] = options.base
    if options.full or options.lora_rank is not None:
        settings["lora_rank"] = options.lora_rank
    return workload_of(model, **settings)


def _resolution(text: str) -> int | tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise ArgumentError("plan", "resolution", "pixels as 1024 or 1024x768", repr(text))
    return int(parts[0]) if len(parts) == 1 else (int(parts[1]), int(parts[0]))


def _peers(options: argparse.Namespace, workload: "Workload") -> list["Forecast"]:
    if options.no_peers:
        return []
    from twinflow.memory.planner.gpus import gpu_of
    from twinflow.memory.planner.peers.forecast import peer_forecasts

    return peer_forecasts(workload, gpu_of(options.gpu))


def _write(options: argparse.Namespace, groups: list[list["Forecast"]], reports: list[dict[str, Any]]) -> None:
    from twinflow.memory.planner.plot import picture

    if options.json is not None:
        text = json.dumps(reports if len(reports) > 1 else reports[0], indent=1)
        if str(options.json) == "-":
            print(text)
        else:
            options.json.write_text(text + "\n")
    if options.png is not None:
        picture(groups, options.png)


def _plan_all(options: argparse.Namespace) -> int:
    from twinflow.memory.planner.architectures import architectures
    from twinflow.memory.planner.choose import forecasts
    from twinflow.memory.planner.forecast import Planner
    from twinflow.memory.planner.gpus import gpu_of
    from twinflow.memory.planner.overview import overview
    from twinflow.memory.planner.report import as_json

    console, gpu = _console(options), gpu_of(options.gpu)
    groups = []
    for model in architectures():
        with console.status(f"{model} ..."):
            groups.append(forecasts(Planner(_workload(options, model), gpu)))
    for table in overview(groups, gpu.name, console.width):
        console.print(table)
    _write(options, groups, [as_json(rows, None) for rows in groups])
    return 0
