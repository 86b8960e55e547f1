"""`SchedulerTimeHooks`: the hooks by which a pipeline's transformer hears its scheduler's exact times."""

import inspect
import warnings
import weakref
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from twinflow.conditioning import BoundCall, hook_owner, remove_hooks
from twinflow.errors import ArgumentError
from twinflow.models.base import FlowModel
from twinflow.scheduler import TwinFlowScheduler, schedulers_in_use

_EXACT, _CLOSE = 1e-5, 2**-7  # of a timestep in float32, and in bfloat16
_GUIDED = (
    "twinflow.attach: guidance must be off, got {0} > 1: training has put guidance into the weights, and more of it "
    "oversaturates at twice the cost. Pass {0}={1}. This is said once."
)


class AdapterStrength:
    """How strongly an adapter acts now, relative to when it was made: by one of its layers, as peft computes it.

    Args:
        network: the transformer.
        path: of the layer.
        adapter: its name.
    """

    def __init__(self, network: nn.Module, path: str, adapter: str) -> None:
        parent, _, self._child = path.rpartition(".")
        self._parent, self.adapter = network.get_submodule(parent), adapter
        layer: Any = network.get_submodule(path)
        self._layer = layer
        self._nominal: float = layer.scaling[adapter]
        self._sample = self._weights()

    @property
    def present(self) -> bool:
        """Whether the adapter is in the transformer, or fused into its weights."""
        held = self._parent._modules[self._child] is self._layer
        return self.fused or (held and self.adapter in self._layer.scaling)

    @property
    def fused(self) -> bool:
        """Whether its product stands in the weights."""
        return self.adapter in self._layer.merged_adapters

    @property
    def swapped(self) -> bool:
        """Whether other weights have taken the adapter's name; waits for a GPU."""
        if self.adapter not in self._layer.scaling:
            return False
        now, sample = self._weights(), self._sample
        return now is not None and sample is not None and not torch.allclose(now, sample, rtol=0.1, atol=1e-6)

    def _weights(self) -> torch.Tensor | None:
        """Some of its weights, a float32 copy on the CPU; None where they are offloaded."""
        weight = self._layer.lora_A[self.adapter].weight
        return None if weight.is_meta else weight.detach().flatten()[:64].to("cpu", torch.float32, copy=True)

    def __call__(self) -> float:
        """1 as attached, 0 where the adapter is off, by whichever of diffusers' and peft's switches."""
        layer, adapter = self._layer, self.adapter
        acts = self.present and not layer._disable_adapters and (self.fused or adapter in layer.active_adapters)
        return float(layer.scaling.get(adapter, self._nominal) / self._nominal) if acts else 0.0


