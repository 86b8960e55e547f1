"""`RunLogger`: what a run leaves for those who look at it: `metrics.jsonl`, and the trackers."""

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

from twinflow.distributed import world
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.config.settings import TrainSettings
from twinflow.train.logging.metrics_file import append_records, keep_until
from twinflow.train.logging.sample_folder import SUMMARY
from twinflow.train.logging.trackers import Trackers


class RunLogger:
    """Writes on the main process; on the others it does nothing. A context manager.

    Args:
        run: its folder; records after `step` are forgotten, as these steps are taken again.

    Raises:
        ValueError: a tracker's library is missing.
    """

    def __init__(self, settings: TrainSettings, run: RunFolder, step: int) -> None:
        self._run = run
        self._trackers: Trackers | None = None
        if world()[0] == 0:
            self._trackers = Trackers(settings, run, step)
            keep_until(run.metrics, step)
            append_records(run.metrics, [{"kind": "start", "step": step, "at": datetime.now(timezone.utc).isoformat()}])

    def steps(self, records: list[dict[str, Any]]) -> None:
        """Keeps records of `metrics.jsonl`'s form."""
        if self._trackers is not None:
            append_records(self._run.metrics, records)
            self._trackers.log(records)

    def evaluation(self, step: int, found: Mapping[str, Any]) -> None:
        """Keeps a validation loss of `Evaluation.run`."""
        self.steps([{"kind": "evaluation", "step": step, **found}])

    def samples(self, step: int | None) -> None:
        """Shows the samples of a step to the trackers; None: of the base model."""
        if self._trackers is not None:
            folder = self._run.samples_at(step)
            self._trackers.images(folder, json.loads((folder / SUMMARY).read_text(encoding="utf-8")))

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._trackers is not None:
            self._trackers.close()
