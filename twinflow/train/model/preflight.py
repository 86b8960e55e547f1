"""`require_trainable()`: what would end a run after hours of encoding ends it before."""

import warnings
from pathlib import Path
from typing import Any

from twinflow.memory.modulation.layers import deferrable_layers
from twinflow.memory.presets import preset_of
from twinflow.memory.quantised_linear import LIBRARIES, load_library
from twinflow.train.config.settings import TrainSettings
from twinflow.train.model.parallel import check_sharded, launcher_kind
from twinflow.train.model.student import build_student


def require_trainable(settings: TrainSettings, folder: Path, accelerator: Any) -> None:
    """Builds the student without its weights, and looks for what its memory preset and its optimizer need.

    Seeds torch's global stream, as `build_student` does.

    Args:
        settings: of the run.
        folder: of its pipeline.
        accelerator: accelerate's, for the kind of parallelism.

    Raises:
        ValueError: another family, layers that no LoRA can be put on, a base LoRA of another model, a preset that does
            not apply, or a launcher that is not supported.
        ImportError: a library is missing.
    """
    sharded = launcher_kind(accelerator) == "fsdp2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said again when the weights are there
        student = build_student(settings, folder, weights=False)
    preset = None if settings.memory_preset == "auto" else preset_of(settings.memory_preset)
    if sharded:
        check_sharded(settings, student, preset)
    if preset is not None and preset.defer:
        deferrable_layers(student)
    if preset is not None and preset.base is not None:
        load_library(LIBRARIES[preset.base], "train")
    if "adamw8bit" in (settings.optimizer, None if preset is None else preset.optimizer):
        load_library("bitsandbytes", "train")
