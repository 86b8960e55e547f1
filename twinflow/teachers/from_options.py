"""`teacher_from_options()`: the teacher that `twinflow_*` options ask for, or the reason why there is none."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twinflow.distributed import unwrap
from twinflow.interface import Student, Teacher, trained_parameters
from twinflow.objective.flags import parse_flags
from twinflow.teachers.teachers import EMATeacher, StudentTeacher


def teacher_from_options(
    student: Student,
    options: Mapping[str, Any],
    *,
    use_ema: bool,
    decay: float = 0.99,
    device: torch.device | str | None = None,
) -> Teacher:
    """An EMA of the student where one is kept, else the student itself where the options permit that.

    Without an EMA the student teaches itself only if `twinflow_require_ema` is off or `twinflow_allow_no_ema_teacher`
    is on; so it does with an EMA that cannot be kept, of a student that is no module.

    Args:
        student: the student, wrapped for DDP or compilation or not.
        options: what `TwinFlowConfig.from_flags` leaves, or the `twinflow_*` and `diff2flow_*` options themselves.
        use_ema: whether the training keeps an EMA.
        decay: the EMA's final decay, in (0, 1).
        device: where the average lives; see `EMATeacher`.

    Raises:
        TypeError: use_ema is not a bool.
        ValueError: an EMA is required but not kept, or the student has nothing to average.
    """
    if not isinstance(use_ema, bool):
        raise TypeError(f"teacher_from_options: use_ema must be True or False, got {use_ema!r}")
    _, options = parse_flags(options)
    itself_allowed = options["twinflow_allow_no_ema_teacher"] or not options["twinflow_require_ema"]
    module = unwrap(student)
    if use_ema and isinstance(module, nn.Module):
        if not trained_parameters(module):
            raise ValueError("EMA teacher unavailable because no trainable component was found.")
        return EMATeacher(student, decay, device=device)  # type: ignore[arg-type]  # what wraps a module is one
    if itself_allowed:
        return StudentTeacher(student)
    if use_ema:
        raise ValueError("EMA teacher weights are required but unavailable; enable use_ema or allow fallback.")
    raise ValueError(
        "TwinFlow requires an EMA teacher; enable use_ema or set twinflow_allow_no_ema_teacher to fall back to student "
        "weights explicitly."
    )
