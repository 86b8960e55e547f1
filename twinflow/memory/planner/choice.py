"""`choose()`: the fastest preset that fits, blocks of two kinds where that is faster than one."""

from dataclasses import replace
from typing import NoReturn

from twinflow.memory.planner.forecast import Forecast
from twinflow.memory.planner.forecasting import Planner
from twinflow.memory.presets import PRESETS, MemoryPreset

_LESS, _MORE = PRESETS["checkpoint"], PRESETS["80gb"]  # what blocks keep at least, and at most, in a mixture
_SPARE = 0.01  # share of a card that a mixture leaves free


def forecasts(planner: Planner) -> list[Forecast]:
    """Every preset's forecast, in the order of `PRESETS`: the fastest first."""
    return [planner.forecast(preset) for preset in PRESETS.values()]


def choose(planner: Planner, usable_gb: float, known: list[Forecast] | None = None) -> Forecast:
    """The fastest way to run a step within a budget.

    Args:
        planner: of the workload.
        usable_gb: what the allocator can hand out, GB (1e9 bytes).
        known: forecasts of `PRESETS` that were made already.

    Returns:
        Its forecast; its preset is one of `PRESETS`, or named `auto` where blocks differ.

    Raises:
        ValueError: nothing fits; the message has the smallest budget that would do, and the preset that needs it.
    """
    made = {forecast.preset.name: forecast for forecast in known or ()}
    for name, preset in PRESETS.items():
        if name not in made:
            made[name] = planner.forecast(preset)
        if made[name].fits(usable_gb):
            break
    else:
        _refuse(planner, usable_gb, min(made.values(), key=lambda forecast: forecast.peak))
    best, names = made[name], list(PRESETS)
    if names.index(_MORE.name) < names.index(name) <= names.index(_LESS.name):
        if _LESS.name not in made:
            made[_LESS.name] = planner.forecast(_LESS)
        return _mixture(planner, usable_gb, made) or best
    return best


def _refuse(planner: Planner, usable_gb: float, least: Forecast) -> NoReturn:
    workload = planner.workload
    height, width = workload.size
    raise ValueError(
        f"plan: memory must be at least {least.peak / 1e9:.1f} GB (1e9 bytes, without the CUDA context) for "
        f"{workload.trains} of {workload.architecture.name} at {width}x{height}, batch {workload.batch}, which preset "
        f"{least.preset.name!r} needs, got {usable_gb:g} GB"
    )


def _mixture(planner: Planner, usable_gb: float, known: dict[str, Forecast]) -> Forecast | None:
    """As many blocks as fit keep their products, from the last on; the others keep their input only."""
    blocks = len(planner.workload.architecture.blocks())
    least, most = known[_LESS.name].peak, known[_MORE.name].peak
    count = int(blocks * (usable_gb * (1 - _SPARE) * 1e9 - least) / max(most - least, 1))
    for kept in (count, count - 1, count - 2):
        if kept < 1:
            return None
        found = planner.forecast(mixed(blocks, kept))
        if found.fits(usable_gb):
            return found
    return None


def mixed(blocks: int, kept: int) -> MemoryPreset:
    """A preset whose last `kept` of some blocks keep their products, the others their input."""
    assert isinstance(_LESS.saved, str) and isinstance(_MORE.saved, str)
    levels = (_LESS.saved,) * (blocks - kept) + (_MORE.saved,) * kept
    return replace(_MORE, name="auto", saved=levels)
