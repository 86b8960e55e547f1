"""`overview()`: which preset fits on which card, for every model."""

from rich.table import Table

from twinflow.memory.planner.forecast import Forecast
from twinflow.memory.planner.gpus import GPUS


def fastest(found: list[Forecast], usable_gb: float) -> Forecast | None:
    """The first of a workload's forecasts, in the order of the presets, that fits; None: none does."""
    return next((forecast for forecast in found if forecast.fits(usable_gb)), None)


def rows(groups: list[list[Forecast]]) -> list[list[str]]:
    """A row per workload: the model, what is trained, and per card the fastest preset with its peak.

    Args:
        groups: forecasts of every preset, one list per workload.
    """
    found = []
    for forecasts in groups:
        workload = forecasts[0].workload
        cells = []
        for gpu in GPUS.values():
            best = fastest(forecasts, gpu.usable_gb)
            least = min(forecast.peak for forecast in forecasts) / 1e9
            cells.append(f"no: {least:.1f}" if best is None else f"{best.name} {best.peak / 1e9:.1f}")
        found.append([workload.architecture.name, workload.trains, workload.recipe, *cells])
    return found


def head() -> list[str]:
    """Names of the columns."""
    return ["model", "trained", "recipe", *(f"{gpu.name} ({gpu.usable_gb:g})" for gpu in GPUS.values())]


def overview(groups: list[list[Forecast]]) -> Table:
    """The rows as a table for the terminal."""
    workload = groups[0][0].workload
    height, width = workload.size
    title = f"fastest preset that fits, and its peak in GB; {width}x{height}, batch {workload.batch}"
    shown = Table(title=title, title_justify="left", title_style="bold")
    for name in head():
        shown.add_column(name, overflow="fold")
    for row in rows(groups):
        shown.add_row(*(f"[dim]{cell}[/dim]" if cell.startswith("no:") else cell for cell in row))
    return shown
