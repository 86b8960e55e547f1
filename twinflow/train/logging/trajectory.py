"""`Trajectory`: the times that steps were taken at, as points of a scatter: sigma = |t| against |r|, and t's sign."""

import random
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

TITLE = "Trajectory: sigma against r (experimental/theory unverified)"
SIGNS = {1: "t > 0, towards the data", -1: "t < 0, towards the student's own samples"}
COLOURS = {1: "#3b6fd4", -1: "#e0633a"}


class Point(NamedTuple):
    """A row of a step; `r` is a magnitude like sigma, `time_sign` 1 or -1, that of t."""

    global_step: int
    sigma: float
    r: float
    time_sign: int


class Trajectory:
    """Points of any number of steps, a fair sample of them above a number.

    Args:
        most: points that are kept.

    Attributes:
        seen: how many points there were.
    """

    def __init__(self, most: int = 4096) -> None:
        self._most, self.seen = most, 0
        self._kept: list[Point] = []
        self._random = random.Random(0)  # which points are kept is the same every time

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Takes the pairs in `trajectory` of the records that have some, see `RunFolder`."""
        for record in records:
            for t, r in record.get("trajectory", ()):
                self._keep(Point(record["step"], abs(t), abs(r), -1 if t < 0 else 1))

    def _keep(self, point: Point) -> None:
        """Each of n points seen is among those kept with the same chance, whatever the order of a step's rows."""
        self.seen += 1
        if len(self._kept) < self._most:
            self._kept.append(point)
        elif (place := self._random.randrange(self.seen)) < self._most:
            self._kept[place] = point

    @property
    def points(self) -> list[Point]:
        """Those kept, by step."""
        return sorted(self._kept)


def figure(points: Iterable[Point]) -> np.ndarray:
    """The scatter as a picture.

    Args:
        points: in any order.

    Returns:
        uint8 (H, W, 3).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = list(points)
    canvas = FigureCanvasAgg(Figure(figsize=(6.0, 4.6), dpi=120, layout="constrained"))
    axis = canvas.figure.add_subplot()
    axis.plot([0, 1], [0, 1], color="#9aa1a9", lw=0.8, zorder=1)
    for sign, says in SIGNS.items():
        own = [point for point in points if point.time_sign == sign]
        if own:
            axis.scatter([p.sigma for p in own], [p.r for p in own], s=9, alpha=0.5, lw=0, color=COLOURS[sign],
                         label=f"{says} ({len(own)})")  # fmt: skip
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="sigma = |t|", ylabel="|r|")
    axis.set_title(TITLE, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper left", markerscale=2)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
