"""`twinflow plan`: what a training step will need, before a card is rented."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinflow.cli.print_error import print_error

if TYPE_CHECKING:
    from twinflow.memory.planner.forecast import Forecast
    from twinflow.memory.planner.workload import Workload


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.description = "Predicts the peak memory and the least time of a training step under every memory preset."
    parser.add_argument("--model", required=True, help="its name, e.g. qwen-image; `all`: every model on every card")
    parser.add_argument("--gpu", default="a100-80gb", help="the card, e.g. a100-40gb, h200, rtx-4090")
    parser.add_argument(
        "--memory-gb", type=float, help="GB (1e9 bytes) that the allocator may use, instead of a card's"
    )
    parser.add_argument("--resolution", default="1024", help="pixels: an edge, or WIDTHxHEIGHT")
    parser.add_argument("--batch", type=int, default=4, help="rows of an optimizer step on this card")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--lora-rank", type=int, help="rank of the LoRA (default: as usual for the model)")
    group.add_argument("--full", action="store_true", help="train all weights")
    parser.add_argument("--recipe", default="partition", help="partition or all_terms")
    parser.add_argument("--order", type=int, default=2, help="teacher steps N of the rollout")
    parser.add_argument("--conditioning", default="dual", help="how the model is told both times")
    parser.add_argument("--text-tokens", type=int, help="length of the prompts (default: as usual for the model)")
    parser.add_argument(
        "--base", help="bfloat16, float32 (autocast), int8, nf4 (default: bfloat16, all weights float32)"
    )
    parser.add_argument("--optimizer", default="adamw", help="adamw, adamw8bit or sgd")
    parser.add_argument(
        "--no-peers", action="store_true", help="leave out DMD2, SANA-Sprint and the published schedule"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON; `-`: to the terminal")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the picture there")


def _check_writable(*paths: Path | None) -> None:
    """Raises before minutes are spent on what could not be written."""
    for path in paths:
        if path is not None and str(path) != "-" and not path.absolute().parent.is_dir():
            raise ValueError(f"plan: files must go into a folder that exists, got {path}")


def run(options: argparse.Namespace) -> int:
    """Prints the forecasts; 1 where no preset fits."""
    from rich.console import Console

    from twinflow.memory.planner.choose import choose, forecasts
    from twinflow.memory.planner.forecast import Planner
    from twinflow.memory.planner.gpus import gpu_of
    from twinflow.memory.planner.report import as_json, notes, table

    _check_writable(options.json, options.png)
    if options.model == "all":
        return _plan_all(options)
    gpu, workload = gpu_of(options.gpu), _workload(options, options.model)
    usable = gpu.usable_gb if options.memory_gb is None else options.memory_gb
    if not usable > 0:
        raise ValueError(f"plan: memory_gb must be > 0, got {usable}")
    planner = Planner(workload, gpu)
    found, best, refusal = forecasts(planner), None, None
    try:
        best = choose(planner, usable, found)
        found = found if best in found else [best, *found]
    except ValueError as error:
        refusal = error
    found = sorted(found, key=lambda f: (f is not best, not f.fits(usable)))
    found += _peers(options, workload)
    to_terminal = options.json is not None and str(options.json) == "-"
    console = Console(stderr=to_terminal)
    console.print(table(found, usable, best, console.width))
    for line in notes(found, usable, gpu.name if options.memory_gb is None else "the budget", console.width):
        console.print(line, style="dim", highlight=False)
    _write(options, [found], [as_json(found, best)])
    if best is None:
        print_error("plan", refusal)
        return 1
    console.print(f"> {best.preset}", highlight=False)
    return 0


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
        raise ValueError(f"plan: resolution must be pixels as 1024 or 1024x768, got {text!r}")
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
    from rich.console import Console

    from twinflow.memory.planner.architectures import architectures
    from twinflow.memory.planner.choose import forecasts
    from twinflow.memory.planner.forecast import Planner
    from twinflow.memory.planner.gpus import gpu_of
    from twinflow.memory.planner.overview import overview
    from twinflow.memory.planner.report import as_json

    console = Console(stderr=options.json is not None and str(options.json) == "-")
    groups, gpu = [], gpu_of(options.gpu)
    for model in architectures():
        with console.status(f"{model} ..."):
            groups.append(forecasts(Planner(_workload(options, model), gpu)))
    for table in overview(groups, gpu.name, console.width):
        console.print(table)
    _write(options, groups, [as_json(found, None) for found in groups])
    return 0
