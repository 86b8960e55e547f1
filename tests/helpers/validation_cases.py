"""A run's settings, data and sampler for the tests of validation."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.cache_cases import digits
from helpers.export_cases import scrambled
from helpers.tiny_pipelines import saved_pipeline
from PIL import Image

from twinflow.models import FlowModel
from twinflow.train import TrainSettings, read_config
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.data.cache import Cache
from twinflow.train.data.prepare import encoders_of, prepare_data
from twinflow.train.model.student import build_student
from twinflow.train.validation.prompts import ValidationPrompts, validation_prompts
from twinflow.train.validation.samples import Sampler

CPU = torch.device("cpu")
PROMPTS = ("a red fox", "two dogs on a green hill")


def settings_for(folder: Path, family: str = "sd3", **changes: Any) -> TrainSettings:
    """Of a run with digits as data; images are wider than high."""
    chosen = {
        "pretrained_model_name_or_path": str(saved_pipeline(family)), "output_dir": str(folder / "run"),
        "instance_data_dir": str(folder / "digits"), "resolution": 64 if family == "sana" else 32, "lora_rank": 4,
        "mixed_precision": "no", "use_ema": True, "twinflow_enabled": True, "twinflow_target_step_count": 2,
        "validation_prompts": PROMPTS, "validation_resolution": "96x64" if family == "sana" else "48x32",
        "validation_seed": 5,
        **({"model_family": "unet", "diff2flow_enabled": True, "twinflow_allow_diff2flow": True}
           if family == "sd15" else {}),
    }  # fmt: skip
    return read_config(None, chosen | changes)


def data_of(settings: TrainSettings) -> Cache:
    """The cache of twelve digits."""
    assert settings.instance_data_dir is not None
    digits(settings.instance_data_dir, 12)
    encoders = encoders_of(settings, Path(settings.pretrained_model_name_or_path), CPU)
    return prepare_data(settings, encoders, progress=lambda what, done, of: None)


@functools.cache
def cached(family: str) -> Cache:
    """The data of `settings_for`, encoded once."""
    folder = Path(tempfile.mkdtemp(prefix="twinflow-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return data_of(settings_for(folder, family))


def prompts_of(settings: TrainSettings, cache: Cache | None = None) -> ValidationPrompts:
    """The encoded prompts; without a cache they must be given."""
    encoders = encoders_of(settings, Path(settings.pretrained_model_name_or_path), CPU)
    return validation_prompts(settings, cache, encoders)  # type: ignore[arg-type]


@functools.cache
def encoded(family: str) -> ValidationPrompts:
    """Those of `settings_for`, encoded once."""
    with tempfile.TemporaryDirectory() as folder:
        return prompts_of(settings_for(Path(folder), family))


def sampler_of(settings: TrainSettings, prompts: ValidationPrompts, **more: Any) -> Sampler:
    folder = Path(settings.pretrained_model_name_or_path)
    return Sampler(settings, folder, prompts, RunFolder(settings.output_dir), CPU, **more)


def student_of(settings: TrainSettings, changed: bool = True) -> FlowModel:
    """The run's student; what is trained depends on its name only, or is as it comes."""
    student = build_student(settings, Path(settings.pretrained_model_name_or_path))
    return scrambled(student) if changed else student  # type: ignore[return-value]


def drawn(settings: TrainSettings, step: int | None) -> tuple[dict, dict[tuple[str, int], np.ndarray]]:
    """`samples.json`, and (prompt, steps) -> the image."""
    folder = RunFolder(settings.output_dir).samples_at(step)
    told = json.loads((folder / "samples.json").read_text())
    images = {(i["prompt"], i["steps"]): np.asarray(Image.open(folder / i["file"])) for i in told["images"]}
    return told, images


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
