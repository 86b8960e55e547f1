"""`EmbeddedGuidanceCheck`: a warning where a pipeline embeds another guidance scale than was trained."""

import warnings
import weakref
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from twinflow.models.base import FlowModel
from twinflow.scheduler import TwinFlowScheduler

_OTHER_SCALE = (
    "twinflow.attach: guidance_scale={0} is an input of this transformer, and few-step weights are trained at {1}, "
    "unless the condition named another scale then. Pass guidance_scale={1}. This is said once a scale."
)


class EmbeddedGuidanceCheck:
    """Looks at the scale of each call of a pipeline with a `TwinFlowScheduler`, and warns once of each other one.

    Args:
        pipe: the pipeline.
        model: around its transformer; nothing is looked at where that embeds no scale.
    """

    def __init__(self, pipe: DiffusionPipeline, model: FlowModel) -> None:
        self._pipe = weakref.ref(pipe)
        self._scale = model.guidance
        self._said: set[float] = set()
        if model.guidance is not None and model.config.get("guidance_embeds", False):
            model.network.register_forward_pre_hook(self._before)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        pipe: Any = self._pipe()
        scale = getattr(pipe, "guidance_scale", None)  # a property of the pipeline, absent before its first call
        if scale is None or scale == self._scale or scale in self._said:
            return
        if isinstance(pipe.scheduler, TwinFlowScheduler):
            self._said.add(scale)
            warnings.warn(_OTHER_SCALE.format(scale, self._scale), stacklevel=2)
