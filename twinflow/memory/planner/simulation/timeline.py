"""`Region`, `splice()`: from the timeline of a few blocks to that of a whole model.

Blocks that are alike do alike: every further one repeats the allocations and frees of the middle one. A timeline at
full depth is therefore that of three blocks with the middle one's regions repeated; bytes grow linearly over the
repeats, so that their first or last has the peak, and costs add up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass
class Region:
    """A stretch of a run between two marks.

    Args:
        name: what runs.
        block: the repeated block it belongs to; None: none.
        start, most, end: bytes live at its start, at most, at its end.
        workspace: bytes of `most` that kernels held inside themselves.
        cost: the sum over its operations.
        freed: (name, block) of the regions that storages were made in -> bytes of them that were freed here.
        notes: bytes at its start by the caller's own account.
    """

    name: str
    block: str | None
    start: int
    most: int
    end: int
    workspace: int = 0
    cost: Any = None
    freed: dict[tuple[str, str | None], int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Repeat:
    """That a block stands for several.

    Args:
        more: how many further ones.
        run: its name and those of the blocks of its kind around it.
    """

    more: int
    run: tuple[str, ...]


@dataclass(frozen=True)
class Peak:
    """The most bytes of a timeline: where, and how they split.

    Args:
        total: bytes.
        name, block: the region that has them.
        start: bytes of them that were live when the region began.
        workspace: bytes that a kernel held inside itself.
        notes: the region's notes, at full depth.
        most_notes: the most of each note at any region's start, at full depth.
    """

    total: int
    name: str
    block: str | None
    start: int
    workspace: int
    notes: Mapping[str, int]
    most_notes: Mapping[str, int] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The region, in words."""
        return self.name + (f", {self.block}" if self.block else "")


def splice(regions: Sequence[Region], repeats: Mapping[str, Repeat]) -> tuple[Peak, dict[str, Any]]:
    """The peak and the summed costs of a timeline in which some blocks' regions stand for several.

    Args:
        regions: in order of time; each starts with the bytes that the one before ended with.
        repeats: block -> what it stands for.

    Returns:
        The peak, and name of a region -> the sum of its costs.
    """
    peak, offset = None, 0
    costs: dict[str, Any] = {}
    noted: dict[str, int] = {}
    most: dict[str, int] = {}
    for i, region in enumerate(regions):
        repeat = repeats.get(region.block or "")
        more = repeat.more if repeat else 0
        net = region.end - region.start
        after = regions[i + 1].notes if i + 1 < len(regions) else region.notes
        growth = {name: after.get(name, 0) - value for name, value in region.notes.items()}
        for copies in {0, more}:
            total = region.most + offset + copies * net
            notes = {n: v + noted.get(n, 0) + copies * growth[n] for n, v in region.notes.items()}
            most |= {n: max(v, most.get(n, 0)) for n, v in notes.items()}
            if peak is None or total > peak.total:
                start = region.start + offset + copies * net
                peak = Peak(total, region.name, region.block, start, region.workspace, notes)
        offset += more * net if more else -_freed_together(region, repeats)
        noted = {name: noted.get(name, 0) + more * growth[name] for name in growth}
        if region.cost is not None:
            spent = region.cost * (1 + more)
            costs[region.name] = costs[region.name] + spent if region.name in costs else spent
    assert peak is not None
    return replace(peak, most_notes=most), costs


def _freed_together(region: Region, repeats: Mapping[str, Repeat]) -> int:
    """Bytes of the further blocks that a region outside of them frees: what each block made and none let go.

    What a block passes on to the next is freed there, so that a region which frees a middle block's bytes but not those
    of both its neighbours follows the last of them, and frees nothing of the others.
    """
    names = {name for name, _ in region.freed}
    return sum(
        repeat.more * min(region.freed.get((name, block), 0) for block in repeat.run)
        for repeat in repeats.values()
        for name in names
    )
