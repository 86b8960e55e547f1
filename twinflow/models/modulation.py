"""`Modulation`: the layers that turn a time embedding into shifts, scales and gates (AdaLN); `Deferral`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from twinflow.objective.plan import NetworkCall, Plan


@dataclass(frozen=True)
class Modulation:
    """The layers that read a transformer's time embedding, which nothing else reads.

    Args:
        source: path of the module that returns the embedding, (B, D).
        containers: top-level modules that hold the layers, in order of execution.
        layers: how the layers' names end: linear, from D to a multiple of the blocks' width.
    """

    source: str
    containers: tuple[str, ...]
    layers: tuple[str, ...]

    def of(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """Name -> layer, in order of execution: linear layers, or what an adapter has put around them."""
        found: dict[str, nn.Module] = {}
        for container in self.containers:
            for name, layer in transformer.get_submodule(container).named_modules(prefix=container):
                ends = any(f".{name}".endswith(f".{suffix}") for suffix in self.layers)
                if ends and isinstance(getattr(layer, "weight", None), torch.Tensor):
                    found[name] = layer
        return found


class Deferral(Protocol):
    """What a model asks of `twinflow.memory.defer_modulation`, which computes its modulation in advance."""

    def begin_step(self, plan: Plan) -> None:
        """A step begins."""

    def rehearsal(self, by_micro_batch: bool) -> AbstractContextManager[Callable[[NetworkCall], None]]:
        """Collects the step's time embeddings, as `FlowModel.rehearsal`."""

    def call(self, velocity: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Calls the transformer, or rehearses that."""

    def end_step(self) -> None:
        """The step is over, or has failed."""
