"""`ShortenedModel`: a model with three blocks of each kind, that stands for the whole one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from twinflow.errors import require
from twinflow.memory.planner.architectures import Architecture, Block
from twinflow.memory.planner.simulation.timeline import Repeat
from twinflow.memory.presets import MemoryPreset


@dataclass(frozen=True)
class ShortenedModel:
    """A smaller architecture, and what its blocks stand for.

    Args:
        architecture: with fewer blocks.
        levels: name of a block -> what it keeps for backward.
        repeats: name of a block -> which further blocks of the whole model it stands for.
    """

    architecture: Architecture
    levels: Mapping[str, str]
    repeats: Mapping[str, Repeat]

    def times(self, parameter: str) -> int:
        """How often a parameter or buffer of the small model is there in the whole one."""
        found = (1 + repeat.more for block, repeat in self.repeats.items() if f".{block}." in f".{parameter}")
        return next(found, 1)


def shorten(architecture: Architecture, preset: MemoryPreset, whole: bool = False) -> ShortenedModel:
    """Shortens every run of blocks that are alike and keep alike to its first, a middle one and its last.

    Args:
        whole: leave it as it is.

    Raises:
        ValueError: the preset has levels for another number of blocks.
    """
    blocks = architecture.blocks()
    given = (preset.saved,) * len(blocks) if isinstance(preset.saved, str) else preset.saved
    levels_of = f"{len(blocks)} levels for {architecture.name}"
    require(len(given) == len(blocks), "plan", "saved", levels_of, len(given), verb="have")
    staying: list[Block] = []
    levels: dict[str, str] = {}
    repeats: dict[str, Repeat] = {}
    counts: dict[str, int] = {}
    for level, run in _runs(blocks, given):
        few = run if whole else run[:1] + run[1:2] * (len(run) > 2) + run[-1:] * (len(run) > 1)
        for position, block in enumerate(few):
            name = f"{block.place}.{counts.get(block.place, 0)}"
            counts[block.place] = counts.get(block.place, 0) + 1
            levels[name] = level
            if position == 1 and len(run) > len(few):
                around = tuple(f"{block.place}.{counts[block.place] + i}" for i in (-2, -1, 0))
                repeats[name] = Repeat(len(run) - len(few), around)
            staying.append(block)
    return ShortenedModel(architecture.with_blocks(staying), levels, repeats)


def _runs(blocks: list[Block], levels: tuple[str, ...]) -> Iterator[tuple[str, list[Block]]]:
    for (_, level), group in groupby(zip(blocks, levels, strict=True), key=lambda item: (item[0].kind, item[1])):
        yield level, [block for block, _ in group]
