"""`WandbTracker`: a run in wandb, the same one however often it goes on."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from PIL import Image

from twinflow.train.config.run_folder import RunFolder
from twinflow.train.logging.trackers import Tracker, captions
from twinflow.train.logging.trajectory import TITLE, Point, figure


class WandbTracker(Tracker):
    """A run in wandb; `WANDB_MODE=offline` keeps it on the disk.

    Values are shown by `global_step`: steps that are taken again after a resume are later values of the same steps.

    Args:
        project: in wandb.
        name: of the run.
        config: shown with it.
        folder: of the run: has the run's identity and wandb's files.

    Raises:
        ValueError: there is no account to write to.
    """

    def __init__(self, project: str, name: str, config: Mapping[str, Any], folder: Path) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        kept = RunFolder(folder).wandb_id
        identity = kept.read_text().strip() if kept.is_file() else ""
        identity = identity or uuid.uuid4().hex[:12]
        try:
            self._run = wandb.init(
                project=project, name=name, config=dict(config), dir=str(folder), id=identity, resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise ValueError(
                f"train: report_to wandb must have an account: `wandb login`, or WANDB_MODE=offline; got: "
                f"{' '.join(str(error).split())}"
            ) from None
        kept.write_text(identity + "\n")
        self._run.define_metric("global_step", hidden=True)
        self._run.define_metric("*", step_metric="global_step")

    def images(self, folder: Path, record: Mapping[str, Any]) -> None:
        found = [_picture(folder / image["file"], says)
                 for image, says in zip(record["images"], captions(record), strict=True)]  # fmt: skip
        self._send(record["step"] or 0, {f"samples/{record['weights']}": found})

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        if values:
            self._send(step, values)

    def _scatter(self, step: int, points: list[Point]) -> None:
        """wandb's own scatter has no colours: the figure beside it has."""
        table = wandb.Table(columns=list(Point._fields), data=[list(point) for point in points])
        scatter = wandb.plot.scatter(table, "sigma", "r", title=TITLE, split_table=True)
        self._send(step, {"trajectory/scatter": scatter, "trajectory/figure": wandb.Image(figure(points))})

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"global_step": step, **values})

    def _end(self) -> None:
        self._run.finish()


def _picture(path: Path, caption: str) -> wandb.Image:
    with Image.open(path) as image:
        return wandb.Image(image.convert("RGB"), caption=caption, file_type="jpg")
