"""The forecasts of a workload as a table, as JSON, and in words."""

from typing import Any

from rich.table import Table

from twinflow.memory.planner.forecast import PARTS, SAYS, Forecast
from twinflow.memory.planner.gpus import CONTEXT_BYTES, GPUS
from twinflow.memory.planner.workload import Workload

_HELD = ("weights", "adapters", "optimizer", "ema", "gradients")  # columns of their own; the rest is passing


def headline(workload: Workload) -> str:
    """What is trained, in a line."""
    height, width = workload.size
    return (
        f"{workload.architecture.name}, {workload.trains}, {width}x{height}, {workload.tokens} text tokens, batch "
        f"{workload.batch}, recipe {workload.recipe}, N = {workload.order}, {workload.base} weights, "
        f"{workload.optimizer}"
    )


def table(found: list[Forecast], usable_gb: float, best: Forecast | None) -> Table:
    """A line per forecast, the chosen one marked.

    Args:
        found: of one workload.
        usable_gb: what the card's allocator can hand out, GB.
        best: the chosen one.
    """
    shown = Table(title=headline(found[0].workload), title_justify="left", title_style="bold")
    shown.add_column("how it runs", no_wrap=True)
    for name in ("peak GB", "weights", "adapters", "optimizer", "EMA", "gradients", "saved", "other"):
        shown.add_column(name, justify="right")
    shown.add_column("fits")
    shown.add_column("s/step, at least", justify="right")
    for forecast in found:
        held = [f"{forecast.bytes.get(part, 0) / 1e9:.1f}" for part in _HELD]
        saved = forecast.bytes["saved"]
        other = forecast.peak - saved - sum(forecast.bytes.get(part, 0) for part in _HELD)
        fits = "yes" if forecast.fits(usable_gb) else "no"
        seconds = "" if forecast.cost is None else f"{forecast.cost.seconds:.2f}"
        mark = "> " if best is not None and forecast is best else "  "
        shown.add_row(
            mark + forecast.name, f"{forecast.peak / 1e9:.1f}", *held, f"{saved / 1e9:.1f}", f"{other / 1e9:.1f}",
            fits, seconds, style="bold green" if mark == "> " else ("" if fits == "yes" else "dim"),
        )  # fmt: skip
    return shown


def notes(usable_gb: float, where: str) -> list[str]:
    """What the table's numbers are."""
    return [
        f"GB = 1e9 bytes. Peak: torch.cuda.max_memory_allocated; {where} hands out about {usable_gb:g} GB beside "
        f"{CONTEXT_BYTES / 1e9:g} GB of CUDA context.",
        "Assumed: prompts and latents are cached, so that no encoder is resident (but in the published schedule's "
        "line, under other); AdamW with fused=True; attention without a matrix of scores.",
        "s/step, at least: every operation at the card's data sheet speed, nothing fused; real steps are slower.",
    ]


def as_json(found: list[Forecast], best: Forecast | None) -> dict[str, Any]:
    """Everything in the table, and which cards each line fits."""
    return {
        "workload": headline(found[0].workload),
        "best": None if best is None else best.name,
        "forecasts": [
            {
                "name": forecast.name,
                "preset": str(forecast.preset),
                "saved": forecast.preset.saved,
                "peak_bytes": forecast.peak,
                "bytes": forecast.bytes,
                "at_peak": forecast.where,
                "host_bytes": forecast.host_bytes,
                "fits": [gpu.name for gpu in GPUS.values() if forecast.fits(gpu.usable_gb)],
                **({} if forecast.cost is None else vars(forecast.cost)),
            }
            for forecast in found
        ],
        "context_bytes": CONTEXT_BYTES,
        "parts": {part: SAYS[part] for part in PARTS},
    }
