"""Trains a flow-matching image model into a one-to-four-step generator with TwinFlow."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinflow.objective.config import TwinFlowConfig
    from twinflow.objective.draws import Draws
    from twinflow.objective.loss import TwinFlowLoss, TwinFlowOutput
    from twinflow.objective.plan import Plan
    from twinflow.pipelines.attach import attach as attach
    from twinflow.pipelines.attach import detach as detach
    from twinflow.teachers.teachers import EMATeacher, FrozenTeacher, StudentTeacher

__all__ = [
    "Draws",
    "EMATeacher",
    "FrozenTeacher",
    "Plan",
    "StudentTeacher",
    "TwinFlowConfig",
    "TwinFlowLoss",
    "TwinFlowOutput",
]

# Imported when asked for: the command line answers `--help` without torch, training a module of one's own needs neither
# diffusers nor peft, which `attach` does.
_HOMES = {
    "Draws": "objective.draws",
    "EMATeacher": "teachers.teachers",
    "FrozenTeacher": "teachers.teachers",
    "Plan": "objective.plan",
    "StudentTeacher": "teachers.teachers",
    "TwinFlowConfig": "objective.config",
    "TwinFlowLoss": "objective.loss",
    "TwinFlowOutput": "objective.loss",
    "attach": "pipelines.attach",
    "detach": "pipelines.attach",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
