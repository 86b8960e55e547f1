"""`SchedulerTimeHooks`: the hooks by which a pipeline's transformer hears its scheduler's exact times."""

import inspect
import warnings
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from twinflow.conditioning import hook_owner
from twinflow.errors import ArgumentError
from twinflow.models.base import FlowModel
from twinflow.scheduler import TwinFlowScheduler

_GUIDED = (
    "twinflow.attach: guidance must be off, got {0} > 1: training has put guidance into the weights, and more of it "
    "oversaturates at twice the cost. Pass {0}={1}. This is said once."
)


class SchedulerTimeHooks:
    """Hooks around the calls of a transformer: they bind the times of the scheduler's next evaluation, and warn once
    where the pipeline guides.

    Args:
        pipe: the pipeline; its scheduler is asked anew in every call.
        model: around the pipeline's transformer; without conditioning it is told no times.
    """

    def __init__(self, pipe: DiffusionPipeline, model: FlowModel) -> None:
        self._pipe = weakref.ref(pipe)  # the transformer must not keep text encoders and autoencoder in memory
        self._scheduler: Any = getattr(pipe, "scheduler", None)
        self._conditioning = model.conditioning
        self._no_guidance = _GUIDED.format(model.guidance_argument, model.guidance_off)
        self._bound: AbstractContextManager[None] | None = None
        self._call: tuple[torch.Tensor, int | None] | None = None
        self._warned = False

    @staticmethod
    def of(transformer: nn.Module) -> "SchedulerTimeHooks | None":
        """The binding that a transformer has."""
        return hook_owner(transformer, SchedulerTimeHooks)

    def register(self, transformer: nn.Module) -> None:
        """Puts the hooks around a transformer."""
        transformer.register_forward_pre_hook(self._before, with_kwargs=True)
        transformer.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pipe = self._pipe()
        if pipe is not None:
            self._scheduler = getattr(pipe, "scheduler", None)
        if not isinstance(self._scheduler, TwinFlowScheduler):
            if self._conditioning is None:
                return
            name = type(self._scheduler).__name__
            raise ArgumentError("twinflow.attach", "pipe.scheduler", "a TwinFlowScheduler", name)
        if not self._warned and self._guided(pipe):
            self._warned = True
            warnings.warn(self._no_guidance, stacklevel=2)
        if self._conditioning is None:
            return
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        timestep = given["timestep"] if "timestep" in given else given["t"]
        times = self._scheduler.times()
        t, r = (torch.full(timestep.shape, time, dtype=torch.float32, device=timestep.device) for time in times)
        self._bound = self._conditioning.times(t, r)
        self._bound.__enter__()

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Also after an exception."""
        bound, self._bound = self._bound, None
        if bound is not None:
            bound.__exit__(None, None, None)

    def _guided(self, pipe: DiffusionPipeline | None) -> bool:
        """Whether the call is of a guided step: of twice the rows, or the second one within the step."""
        before, self._call = self._call, (self._scheduler.timesteps, self._scheduler.step_index)
        again = before is not None and before[0] is self._call[0] and before[1] == self._call[1]
        return again or bool(getattr(pipe, "do_classifier_free_guidance", False))
