"""`Trackers`: a run's measurements in TensorBoard and wandb, through accelerate's trackers."""

import importlib.util
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image

from twinflow.errors import ArgumentError
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.config.settings import TrainSettings
from twinflow.train.logging.trajectory import TITLE, Point, Trajectory, figure

SCATTER_STEPS = 500  # between two trajectory scatters
_MOST_PIXELS = 2048  # an edge of an image in TensorBoard, at most
_SCALARS = {
    "loss": "loss/total", "grad_norm": "optimizer/grad_norm", "learning_rate": "optimizer/learning_rate",
    "s_per_step": "speed/s_per_step", "rows_per_s": "speed/rows_per_s", "peak_gb": "memory/peak_gb",
}  # fmt: skip


class Trackers:
    """The trackers of `report_to`; the main process alone makes them, before the first step.

    Args:
        settings: name them.
        run: has TensorBoard's event files, wandb's files and the run's identity there.
        step: steps taken by the checkpoint that the run resumes from. TensorBoard drops what earlier files say of later
            ones; wandb shows values by `global_step`, the later value of the same step last.

    Raises:
        ArgumentError: a library is not installed, or wandb has no account to write to.
    """

    def __init__(self, settings: TrainSettings, run: RunFolder, step: int = 0) -> None:
        names = required_trackers(settings)
        self._trajectory = Trajectory()
        self._since: int | None = None  # the first step of the trajectory
        self._board, self._wandb = None, None
        if "tensorboard" in names:
            self._board = TensorBoardTracker("", run.logs, purge_step=step + 1)
            self._board.start()
        if "wandb" in names:
            self._wandb = _wandb(settings, run)

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Sends what was measured; once in `SCATTER_STEPS` steps with a scatter of the times since.

        Args:
            records: of `metrics.jsonl`, see `RunFolder`, those of some steps together.
        """
        for record in records:
            values = scalars(record)
            if values and self._board is not None:
                self._board.log(values, record["step"])
            if values and self._wandb is not None:
                self._wandb.log({"global_step": record["step"], **values})
        self._trajectory.add(records)
        steps = [record["step"] for record in records if record.get("trajectory")]
        if steps:
            self._since = steps[0] if self._since is None else self._since
            if steps[-1] - self._since >= SCATTER_STEPS - 1:
                self._send_trajectory()

    def images(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Sends samples: to TensorBoard the grid, where there is one, and the prompts as text; to wandb each image.

        Args:
            folder: has the images.
            record: what `samples.json` says of them, see `RunFolder`.
        """
        step, tag, says = record["step"] or 0, f"samples/{record['weights']}", captions(record)
        if self._board is not None:
            names = [record["grid"]] if record.get("grid") else [image["file"] for image in record["images"]]
            labels = [tag] if len(names) == 1 else [f"{tag} {number:02}" for number in range(1, len(names) + 1)]
            pixels = {label: _pixels(folder / name) for label, name in zip(labels, names, strict=True)}
            self._board.log_images(pixels, step, dataformats="NHWC")
            self._board.log({tag: "\n".join(f"{number}. {text}" for number, text in enumerate(says, 1))}, step)
        if self._wandb is not None:
            import wandb

            pictures = [Image.open(folder / image["file"]).convert("RGB") for image in record["images"]]
            pairs = zip(pictures, says, strict=True)
            images = [wandb.Image(picture, caption=text, file_type="jpg") for picture, text in pairs]
            self._wandb.log({"global_step": step, tag: images})

    def close(self) -> None:
        """Sends what is left; may be called twice. wandb's own process may write until this one ends."""
        self._send_trajectory()
        for tracker in (self._board, self._wandb):
            if tracker is not None:
                tracker.finish()

    def _send_trajectory(self) -> None:
        """The scatter; wandb's own has no colours: the figure beside it has."""
        points = self._trajectory.points
        if not points:
            return
        step = points[-1].global_step
        if self._board is not None:
            self._board.log_images({"trajectory": figure(points)[None]}, step, dataformats="NHWC")
        if self._wandb is not None:
            import wandb

            table = wandb.Table(columns=list(Point._fields), data=[list(point) for point in points])
            scatter = wandb.plot.scatter(table, "sigma", "r", title=TITLE, split_table=True)
            figures = {"trajectory/scatter": scatter, "trajectory/figure": wandb.Image(figure(points))}
            self._wandb.log({"global_step": step, **figures})
        self._trajectory, self._since = Trajectory(), None


def required_trackers(settings: TrainSettings) -> list[str]:
    """The libraries that `report_to` names.

    Raises:
        ArgumentError: one of them is not installed.
    """
    names = {"none": [], "all": ["tensorboard", "wandb"]}.get(settings.report_to, [settings.report_to])
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a mere folder of that name, as wandb leaves some
            raise ArgumentError("train", "report_to", "installed libraries", f"{name}: pip install {name}", verb="name")
    return names


def _wandb(settings: TrainSettings, run: RunFolder) -> WandBTracker:
    """The run in wandb, the same one however often it is resumed; `WANDB_MODE=offline` keeps it on the disk."""
    import wandb

    run.root.mkdir(parents=True, exist_ok=True)
    identity = run.wandb_id.read_text().strip() if run.wandb_id.is_file() else ""
    identity = identity or uuid.uuid4().hex[:12]
    tracker = WandBTracker(
        settings.tracker_project_name, name=settings.tracker_run_name, config=json.loads(settings.to_json()),
        dir=str(run.root), id=identity, resume="allow", settings=wandb.Settings(console="off", silent=True),
    )  # fmt: skip
    try:
        tracker.start()
    except wandb.errors.Error as error:
        wanted = "an account (`wandb login`, or WANDB_MODE=offline)"
        raise ArgumentError("train", "report_to wandb", wanted, " ".join(str(error).split()), verb="have") from None
    run.wandb_id.write_text(identity + "\n")
    tracker.tracker.define_metric("global_step", hidden=True)
    tracker.tracker.define_metric("*", step_metric="global_step")
    return tracker


def _pixels(path: Path) -> np.ndarray:
    """An image as (1, H, W, 3)."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    return np.asarray(picture)[None]


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
    """The caption of each image of `samples.json`."""
    return [
        f"{image['prompt']} ({image['steps']} step{'s' * (image['steps'] != 1)}, guidance {image['guidance']:g}, "
        f"seed {image['seed']})"
        for image in record["images"]
    ]
