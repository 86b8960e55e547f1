"""`Series`: the measurements of a run by name, and as few numbers as a curve needs."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinflow.train.logging.metrics_file import each_line
from twinflow.train.logging.trajectory import Trajectory

Values = list[float | None]

_PLAIN = ("seconds", "loss", "grad_norm", "learning_rate", "s_per_step", "rows_per_s", "peak_gb")
TERM = "term "  # before the name of a term, in `columns`
MOST_POINTS = 700  # of a curve
MOST_DOTS = 1500  # of the scatter
_SMOOTHED = 40  # a curve is smoothed over this part of its points


@dataclass
class Series:
    """What `metrics.jsonl` says.

    Args:
        steps: that were measured, ascending.
        columns: name -> a value per step, None where there was none; terms are named `TERM` + name.
        starts: (step, time) of each begin.
        trajectory: times of the steps.
        damaged: lines that could not be read.
    """

    steps: list[int] = field(default_factory=list)
    columns: dict[str, Values] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    starts: list[tuple[int, str]] = field(default_factory=list)
    trajectory: Trajectory = field(default_factory=lambda: Trajectory(MOST_DOTS))
    damaged: int = 0

    @property
    def last(self) -> int:
        """The last step that anything says of."""
        return max([0, *self.steps[-1:], *(record["step"] for record in self.evaluations[-1:]),
                    *(step for step, _ in self.starts[-1:])])  # fmt: skip

    def values(self, name: str) -> list[float]:
        """The measured values of a column."""
        return [value for value in self.columns.get(name, []) if value is not None]


def read_series(path: Path) -> Series:
    """The measurements in a `metrics.jsonl`, a record at a time; of steps that were taken again, the later ones.

    Raises:
        OSError: it cannot be read.
    """
    series = Series()
    for _, record in each_line(path):
        if record is None:
            series.damaged += 1
        elif record["kind"] == "start":
            _cut(series, record["step"] + 1)
            series.starts.append((record["step"], str(record.get("at", ""))))
        elif record["kind"] == "evaluation":
            series.evaluations = [old for old in series.evaluations if old["step"] < record["step"]]
            series.evaluations.append(record)
        else:
            _add(series, record)
    return series


def _cut(series: Series, step: int) -> None:
    """Forgets this step and later ones."""
    if series.steps and series.steps[-1] >= step:
        kept = bisect_left(series.steps, step)
        del series.steps[kept:]
        for column in series.columns.values():
            del column[kept:]
    series.evaluations = [record for record in series.evaluations if record["step"] < step]


def _add(series: Series, record: dict[str, Any]) -> None:
    if series.steps and series.steps[-1] >= record["step"]:
        _cut(series, record["step"])
    values = {name: record.get(name) for name in _PLAIN}
    values |= {f"{TERM}{name}": value for name, value in record.get("terms", {}).items()}
    for name in values:
        series.columns.setdefault(name, [None] * len(series.steps))
    series.steps.append(record["step"])
    for name, column in series.columns.items():
        column.append(values.get(name))
    series.trajectory.add([record])


def curves(series: Series, most: int = MOST_POINTS) -> dict[str, Any]:
    """The columns as curves of at most so many points.

    Returns:
        `first` and `last`, the steps that a point stands for; and `columns`, by name: `mean`, `low` and `high` of these
        steps, and `smooth`, the mean over a fortieth of the curve. Columns without a value are left out.
    """
    every = max(1, -(-len(series.steps) // most))
    starts = range(0, len(series.steps), every)
    drawn: dict[str, Any] = {}
    for name, column in series.columns.items():
        parts = [[value for value in column[k : k + every] if value is not None] for k in starts]
        if any(parts):
            drawn[name] = {
                "mean": [_short(sum(part) / len(part)) if part else None for part in parts],
                "low": [_short(min(part)) if part else None for part in parts] if every > 1 else None,
                "high": [_short(max(part)) if part else None for part in parts] if every > 1 else None,
                "smooth": list(_smooth(parts)),
            }
    ends = [min(k + every, len(series.steps)) - 1 for k in starts]
    return {
        "first": [series.steps[k] for k in starts], "last": [series.steps[k] for k in ends], "columns": drawn,
    }  # fmt: skip


def _smooth(parts: list[list[float]]) -> Iterator[float | None]:
    """Means over neighbours, as many before as after, fewer at the ends."""
    reach = len(parts) // _SMOOTHED // 2
    sums, counts = [0.0], [0]
    for part in parts:
        sums.append(sums[-1] + sum(part))
        counts.append(counts[-1] + len(part))
    for k in range(len(parts)):
        near = min(reach, k, len(parts) - 1 - k)
        count = counts[k + near + 1] - counts[k - near]
        yield _short((sums[k + near + 1] - sums[k - near]) / count) if count else None


def _short(value: float) -> float:
    return float(f"{value:.4g}")
