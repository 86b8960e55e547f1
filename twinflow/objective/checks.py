"""Checks of what a caller hands to TwinFlowLoss."""

import torch

from twinflow.errors import ArgumentError, ArgumentTypeError
from twinflow.interface import Teacher
from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.rows import check_condition
from twinflow.objective.step import StepInputs
from twinflow.sampling.grid import is_integer

WHERE = "TwinFlowLoss"


def check_latents(latents: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless latents are (B, ...) floating, B >= 1."""
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ArgumentTypeError(WHERE, "latents", "a floating tensor", kind)
    if latents.dim() < 2 or latents.numel() == 0:
        raise ArgumentError(WHERE, "latents", "(B, ...) with B >= 1", f"shape {tuple(latents.shape)}")


def check_micro_batch(where: str, micro_batch: object) -> None:
    """Raises ValueError unless it is an integer >= 1."""
    if not is_integer(micro_batch) or micro_batch < 1:
        raise ArgumentError(where, "micro_batch", "an integer >= 1", repr(micro_batch))


def check_teacher(where: str, teacher: object) -> None:
    """Raises TypeError unless it is a Teacher or None."""
    if teacher is not None and not isinstance(teacher, Teacher):
        raise ArgumentTypeError(where, "teacher", "a Teacher", type(teacher).__name__)


def check_step_rows(step_rows: object, batch: int) -> None:
    """Raises TypeError or ValueError unless it is None or an integer >= the batch."""
    if step_rows is None:
        return
    if not is_integer(step_rows):
        raise ArgumentTypeError(WHERE, "step_rows", "an integer", type(step_rows).__name__)
    if step_rows < batch:
        raise ArgumentError(WHERE, "step_rows", f">= the batch of {batch}", step_rows)


def check_inputs(config: TwinFlowConfig, inputs: StepInputs) -> None:
    """Raises TypeError or ValueError unless the inputs of a step fit together; the draws are not looked at."""
    student, latents, teacher = inputs.student, inputs.latents, inputs.teacher
    if not callable(student):
        raise ArgumentTypeError(WHERE, "student", "callable", type(student).__name__)
    check_latents(latents)
    check_condition(WHERE, "cond", inputs.cond, latents)
    check_condition(WHERE, "uncond", inputs.uncond, latents, broadcast=True)
    if config.enhanced_ratio > 0 and inputs.uncond is None:
        hint = "pass the unconditional condition, or set enhanced_ratio=0"
        raise ArgumentError(WHERE, "uncond", "given where enhanced_ratio > 0", None, hint)
    if teacher is None and (config.enhanced_ratio > 0 or config.estimate_order > 0):
        raise ArgumentError(WHERE, "teacher", "given for guidance and rollouts", None)
    check_teacher(WHERE, teacher)
    if teacher is not None:
        teacher.check(student)
