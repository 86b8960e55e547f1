"""`build_student()`, `build_teacher()`: what a run trains and what teaches it, as its settings describe them."""

import json
from pathlib import Path
from typing import Any

import torch

from twinflow.bridge import require_bridge
from twinflow.errors import ArgumentError, require
from twinflow.interface import Student, Teacher
from twinflow.lora import add_lora
from twinflow.models import FlowModel, load
from twinflow.models.registry import REGISTRATIONS, diffusers_families
from twinflow.teachers.teachers import EMATeacher, teacher_from_options
from twinflow.train.config.resolve import no_bridge
from twinflow.train.config.settings import TrainSettings

COMPONENTS = ("transformer", "unet")  # folders of a pipeline that may hold what is trained


def build_student(settings: TrainSettings, folder: Path, *, weights: bool = True) -> FlowModel:
    """The student on the CPU: a LoRA on a frozen base, or all weights trainable, with its conditioning.

    A LoRA's base is in bfloat16 unless `mixed_precision` is `no`; whole weights are float32, autocast or not. Seeds
    torch's global stream, so that new weights are the same in every process.

    Args:
        folder: of `pipeline_folder`.
        weights: False: tensors on the meta device, for forecasts and plans.

    Raises:
        ValueError: no model of a known family there, or another family or mode than the settings say.
    """
    config, family = model_of(settings, folder)
    lora = settings.model_type == "lora"
    options: dict[str, Any] = _bridge(settings, folder) if REGISTRATIONS[family].diffusion else {}
    options["conditioning"] = None if lora else settings.conditioning
    torch.manual_seed(settings.seed)
    if weights:
        dtype = torch.bfloat16 if lora and settings.mixed_precision == "bf16" else torch.float32
        student = load(folder, torch_dtype=dtype, **options)
    else:
        import diffusers

        with torch.device("meta"):
            student = load(getattr(diffusers, config["_class_name"]).from_config(config), **options)
    if not lora:
        return student.requires_grad_(True)
    alpha = int(settings.lora_alpha) if settings.lora_alpha == int(settings.lora_alpha) else settings.lora_alpha
    how: dict[str, Any] = {"alpha": alpha, "targets": settings.lora_layers or None}  # peft takes fractions too
    how |= {"base_lora": settings.base_lora, "conditioning": settings.conditioning}
    try:
        return add_lora(student, settings.lora_rank, **how)
    except ArgumentError as error:
        raise (error.renamed("train", "lora_layers") if error.argument == "targets" else error) from None


def model_of(settings: TrainSettings, folder: Path) -> tuple[dict[str, Any], str]:
    """The configuration of what a pipeline's folder has to train, and its family; nothing is loaded.

    Raises:
        ValueError: no model of a known family there, or another family than the settings say.
    """
    config = _config(folder)
    family = _family(config)
    wanted = f"{family} for the {config['_class_name']} in {folder}"
    require(settings.model_family in (None, family), "train", "model_family", wanted, repr(settings.model_family))
    if REGISTRATIONS[family].diffusion and settings.twinflow is not None:
        require_bridge(settings.prediction_type or "epsilon", settings.twinflow_options)
    elif REGISTRATIONS[family].diffusion and not settings.twinflow_options["diff2flow_enabled"]:
        raise no_bridge()
    return config, family


def build_teacher(settings: TrainSettings, student: Student) -> Teacher | None:
    """The average of the student's weights, or the student itself; None: plain flow matching without an average."""
    device = "cpu" if settings.ema_device == "cpu" and settings.model_type == "full" else None
    if settings.twinflow is None:
        return EMATeacher(student, settings.ema_decay, device=device) if settings.use_ema else None  # type: ignore[arg-type]
    how: dict[str, Any] = {"use_ema": settings.use_ema, "decay": settings.ema_decay, "device": device}
    return teacher_from_options(student, settings.twinflow_options, **how)


def _config(folder: Path) -> dict[str, Any]:
    """The configuration of what is trained."""
    for component in COMPONENTS:
        path = folder / component / "config.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise _wrong_pipeline("JSON", f"{path}: {error}") from None
            if isinstance(found, dict):
                return found
    raise _wrong_pipeline(f"a pipeline with {' or '.join(COMPONENTS)}", folder)


def _wrong_pipeline(wanted: str, got: object) -> ArgumentError:
    return ArgumentError("train", "pretrained_model_name_or_path", wanted, got, verb="hold")


def _family(config: dict[str, Any]) -> str:
    classes, name = diffusers_families(), config.get("_class_name")
    if str(name) not in classes:
        raise _wrong_pipeline(f"one of {', '.join(classes)}", repr(name))
    return classes[str(name)].family


def _bridge(settings: TrainSettings, folder: Path) -> dict[str, Any]:
    """What a UNet needs to be read as a flow; without TwinFlow one switch stands for both."""
    import diffusers

    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("scheduler", [None, None])[1]
    scheduler = getattr(diffusers, str(name)).from_pretrained(folder / "scheduler")
    flags = settings.twinflow_options
    enabled = flags["diff2flow_enabled"]
    options: dict[str, Any] = {
        "diff2flow_enabled": enabled,
        "twinflow_allow_diff2flow": enabled if settings.twinflow is None else flags["twinflow_allow_diff2flow"],
    }
    if settings.prediction_type is None:
        return options | {"scheduler": scheduler}
    return options | {"alphas_cumprod": scheduler.alphas_cumprod, "prediction_type": settings.prediction_type}
