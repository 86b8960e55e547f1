"""The forecasts of a workload as a table, as JSON, and in words."""

from typing import Any

from rich import box
from rich.table import Table

from twinflow.memory.planner.forecast import LABELS, PARTS, SPARE, Forecast
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
        usable_gb: what the card's allocator can hand out, GB.
    """
    shown = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=headline(found[0].workload),
        title_justify="left", title_style="bold",
    )  # fmt: skip
    shown.add_column("  how it runs", no_wrap=True)
    parts: dict[str, tuple[str, ...]] = {name: (part,) for part, name in _HELD.items()}
    if width < WIDE:
        parts = {"weights": ("weights",), "train": tuple(_HELD)[1:]}
    on_host = any(forecast.host_bytes for forecast in found)
    for name in ("peak", *parts, "saved", "other", *(["host"] if on_host else [])):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("fits", no_wrap=True)
    shown.add_column("s/step", justify="right", no_wrap=True)
    for forecast in found:
        held = [sum(forecast.bytes.get(part, 0) for part in group) for group in parts.values()]
        other = forecast.peak - sum(held) - forecast.bytes["saved"]
        sizes = [f"{size / 1e9:.1f}" for size in (forecast.peak, *held, forecast.bytes["saved"], other)]
        sizes += [f"{forecast.host_bytes / 1e9:.1f}" if forecast.host_bytes else ""] if on_host else []
        chosen, fits = best is not None and forecast is best, forecast.fits(usable_gb)
        seconds = "" if forecast.cost is None else f"{forecast.cost.seconds:.2f}"
        shown.add_row(
            ("> " if chosen else "  ") + forecast.name, *sizes, "yes" if fits else "no", seconds,
            style="bold green" if chosen else ("" if fits else "dim"),
        )  # fmt: skip
    return shown


def notes(found: list[Forecast], usable_gb: float, where: str, width: int = WIDE) -> list[str]:
    """What the table's numbers are, and what its presets change beside activations."""
    host, deferred = (any(getattr(f, f"{name}_bytes") for f in found) for name in ("host", "deferred"))
    changed: dict[str, list[str]] = {}
    for forecast in found:
        for change in forecast.preset.changes():
            changed.setdefault(change, []).append(forecast.name)
    return [
        f"GB = 1e9 bytes. Peak: torch.cuda.max_memory_allocated; {where} hands out about {usable_gb:g} GB beside "
        f"{CONTEXT_BYTES / 1e9:g} GB of CUDA context, of which a step leaves {SPARE:.0%} free.",
        "Assumed: prompts and latents are cached, so that no encoder is resident (but in the published schedule's "
        "line, under other); AdamW with fused=True; attention without a matrix of scores.",
        *(["Train: adapters, optimizer states, EMA and gradients."] if width < WIDE else []),
        *(["Host: pinned memory, for activations and deferred weights."] if host else []),
        *(["; ".join(f"{change}: {', '.join(names)}" for change, names in changed.items()) + "."] if changed else []),
        "s/step: at least; every operation at the card's data sheet speed, nothing fused; real steps are slower."
        + (" Passes of deferred weights from the host are added, as if nothing ran meanwhile." if deferred else ""),
        *([gain(found)] if gain(found) else []),
    ]


def gain(found: list[Forecast]) -> str:
    """What deferring the modulation saves and costs, in words; empty where it is not among the forecasts."""
    plain, deferred = with_and_without(found)
    if plain is None or deferred is None:
        return ""
    share = deferred.deferred_bytes / plain.bytes["weights"]
    taken = ""
    if plain.cost is not None and deferred.cost is not None:
        more = deferred.cost.seconds - plain.cost.seconds
        taken = f" for {more:.2f} s a step more ({more / plain.cost.seconds:+.0%})"
    return (
        f"Modulation is {deferred.deferred_bytes / 1e9:.1f} of {plain.bytes['weights'] / 1e9:.1f} GB of weights "
        f"({share:.0%}); deferring it saves {(plain.peak - deferred.peak) / 1e9:.1f} GB{taken}."
    )


def with_and_without(found: list[Forecast]) -> tuple[Forecast | None, Forecast | None]:
    """The forecasts of two presets that differ by deferred modulation alone; None: not there."""
    by_name = {forecast.name: forecast for forecast in found}
    return by_name.get("checkpoint"), by_name.get("40gb")


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
                "host": {"activations": forecast.offloaded_bytes, "modulation": forecast.deferred_bytes},
                "base": forecast.workload.under(forecast.preset).base,
                "optimizer": forecast.workload.under(forecast.preset).optimizer,
                "fits": [gpu.name for gpu in GPUS.values() if forecast.fits(gpu.usable_gb)],
                **({} if forecast.cost is None else vars(forecast.cost)),
            }
            for forecast in found
        ],
        "context_bytes": CONTEXT_BYTES,
        "parts": {part: LABELS[part] for part in PARTS},
    }
