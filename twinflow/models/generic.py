"""Any callable as a student."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from twinflow.conditioning import TimeEmbedder
from twinflow.errors import ArgumentError
from twinflow.models.base import FlowModel


class GenericModel(FlowModel):
    """F(x_t, t, r, cond) around any network(x, time, cond) -> velocity.

    A network that takes (x_t, t, r, cond) itself is a student as it is and needs no adapter.

    Args:
        transformer: a module or another callable.
        time_scale: factor from our time in [0, 1] to the network's.
        reversed_time: the network's time is 0 at noise.
        data_ward: the network predicts the velocity towards the data.
        embedder: where a module's time goes in; needed for `conditioning`.
        conditioning, cfg_time: as for `FlowModel`.
    """

    family = "generic"
    lora_targets = ()

    def __init__(
        self,
        transformer: Callable[..., torch.Tensor],
        *,
        time_scale: float = 1.0,
        reversed_time: bool = False,
        data_ward: bool = False,
        embedder: TimeEmbedder | None = None,
        conditioning: str | None = None,
        cfg_time: str = "published",
    ) -> None:
        self._embedder, self._scale, self._reversed, self._data_ward = embedder, time_scale, reversed_time, data_ward
        super().__init__(transformer, conditioning=conditioning, cfg_time=cfg_time)  # type: ignore[arg-type]

    def time_embedder(self) -> TimeEmbedder:
        if self._embedder is None or not isinstance(self.transformer, nn.Module):
            raise ArgumentError("load", "embedder", "where a generic module's time goes in", None, verb="say")
        return self._embedder

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any) -> torch.Tensor:
        return self._call(x_t, t, r, cond, [])

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, cond: Any, lengths: list[int]) -> torch.Tensor:
        time = (1 - t if self._reversed else t) * self._scale
        velocity = self.transformer(x_t, time, cond)
        return -velocity if self._data_ward else velocity
