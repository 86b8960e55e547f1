"""The forecasts of a workload as a table, as JSON, and in words."""

from typing import Any

from rich import box
from rich.table import Table

from twinflow.memory.planner.forecast import PARTS, SAYS, Forecast
from twinflow.memory.planner.gpus import CONTEXT_BYTES, GPUS
from twinflow.memory.planner.workload import Workload

_HELD = {  # what is held at all times: columns of their own in a wide table, one in a narrow
    "weights": "weights", "adapters": "adapters", "optimizer": "optimizer", "ema": "EMA", "gradients": "gradients",
}  # fmt: skip
WIDE = 120  # columns of a terminal


def headline(workload: Workload) -> str:
    """What is trained, in a line."""
    height, width = workload.size
    return (
        f"{workload.architecture.name}, {workload.trains}, {width}x{height}, {workload.tokens} text tokens, batch "
        f"{workload.batch}, recipe {workload.recipe}, N = {workload.order}, {workload.base} weights, "
        f"{workload.optimizer}"
    )


def table(found: list[Forecast], usable_gb: float, best: Forecast | None, width: int = WIDE) -> Table:
    """A line per forecast, the chosen one marked.

    Args:
        found: of one workload.
        usable_gb: what the card's allocator can hand out, GB.
        best: the chosen one.
        width: columns of the terminal.
    """
    shown = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=headline(found[0].workload),
        title_justify="left", title_style="bold",
    )  # fmt: skip
    shown.add_column("  how it runs", no_wrap=True)
    parts: dict[str, tuple[str, ...]] = {name: (part,) for part, name in _HELD.items()}
    if width < WIDE:
        parts = {"weights": ("weights",), "training": tuple(_HELD)[1:]}
    for name in ("peak GB", *parts, "saved", "other"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("fits", no_wrap=True)
    shown.add_column("s/step", justify="right", no_wrap=True)
    for forecast in found:
        held = [sum(forecast.bytes.get(part, 0) for part in group) for group in parts.values()]
        other = forecast.peak - sum(held) - forecast.bytes["saved"]
        sizes = [forecast.peak, *held, forecast.bytes["saved"], other]
        chosen, fits = best is not None and forecast is best, forecast.fits(usable_gb)
        seconds = "" if forecast.cost is None else f"{forecast.cost.seconds:.2f}"
        shown.add_row(
            ("> " if chosen else "  ") + forecast.name, *(f"{size / 1e9:.1f}" for size in sizes),
            "yes" if fits else "no", seconds, style="bold green" if chosen else ("" if fits else "dim"),
        )  # fmt: skip
    return shown


def notes(usable_gb: float, where: str, width: int = WIDE) -> list[str]:
    """What the table's numbers are."""
    return [
        f"GB = 1e9 bytes. Peak: torch.cuda.max_memory_allocated; {where} hands out about {usable_gb:g} GB beside "
        f"{CONTEXT_BYTES / 1e9:g} GB of CUDA context.",
        "Assumed: prompts and latents are cached, so that no encoder is resident (but in the published schedule's "
        "line, under other); AdamW with fused=True; attention without a matrix of scores.",
        *(["Training: adapters, optimizer states, EMA and gradients."] if width < WIDE else []),
        "s/step: at least; every operation at the card's data sheet speed, nothing fused; real steps are slower.",
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
