"""`TensorBoardTracker`: event files for `tensorboard --logdir`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from twinflow.train.logging.trackers import Tracker, captions
from twinflow.train.logging.trajectory import Point, figure

_MOST_PIXELS = 2048  # an edge of an image, at most


class TensorBoardTracker(Tracker):
    """Event files in a folder.

    Args:
        folder: of the event files.
        step: steps taken so far; TensorBoard drops what earlier files say of later ones.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        super().__init__()
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, records: Any) -> None:
        super().log(records)
        self._writer.flush()

    def images(self, folder: Path, record: Mapping[str, Any]) -> None:
        """The grid, where there is one, otherwise image by image; prompts are a text beside them."""
        step, tag = record["step"] or 0, f"samples/{record['weights']}"
        names = [record["grid"]] if record.get("grid") else [image["file"] for image in record["images"]]
        for number, name in enumerate(names):
            label = tag if len(names) == 1 else f"{tag} {number + 1:02}"
            self._writer.add_image(label, _pixels(folder / name), step, dataformats="HWC")
        lines = [f"{number}. {caption}" for number, caption in enumerate(captions(record), 1)]
        self._writer.add_text(tag, "\n".join(lines), step)
        self._writer.flush()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def _scatter(self, step: int, points: list[Point]) -> None:
        self._writer.add_image("trajectory", figure(points), step, dataformats="HWC")

    def _end(self) -> None:
        self._writer.close()


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    return np.asarray(picture)
