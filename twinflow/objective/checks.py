"""Checks of what a caller hands to TwinFlowLoss."""

from dataclasses import dataclass
from typing import Any

import torch

from twinflow.interface import Student, Teacher
from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.draws import Draws
from twinflow.objective.rows import check_condition


@dataclass(frozen=True)
class Given:
    """A caller's arguments of a step."""

    student: Student
    latents: torch.Tensor
    cond: Any
    uncond: Any
    teacher: Teacher | None
    generator: torch.Generator | None
    draws: Draws | None
    step_rows: int | None


def check_latents(latents: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless latents are (B, ...) floating, B >= 1."""
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise TypeError(f"TwinFlowLoss: latents must be a floating tensor, got {kind}")
    if latents.dim() < 2 or latents.numel() == 0:
        raise ValueError(f"TwinFlowLoss: latents must be (B, ...) with B >= 1, got shape {tuple(latents.shape)}")


def check_micro_batch(where: str, micro_batch: object) -> None:
    """Raises ValueError unless it is an integer >= 1."""
    if isinstance(micro_batch, bool) or not isinstance(micro_batch, int) or micro_batch < 1:
        raise ValueError(f"{where}: micro_batch must be an integer >= 1, got {micro_batch!r}")


def check_teacher(where: str, teacher: object) -> None:
    """Raises TypeError unless it is a Teacher or None."""
    if teacher is not None and not isinstance(teacher, Teacher):
        raise TypeError(f"{where}: teacher must be a Teacher, got {type(teacher).__name__}")


def check_arguments(config: TwinFlowConfig, given: Given) -> None:
    """Raises TypeError or ValueError unless the arguments of a step fit together."""
    student, latents, teacher, step_rows = given.student, given.latents, given.teacher, given.step_rows
    if not callable(student):
        raise TypeError(f"TwinFlowLoss: student must be callable, got {type(student).__name__}")
    check_latents(latents)
    check_condition("TwinFlowLoss", "cond", given.cond, latents)
    check_condition("TwinFlowLoss", "uncond", given.uncond, latents, broadcast=True)
    if config.enhanced_ratio > 0 and given.uncond is None:
        raise ValueError(
            "TwinFlowLoss: uncond must be given where enhanced_ratio > 0, got None; "
            "pass the unconditional condition, or set enhanced_ratio=0"
        )
    if teacher is None and (config.enhanced_ratio > 0 or config.estimate_order > 0):
        raise ValueError("TwinFlowLoss: teacher must be given for guidance and rollouts, got None")
    check_teacher("TwinFlowLoss", teacher)
    if teacher is not None:
        teacher.check(student)
    if step_rows is not None and (isinstance(step_rows, bool) or not isinstance(step_rows, int)):
        raise TypeError(f"TwinFlowLoss: step_rows must be an integer, got {type(step_rows).__name__}")
    if step_rows is not None and step_rows < latents.shape[0]:
        raise ValueError(f"TwinFlowLoss: step_rows must be >= the batch of {latents.shape[0]}, got {step_rows}")
