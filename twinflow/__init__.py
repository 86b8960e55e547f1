"""Trains a flow-matching image model into a one-to-four-step generator with TwinFlow."""

from twinflow.config import TwinFlowConfig
from twinflow.draws import Draws
from twinflow.loss import TwinFlowLoss, TwinFlowOutput
from twinflow.passes import Plan
from twinflow.teacher import EMATeacher, FrozenTeacher, StudentTeacher

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
