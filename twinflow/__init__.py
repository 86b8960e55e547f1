"""Trains a flow-matching image model into a one-to-four-step generator with TwinFlow."""

from typing import TYPE_CHECKING, Any

from twinflow.config import TwinFlowConfig
from twinflow.draws import Draws
from twinflow.loss import TwinFlowLoss, TwinFlowOutput
from twinflow.passes import Plan
from twinflow.teacher import EMATeacher, FrozenTeacher, StudentTeacher

if TYPE_CHECKING:
    from twinflow.pipeline import attach as attach

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


def __getattr__(name: str) -> Any:
    if name == "attach":  # needs diffusers and peft, which training a module of one's own does not
        from twinflow.pipeline import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