class SchedulerTimeHooks:
    """Hooks around the calls of a transformer: they bind the call's timestep, by which the conditioning finds the
    times, and warn once where the pipeline guides.

    The scheduler is the one that this thread used last among those whose evaluation to come has the call's timestep:
    several pipelines, each with a scheduler of its own, may call one transformer.

    Args:
        pipe: the pipeline.
        model: around the pipeline's transformer; without conditioning it is told no times.
        strength: of the LoRA that was attached; None: a whole model.
    """

    def __init__(self, pipe: DiffusionPipeline, model: FlowModel, strength: AdapterStrength | None) -> None:
        self._pipe = weakref.ref(pipe)  # the transformer must not keep text encoders and autoencoder in memory
        self.conditioning = model.conditioning
        self.strength = strength
        self.before: dict[str, Any] = {}  # what `detach` puts back
        parameters = [*inspect.signature(type(model.network).forward).parameters][1:]
        self._timestep = "timestep" if "timestep" in parameters else "t"
        self._position = parameters.index(self._timestep)
        self._no_guidance = _GUIDED.format(model.guidance_argument, model.guidance_off)
        self._bound: Any = None
        self._call: tuple[torch.Tensor, int | None] | None = None
        self._warned = False

    @staticmethod
    def of(transformer: nn.Module) -> "SchedulerTimeHooks | None":
        """The binding that a transformer has."""
        return hook_owner(transformer, SchedulerTimeHooks)

    def register(self, transformer: nn.Module) -> None:
        """Puts the hooks around a transformer."""
        transformer.register_forward_pre_hook(self._before, with_kwargs=True)
        if self.conditioning is not None:
            transformer.register_forward_hook(self._after, always_call=True)
            self.conditioning.serve(self._find_times, self.strength)

    def remove(self, transformer: nn.Module) -> None:
        """Takes the hooks and the conditioning off a transformer."""
        remove_hooks(transformer, self)
        if self.conditioning is not None:
            self.conditioning.remove(transformer)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._check_weights()
            if not self._warned and self._guided():
                self._warned = True
                warnings.warn(self._no_guidance, stacklevel=2)
        if self.conditioning is None:
            return
        timestep = kwargs[self._timestep] if self._timestep in kwargs else args[self._position]
        self.conditioning.begin(BoundCall(timestep=timestep))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Also after an exception."""
        assert self.conditioning is not None
        self.conditioning.end((None, None))

    def _find_times(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.conditioning is not None
        t, r = _scheduled_times(timestep, self.conditioning.embedder.reversed)
        return t, r

    def _check_weights(self) -> None:
        """Raises ArgumentError where a run begins with other weights under the adapter's name: a hot swap."""
        begins = getattr(getattr(self._pipe(), "scheduler", None), "step_index", 0) is None
        if begins and self.conditioning is not None and self.strength is not None and self.strength.swapped:
            which, wanted = f"adapter {self.strength.adapter!r}", "the weights that were attached"
            hint = "call twinflow.detach(pipe) before another is loaded"
            raise ArgumentError("twinflow.attach", which, wanted, "others under its name", hint, "have")

    def _guided(self) -> bool:
        """Whether the call is of a guided step: of twice the rows, or the second one within the step."""
        pipe: Any = self._pipe()
        scheduler = getattr(pipe, "scheduler", None)
        if not isinstance(scheduler, TwinFlowScheduler):
            return False
        before, self._call = self._call, (scheduler.timesteps, scheduler.step_index)
        again = before is not None and before[0] is self._call[0] and before[1] == self._call[1]
        return again or bool(getattr(pipe, "do_classifier_free_guidance", False))


# It reads the timestep on the host: no CUDA graph may hold it (the tag came with torch 2.9).
_TAGS = [tag for name, tag in torch.Tag.__members__.items() if name == "cudagraph_unsafe"]


@torch.library.custom_op("twinflow::scheduled_times", mutates_args=(), tags=_TAGS)
def _scheduled_times(timestep: torch.Tensor, reversed: bool) -> torch.Tensor:
    """The times (t, r) of the call with this timestep, (2, B), float32; opaque to `torch.compile`.

    Args:
        timestep: (B,), as the pipeline tells it.
        reversed: see `TwinFlowScheduler.asks_for`.
    """
    value = float(timestep.flatten()[0])
    known = [(s, s.asks_for(value, reversed)) for s in schedulers_in_use()]
    for nearness in (_EXACT, _CLOSE):
        for scheduler, distance in known:
            if distance is not None and distance <= nearness:
                times = torch.tensor(scheduler.times(), dtype=torch.float32)
                return times[:, None].repeat(1, timestep.numel()).to(timestep.device)
    wanted, got = "a TwinFlowScheduler", f"none that asks for the timestep {value:g} in this thread"
    raise ArgumentError("twinflow.attach", "pipe.scheduler", wanted, got, "twinflow.detach(pipe) gives the base back")


@_scheduled_times.register_fake
def _(timestep: torch.Tensor, reversed: bool) -> torch.Tensor:
    return timestep.new_empty((2, timestep.numel()), dtype=torch.float32)
