"""`Run`: the contents of a run's folder, and in words what of it cannot be read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinflow.errors import ArgumentError
from twinflow.report.samples import SampleSet, read_samples
from twinflow.report.series import Series, read_series
from twinflow.train.config.resolve import read_config
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.config.settings import TrainSettings


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder.

    Args:
        settings: None: there is no config, or it cannot be resolved.
        config: the object in config.json.
        environment: versions and devices.
        sets, base: samples on the way, and of the base model.
        complaints: a sentence for each thing that cannot be read.
    """

    name: str
    settings: TrainSettings | None
    config: dict[str, Any]
    environment: dict[str, Any]
    series: Series
    sets: list[SampleSet]
    base: SampleSet | None
    complaints: list[str]

    @property
    def total(self) -> int | None:
        """Steps of the whole run; None: unknown."""
        return None if self.settings is None else self.settings.max_train_steps

    @property
    def resumes(self) -> list[int]:
        """Steps after which the run was resumed."""
        return sorted({step for step, _ in self.series.starts[1:]})

    @property
    def twinflow(self) -> bool:
        """Whether TwinFlow is on; True where nothing says so."""
        return self.settings is None or self.settings.twinflow is not None


def read_run(folder: RunFolder) -> Run:
    """Reads a run's folder, whatever there is of it so far.

    Raises:
        ValueError: it is no folder of a run, or cannot be read.
    """
    if not folder.root.is_dir():
        raise _error(f"{str(folder.root)!r}, which {'is a file' if folder.root.exists() else 'does not exist'}")
    if not any(path.is_file() for path in (folder.metrics, folder.config)):
        raise _error(f"{str(folder.root)!r} without either")
    complaints: list[str] = []
    config = _object(folder.config, complaints)
    settings = _settings(folder.config, complaints) if config else None
    try:
        series = read_series(folder.metrics)
    except OSError as error:
        raise _error(f"{str(folder.metrics)!r}: {error.strerror}") from None
    if series.damaged:
        what = "1 line of metrics.jsonl is" if series.damaged == 1 else f"{series.damaged} lines of metrics.jsonl are"
        complaints.append(f"{what} damaged and left out")
    sets, base = read_samples(folder, complaints)
    name = folder.root.absolute().name if settings is None else settings.tracker_run_name
    environment = _object(folder.environment, complaints)
    return Run(name, settings, config, environment, series, sets, base, complaints)


def _error(got: str) -> ArgumentError:
    wanted = "the folder of a run, with metrics.jsonl or config.json"
    return ArgumentError("write_report", "run", wanted, got)


def _object(path: Path, complaints: list[str]) -> dict[str, Any]:
    if not path.is_file():
        complaints.append(f"{path.name} does not exist")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        complaints.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(value, dict):
        complaints.append(f"{path.name} must hold an object, got a {type(value).__name__}")
        return {}
    return value


def _settings(path: Path, complaints: list[str]) -> TrainSettings | None:
    try:
        return read_config(path, {})
    except (ValueError, TypeError) as error:
        complaints.append(f"config.json is shown as it stands: {error}")
        return None
