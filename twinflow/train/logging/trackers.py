"""`Tracker`: where a run's measurements go beside `metrics.jsonl`, such as TensorBoard or wandb."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twinflow.train.logging.trajectory import Point, Trajectory

SCATTER_STEPS = 500  # between two trajectory scatters
_SCALARS = {
    "loss": "loss/total", "grad_norm": "optimizer/grad_norm", "learning_rate": "optimizer/learning_rate",
    "s_per_step": "speed/s_per_step", "rows_per_s": "speed/rows_per_s", "peak_gb": "memory/peak_gb",
}  # fmt: skip


class Tracker(ABC):
    """A place that measurements are sent to; it is used by the main process alone."""

    def __init__(self) -> None:
        self._trajectory = Trajectory()
        self._since: int | None = None  # the first step of that

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Sends what was measured; once in `SCATTER_STEPS` steps with a scatter of the times since.

        Args:
            records: of `metrics.jsonl`, see `RunFolder`, those of some steps together.
        """
        for record in records:
            self._scalars(record["step"], scalars(record))
        self._trajectory.add(records)
        steps = [record["step"] for record in records if record.get("trajectory")]
        if steps:
            self._since = steps[0] if self._since is None else self._since
            if steps[-1] - self._since >= SCATTER_STEPS - 1:
                self._draw()

    @abstractmethod
    def images(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Sends samples.

        Args:
            folder: has the images.
            record: what `samples.json` says of them, see `RunFolder`.
        """

    def close(self) -> None:
        """Sends what is left; may be called twice. A library's own process may write until this one ends."""
        self._draw()
        self._end()

    def _draw(self) -> None:
        points = self._trajectory.points
        if points:
            self._scatter(points[-1].global_step, points)
            self._trajectory, self._since = Trajectory(), None

    @abstractmethod
    def _scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    @abstractmethod
    def _scatter(self, step: int, points: list[Point]) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The values of a record by the names that trackers show; what is null or was not measured is left out."""
    if record["kind"] == "step":
        found = {name: record.get(key) for key, name in _SCALARS.items()}
        found |= {f"loss/{term}": value for term, value in record.get("terms", {}).items()}
    elif record["kind"] == "evaluation":
        found = {"evaluation/loss": record.get("loss")}
        found |= {f"evaluation/{term}": value for term, value in record.get("terms", {}).items()}
    else:
        found = {}
    return {name: value for name, value in found.items() if value is not None}


def captions(record: Mapping[str, Any]) -> list[str]:
    """What stands under each image of `samples.json`."""
    return [
        f"{image['prompt']} ({image['steps']} step{'s' * (image['steps'] != 1)}, guidance {image['guidance']:g}, "
        f"seed {image['seed']})"
        for image in record["images"]
    ]
