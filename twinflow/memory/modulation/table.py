"""`ModulationTable`: all modulation vectors of some time embeddings, and their gradients, in a pass over the weights.

The vectors of one embedding's rows lie in a carrier, (B, units, D): each layer's output is some of its units.
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from twinflow.memory.modulation.streamed_weights import StreamedWeights

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Slot:
    """Where a layer's output stands in a carrier: its first unit, and how many."""

    first: int
    count: int


class ModulationTable:
    """The layers of a transformer that read its time embedding.

    Args:
        layers: linear, in order of execution.
        activations: what the embedding passes through before each.
        weights: of the layers.

    Attributes:
        unit: width of a unit, which divides every layer's.
        slots: of each layer.
        units: of a carrier; a forecast adds those of blocks that its smaller model lacks.
    """

    def __init__(
        self, layers: Sequence[nn.Linear], activations: Sequence[Activation], weights: StreamedWeights
    ) -> None:
        self._activations, self._weights = list(activations), weights
        widths = [layer.out_features for layer in layers]
        self.unit = math.gcd(*widths)
        counts = [width // self.unit for width in widths]
        self.slots = [Slot(sum(counts[:i]), count) for i, count in enumerate(counts)]
        self.units = sum(counts)

    @torch.no_grad()
    def carriers(self, embeddings: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The vectors of some embeddings (B, D): each (B, units, unit), by the same products as in the layers.

        A product for each embedding, as the layers would make, and not one for all: the same bits; the transfer of the
        weights takes longer.
        """
        found: list[torch.Tensor] = []
        for number, weight, bias in self._weights.sweep() if embeddings else ():
            for i, embedding in enumerate(embeddings):
                vectors = F.linear(self._activations[number](embedding), weight, bias)
                if i == len(found):  # only now is its dtype known, which autocast decides
                    found.append(vectors.new_empty(len(vectors), self.units, self.unit))
                self._slice(found[i], number).copy_(vectors)
        return found

    def gradients(
        self, embeddings: Sequence[torch.Tensor], carriers: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Gradients of embeddings from those of their carriers, added layer by layer as autograd would: the last first.

        Args:
            embeddings: (B, D).
            carriers: gradient of each one's carrier; None: it was not used.

        Returns:
            (B, D) each; None where the carrier's is.
        """
        found: list[torch.Tensor | None] = [None] * len(embeddings)
        if all(carrier is None for carrier in carriers):
            return found
        for number, weight, bias in self._weights.sweep(reverse=True):
            for i, (embedding, carrier) in enumerate(zip(embeddings, carriers, strict=True)):
                if carrier is not None:
                    more = self._gradient(embedding, self._slice(carrier, number).contiguous(), number, weight, bias)
                    found[i] = more if found[i] is None else found[i] + more  # type: ignore[operator]
        return found

    def _gradient(
        self, embedding: torch.Tensor, gradient: torch.Tensor, number: int, weight: torch.Tensor, bias: Any
    ) -> torch.Tensor:
        """Through one layer, by autograd itself: activation, autocast and rounding are the layer's own."""
        with torch.enable_grad():
            leaf = embedding.detach().requires_grad_()
            vectors = F.linear(self._activations[number](leaf), weight, bias)
        return torch.autograd.grad(vectors, leaf, gradient)[0]

    def _slice(self, carrier: torch.Tensor, number: int) -> torch.Tensor:
        slot = self.slots[number]
        return carrier.narrow(1, slot.first, slot.count).flatten(1)


def autocast_as_now(device: torch.device) -> Callable[[], Any]:
    """Makes contexts, to be entered in backward, with a device's autocast as it is now, off included.

    They are without its cache of weights.
    """
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return functools.partial(torch.autocast, kind, dtype=dtype, enabled=enabled, cache_enabled=False)
