"""`choose()`: the fastest preset that fits, blocks of two kinds where that is faster than one."""

from dataclasses import replace
from typing import NoReturn

from twinflow.errors import ArgumentError
from twinflow.memory.planner.forecast import SPARE, Forecast, Planner
from twinflow.memory.planner.workload import Workload
from twinflow.memory.presets import MemoryPreset

_LESS, _MORE = "input", "products"  # what blocks keep at least, and at most, in a mixture
_MIXED = (_LESS, "attention")  # what a preset keeps that a mixture may be faster than
_BY_RANK = ("adapters", "optimizer", "ema", "gradients")


def forecasts(planner: Planner) -> list[Forecast]:
    """A forecast of every preset that applies, in the order of `PRESETS`."""
    return [planner.forecast(preset) for preset in planner.presets.values()]


def choose(planner: Planner, usable_gb: float, known: list[Forecast] | None = None) -> Forecast:
    """The fastest way to run a step within a budget, with weights as they are if that fits.

    Args:
        usable_gb: what the allocator can hand out, GB (1e9 bytes).
        known: forecasts that were made already.

    Returns:
        Its forecast; its preset is one of `PRESETS`, or named `auto` where blocks differ.

    Raises:
        ValueError: nothing fits; the message has the smallest budget that would do, the preset that needs it, and the
            rank of a LoRA that would fit.
    """
    made = {forecast.preset: forecast for forecast in known or ()}
    for preset in planner.presets.values():
        if preset not in made:
            made[preset] = planner.forecast(preset)
        if made[preset].fits(usable_gb):
            return _mixture(planner, usable_gb, preset, made) or made[preset]
    _refuse(planner, usable_gb, min(made.values(), key=lambda forecast: forecast.peak))


def _refuse(planner: Planner, usable_gb: float, least: Forecast) -> NoReturn:
    workload = planner.workload
    height, width = workload.size
    rank = _smaller_rank(workload, usable_gb, least)
    wanted = (
        f"at least {least.needed / 1e9:.1f} GB (1e9 bytes, without the CUDA context) for {workload.trains} of "
        f"{workload.architecture.name} at {width}x{height}, batch {workload.batch}, which preset "
        f"{least.preset.name!r} needs"
    )
    hint = "" if rank is None else f"rank {rank} would fit"
    raise ArgumentError("plan", "memory", wanted, f"{usable_gb:g} GB", hint)


def _smaller_rank(workload: Workload, usable_gb: float, least: Forecast) -> int | None:
    """The largest power of two, as the rank of a LoRA, that fits; None: none."""
    rank, trained = workload.lora_rank, sum(least.bytes[part] for part in _BY_RANK)
    if rank is None:
        return None
    most = rank * (1 - (least.needed - usable_gb * 1e9) / trained)  # nearly: what else is trained does not shrink
    for smaller in (2**n for n in reversed(range(rank.bit_length())) if 2**n <= min(most, rank - 1)):
        if Planner(workload.but(lora_rank=smaller)).forecast(least.preset).fits(usable_gb):
            return smaller
    return None


def _mixture(
    planner: Planner, usable_gb: float, preset: MemoryPreset, known: dict[MemoryPreset, Forecast]
) -> Forecast | None:
    """As many blocks as fit keep their products, from the last on, where a preset keeps less; None: not one does."""
    if preset.saved not in _MIXED or preset.offload_gb:
        return None
    blocks = len(planner.workload.architecture.blocks())
    ends = [_same_but(preset, level, known) for level in (_LESS, _MORE)]
    least, most = (known.get(end) or planner.forecast(end) for end in ends)
    room = usable_gb * (1 - SPARE) * 1e9 - least.peak
    count = min(int(blocks * room / max(most.peak - least.peak, 1)), blocks)
    for kept in (count, count - 1, count - 2):
        if kept < 1:
            return None
        found = planner.forecast(mixed(blocks, kept, preset))
        if found.fits(usable_gb):
            return found
    return None


def _same_but(preset: MemoryPreset, saved: str, known: dict[MemoryPreset, Forecast]) -> MemoryPreset:
    """A preset whose blocks keep another level: the known one that does the same, if there is one."""
    wanted = replace(preset, saved=saved)
    return next((other for other in known if replace(other, name=preset.name) == wanted), wanted)


def mixed(blocks: int, kept: int, preset: MemoryPreset) -> MemoryPreset:
    """A preset's like, named `auto`, whose last `kept` of some blocks keep their products, the others their input."""
    return replace(preset, name="auto", saved=(_LESS,) * (blocks - kept) + (_MORE,) * kept)
