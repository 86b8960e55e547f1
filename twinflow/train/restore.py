"""`restore_run()`: the student and the teacher of a run, as one of its checkpoints left them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from twinflow.errors import ArgumentError, require
from twinflow.export import export
from twinflow.formats.generation_config import GenerationConfig
from twinflow.interface import trained_parameters
from twinflow.models import FlowModel
from twinflow.teachers.teachers import EMATeacher
from twinflow.train.checkpoint.checkpoint import (
    latest_checkpoint,
    named_checkpoint,
    read_checkpoint,
    read_files,
    read_summary,
)
from twinflow.train.checkpoint.run_state import check_part
from twinflow.train.checkpoint.state_checks import check_names, check_tensor, plain_state
from twinflow.train.config.option_types import absolute
from twinflow.train.config.resolve import read_config
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.config.settings import TrainSettings
from twinflow.train.model.pipeline_source import pipeline_folder
from twinflow.train.model.student import build_student, build_teacher


@dataclass(frozen=True)
class RestoredRun:
    """What a run trained.

    Args:
        folder: of the pipeline underneath.
        checkpoint: the folder that was read.
        step: optimizer steps taken.
        student: with the trained weights, on the CPU.
        teacher: the average of the weights; None: there is none, or it was not asked for.
        complaints: a line for each newer checkpoint that is damaged.
    """

    settings: TrainSettings
    folder: Path
    checkpoint: Path
    step: int
    student: FlowModel
    teacher: EMATeacher | None
    complaints: tuple[str, ...] = ()

    @property
    def usage(self) -> GenerationConfig:
        """How it is drawn with: as the run's own samples were."""
        settings = self.settings
        return GenerationConfig(
            model=absolute(settings.pretrained_model_name_or_path),
            steps=settings.validation_num_inference_steps,
            size=settings.validation_resolution,
            guidance=settings.validation_guidance,
        )

    def export(self, folder: str | Path, *, format: str = "diffusers", merge_base: bool = False) -> Path:
        """Saves the average, or the student where that is None; see `twinflow.export.export`."""
        return export(
            self.student, folder, teacher=self.teacher, format=format, merge_base=merge_base, usage=self.usage
        )


def restore_run(
    run: str | Path, *, checkpoint: str | Path = "latest", ema: bool | None = None, model: str | None = None
) -> RestoredRun:
    """Reads a run's folder; nothing in it is unpickled or executed.

    Args:
        run: the folder, `output_dir` of `twinflow train`.
        checkpoint: `latest`, the name of one in the folder, or a path.
        ema: whether the average is read; None: where there is one.
        model: the pipeline underneath, where it is not where the run had it.

    Returns:
        Its settings, student and teacher.

    Raises:
        ValueError: no run, no whole checkpoint, one of another run, no average where one is asked for, or no pipeline.
    """
    root = Path(run)
    settings = _settings(root, model)
    wanted = "False for a run without an average (use_ema is false)"
    require(settings.use_ema or not ema, "restore_run", "ema", wanted, root)
    complaints: list[str] = []
    place, tree = _checkpoint(root, checkpoint, complaints)
    check_names(tree, {"shared": 0, "ranks": 0}, "state")
    shared = plain_state(tree["shared"])
    check_names(shared, dict.fromkeys(("student", "teacher", "criterion", "optimizer", "scheduler")), "state")
    folder = pipeline_folder(settings.pretrained_model_name_or_path)
    student = build_student(settings, folder)
    _put(student, shared["student"])
    teacher = _teacher(settings, student, shared["teacher"]) if settings.use_ema and ema is not False else None
    return RestoredRun(settings, folder, place, read_summary(place)["step"], student, teacher, tuple(complaints))


def _settings(root: Path, model: str | None) -> TrainSettings:
    config = RunFolder(root).config
    got = f"{str(root)!r}, which does not exist"
    require(root.is_dir(), "restore_run", "run", "the folder of a run", got)
    got = f"{root} without {config.name}"
    require(config.is_file(), "restore_run", "run", "what `twinflow train` wrote", got)
    settings = read_config(config, {})
    return settings if model is None else replace(settings, pretrained_model_name_or_path=model)


def _checkpoint(root: Path, asked: str | Path, complaints: list[str]) -> tuple[Path, Any]:
    """The folder of a checkpoint and the tree in it."""
    if str(asked) != "latest":
        place = named_checkpoint(root, asked)
        if place is None:
            wanted = f"latest, one of {root} or a folder"
            raise ArgumentError("restore_run", "checkpoint", wanted, repr(str(asked)))
        return place, read_checkpoint(place)
    latest = latest_checkpoint(root, complaints)
    if latest is None:
        got = f"{'; '.join(complaints) or 'none'} in {root}"
        raise ArgumentError("restore_run", "run", "a whole checkpoint", got, verb="have")
    return latest, read_files(latest)  # whose bytes have just been compared


@torch.no_grad()
def _put(student: FlowModel, saved: Any) -> None:
    mine = trained_parameters(student)
    check_names(saved, mine, "student")
    for name, parameter in mine.items():
        check_tensor(saved[name], parameter.shape, parameter.dtype, f"student {name}")
    for name, parameter in mine.items():
        parameter.copy_(saved[name])


def _teacher(settings: TrainSettings, student: FlowModel, saved: Any) -> EMATeacher:
    teacher = build_teacher(settings, student)
    assert isinstance(teacher, EMATeacher)  # as `use_ema` is on
    check_part(saved, teacher, "teacher")
    teacher.load_state_dict(saved["state"])
    return teacher
