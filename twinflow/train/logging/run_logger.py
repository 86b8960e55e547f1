"""`RunLogger`: what a run leaves for those who look at it: `metrics.jsonl`, and the trackers."""

import importlib.util
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

from twinflow.distributed import world
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.config.settings import TrainSettings
from twinflow.train.logging.metrics_file import MetricsFile, keep_until
from twinflow.train.logging.sample_folder import SUMMARY
from twinflow.train.logging.trackers import Tracker


class RunLogger:
    """Writes on the main process; on the others it does nothing. A context manager.

    Args:
        settings: of the run.
        run: its folder; records after `step` are forgotten, as these steps are taken again.
        step: steps taken.

    Raises:
        ValueError: a tracker's library is missing.
    """

    def __init__(self, settings: TrainSettings, run: RunFolder, step: int) -> None:
        self._run = run
        self._file: MetricsFile | None = None
        self._trackers: list[Tracker] = []
        if world()[0] == 0:
            self._trackers = trackers_of(settings, run, step)
            keep_until(run.metrics, step)
            self._file = MetricsFile(run.metrics)
            self._file.append([{"kind": "start", "step": step, "at": datetime.now(timezone.utc).isoformat()}])

    def steps(self, records: list[dict[str, Any]]) -> None:
        """Keeps records of `metrics.jsonl`'s form."""
        if self._file is not None:
            self._file.append(records)
            for tracker in self._trackers:
                tracker.log(records)

    def evaluation(self, step: int, found: Mapping[str, Any]) -> None:
        """Keeps a validation loss of `Evaluation.run`."""
        self.steps([{"kind": "evaluation", "step": step, **found}])

    def samples(self, step: int | None) -> None:
        """Shows the samples of a step to the trackers; None: of the base model."""
        folder = self._run.samples_at(step)
        for tracker in self._trackers:
            tracker.images(folder, json.loads((folder / SUMMARY).read_text(encoding="utf-8")))

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for tracker in self._trackers:
            tracker.close()


def required_trackers(settings: TrainSettings) -> list[str]:
    """The libraries that `report_to` asks for.

    Raises:
        ValueError: one of them is not installed.
    """
    asked = {"none": [], "all": ["tensorboard", "wandb"]}.get(settings.report_to, [settings.report_to])
    for name in asked:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a mere folder of that name, as wandb leaves some
            raise ValueError(f"train: report_to must name installed libraries, got {name}: pip install {name}")
    return asked


def trackers_of(settings: TrainSettings, folder: RunFolder, step: int = 0) -> list[Tracker]:
    """The trackers that `report_to` asks for, opened; the main process alone calls it, before the first step.

    Args:
        settings: of the run.
        folder: of the run.
        step: steps taken so far, by the checkpoint that the run goes on from: later values are replaced.

    Raises:
        ValueError: a library is not installed, or wandb has no account to write to.
    """
    found: list[Tracker] = []
    for name in required_trackers(settings):
        if name == "tensorboard":
            from twinflow.train.logging.tensorboard_tracker import TensorBoardTracker

            found.append(TensorBoardTracker(folder.logs, step))
        else:
            from twinflow.train.logging.wandb_tracker import WandbTracker

            config = json.loads(settings.to_json())
            found.append(WandbTracker(settings.tracker_project_name, settings.tracker_run_name, config, folder.root))
    return found
