"""Checks of what a caller hands to TwinFlowLoss."""

from typing import Any

import torch

from twinflow.config import TwinFlowConfig
from twinflow.interface import Student, Teacher
from twinflow.rows import check_condition


def check_latents(latents: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless latents are (B, ...) floating, B >= 1."""
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise TypeError(f"TwinFlowLoss: latents must be a floating tensor, got {kind}")
    if latents.dim() < 2 or latents.numel() == 0:
        raise ValueError(f"TwinFlowLoss: latents must be (B, ...) with B >= 1, got shape {tuple(latents.shape)}")


def check_arguments(
    config: TwinFlowConfig,
    student: Student,
    latents: torch.Tensor,
    cond: Any,
    uncond: Any,
    teacher: Teacher | None,
    step_rows: int | None,
) -> None:
    """Raises TypeError or ValueError unless the arguments of a step fit together."""
    if not callable(student):
        raise TypeError(f"TwinFlowLoss: student must be callable, got {type(student).__name__}")
    check_latents(latents)
    check_condition("TwinFlowLoss", "cond", cond, latents)
    check_condition("TwinFlowLoss", "uncond", uncond, latents, broadcast=True)
    if config.enhanced_ratio > 0 and uncond is None:
        raise ValueError(
            "TwinFlowLoss: uncond must be given where enhanced_ratio > 0, got None; "
            "pass the unconditional condition, or set enhanced_ratio=0"
        )
    if teacher is None and (config.enhanced_ratio > 0 or config.estimate_order > 0):
        raise ValueError("TwinFlowLoss: teacher must be given for guidance and rollouts, got None")
    if teacher is not None:
        if not isinstance(teacher, Teacher):
            raise TypeError(f"TwinFlowLoss: teacher must be a Teacher, got {type(teacher).__name__}")
        teacher.check(student)
    if step_rows is not None and (isinstance(step_rows, bool) or not isinstance(step_rows, int)):
        raise TypeError(f"TwinFlowLoss: step_rows must be an integer, got {type(step_rows).__name__}")
    if step_rows is not None and step_rows < latents.shape[0]:
        raise ValueError(f"TwinFlowLoss: step_rows must be >= the batch of {latents.shape[0]}, got {step_rows}")
