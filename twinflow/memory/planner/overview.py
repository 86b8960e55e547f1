"""`overview()`: which preset fits on which card, and where deferring the modulation pays, for every model."""

from collections.abc import Iterator

from rich import box
from rich.table import Table

from twinflow.memory.planner.forecast import Forecast
from twinflow.memory.planner.gpus import GPUS
from twinflow.memory.planner.report import with_and_without

WIDE = 150  # columns of a terminal that has room for a column per card


def cards() -> dict[float, str]:
    """Usable GB -> the cards that have as much, from the smallest on."""
    return {
        usable: ", ".join(gpu.name for gpu in GPUS.values() if gpu.usable_gb == usable)
        for usable in sorted({gpu.usable_gb for gpu in GPUS.values()})
    }


def rows(groups: list[list[Forecast]]) -> list[list[str]]:
    """A row per workload: the model, what is trained, the recipe, and per card the fastest preset with its peak.

    Args:
        groups: forecasts of every preset that applies, one list per workload.
    """
    return [
        [(w := found[0].workload).architecture.name, w.trains, w.recipe, *(_cell(found, usable) for usable in cards())]
        for found in groups
    ]


def head() -> list[str]:
    """Names of the columns."""
    return ["model", "trained", "recipe", *(f"{names} ({usable:g})" for usable, names in cards().items())]


def deferral_head() -> list[str]:
    """Names of the columns of `deferral_rows`."""
    return ["model", "modulation GB", "of the weights", "peak GB", "deferred", "s/step", "deferred"]


def deferral_rows(groups: list[list[Forecast]]) -> list[list[str]]:
    """A row per workload whose modulation can be deferred: peaks and seconds of `checkpoint` and `40gb`."""
    found = []
    for plain, deferred in map(with_and_without, groups):
        if plain is not None and deferred is not None:
            kept = deferred.deferred_bytes
            seconds = ["" if f.cost is None else f"{f.cost.seconds:.2f}" for f in (plain, deferred)]
            peaks = [f"{f.peak / 1e9:.1f}" for f in (plain, deferred)]
            name, share = plain.workload.architecture.name, kept / plain.bytes["weights"]
            found.append([name, f"{kept / 1e9:.1f}", f"{share:.0%}", *peaks, *seconds])
    return found


def overview(groups: list[list[Forecast]], gpu: str, width: int = WIDE) -> Iterator[Table]:
    """The rows as tables for the terminal.

    Args:
        groups: as of `rows`.
        gpu: the card whose speed times are for.
        width: columns of the terminal; a narrow one gets a line per model and card.
    """
    workload, narrow, names = groups[0][0].workload, width < WIDE, head()
    size = f"{workload.size[1]}x{workload.size[0]}, batch {workload.batch}, recipe {workload.recipe}"
    columns = ["card (usable GB)", "fastest preset", "peak GB"] if narrow else names[3:]
    shown = _table(f"fastest preset that fits, and its peak in GB; {size}", [*names[:2], *columns])
    for model, trained, _, *cells in rows(groups):
        if not narrow:
            shown.add_row(model, trained, *(f"[dim]{c}[/dim]" if c.startswith("no:") else c for c in cells))
            continue
        for card, cell in zip(names[3:], cells, strict=True):
            preset, _, peak = cell.partition(" ")
            shown.add_row(model, trained, card, preset.replace("no:", "none; needs"), peak)
            model = trained = ""
        shown.add_section()
    yield shown
    pays = _table(f"where deferring the modulation of a LoRA's base pays; least s/step on {gpu}", deferral_head())
    for column in pays.columns[1:]:
        column.justify = "right"
    for row in deferral_rows(groups):
        pays.add_row(*row)
    if pays.row_count:
        yield pays


def _cell(found: list[Forecast], usable_gb: float) -> str:
    """The first that fits, in the order of the presets, or the least that is needed."""
    best = next((forecast for forecast in found if forecast.fits(usable_gb)), None)
    if best is None:
        return f"no: {min(forecast.needed for forecast in found) / 1e9:.1f}"
    return f"{best.name} {best.peak / 1e9:.1f}"


def _table(title: str, columns: list[str]) -> Table:
    look = dict(title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    return Table(*columns, title=title, **look)  # type: ignore[arg-type]
