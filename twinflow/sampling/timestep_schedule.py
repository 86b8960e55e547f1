"""`TimestepSchedule`: the evaluations of a walk, the timesteps that name them, and how far the walk has come."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch

from twinflow.sampling.grid import check_times, is_stock_grid
from twinflow.sampling.sampler import Evaluation, SamplerConfig


class TimestepSchedule:
    """The evaluations of a walk in order.

    Args:
        queries: the network calls.
        timesteps: the number a pipeline knows each call by. They are rounded to float32; a repeated one is moved down
            until it is new, so that a number finds its evaluation (at timestep 600 a move is 6e-5).

    Attributes:
        step_index: index of the evaluation to come; None before the first.
        begin_index: index of the first evaluation, where one was set.
    """

    def __init__(self, queries: Sequence[Evaluation], timesteps: Sequence[float]) -> None:
        self.queries = list(queries)
        self.timesteps = _distinct(timesteps)
        self.step_index: int | None = None
        self.begin_index: int | None = None

    def begin(self, where: str, index: int) -> None:
        """Sets where the walk begins; raises ValueError unless it is an index."""
        if type(index) is not int or not 0 <= index < len(self.timesteps):
            raise ValueError(
                f"{where}: begin_index must be an index into the {len(self.timesteps)} timesteps, got {index!r}"
            )
        self.begin_index = index

    def find(self, where: str, timestep: Any) -> int:
        """The index of a timestep given by value: a float or a floating tensor of one element."""
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1 or not timestep.is_floating_point():
                raise ValueError(f"{where}: timestep must be one floating number of `timesteps`, got {timestep}")
        elif isinstance(timestep, Integral):
            raise ValueError(f"{where}: timestep must be one floating number of `timesteps`, got {timestep!r}")
        value = float(np.float32(float(timestep)))
        if value not in self.timesteps:
            raise ValueError(f"{where}: timestep must be one of {_brief(self.timesteps)}, got {float(timestep)}")
        return self.timesteps.index(value)

    def levels(self, where: str, timesteps: Any, rows: int) -> list[float]:
        """The shares of noise at one timestep, or at one per row, given by value."""
        given = timesteps.reshape(-1).cpu().unbind() if isinstance(timesteps, torch.Tensor) else (timesteps,)
        if len(given) not in (1, rows):
            raise ValueError(f"{where}: timestep must hold 1 or {rows} numbers, got {len(given)}")
        return [self.queries[self.find(where, timestep)].t for timestep in given]

    def due(self, where: str) -> int:
        """The index of the evaluation to come; raises ValueError at the walk's end."""
        index = next(i for i in (self.step_index, self.begin_index, 0) if i is not None)
        if index == len(self.timesteps):
            raise ValueError(f"{where}: the walk must have an evaluation left, got a call after all {index}")
        return index

    def position(self, where: str, timestep: Any) -> int:
        """The index of the evaluation that a step answers.

        An int counts within `timesteps`, as `enumerate` does, and must agree with a walk under way. A number names the
        evaluation the walk begins at; after that, and where a begin index is set, the walk counts for itself.
        """
        if isinstance(timestep, torch.Tensor) and not timestep.is_floating_point():
            raise ValueError(f"{where}: timestep must be a floating number of `timesteps`, got {timestep.dtype}")
        started = self.step_index is not None or self.begin_index is not None
        if not isinstance(timestep, Integral):
            return self.due(where) if started else self.find(where, timestep)
        if type(timestep) is not int or not 0 <= timestep < len(self.timesteps):
            raise ValueError(
                f"{where}: timestep must be a number of `timesteps` or an index in [0, {len(self.timesteps)}), "
                f"got {type(timestep).__name__} {timestep}"
            )
        if started and timestep != self.due(where):
            raise ValueError(f"{where}: timestep must be the walk's index {self.due(where)}, got {timestep}")
        return timestep


def given_times(where: str, config: Mapping[str, Any], walk: SamplerConfig, sigmas: Any, timesteps: Any) -> list[float]:
    """The n + 1 times of a walk over the sigmas or the timesteps given (see `TwinFlowScheduler.set_timesteps`)."""
    if sigmas is not None and timesteps is not None:
        raise ValueError(f"{where}: timesteps must be None where sigmas are given, got both")
    if sigmas is None:
        times = [float(t) / config["num_train_timesteps"] for t in timesteps]
        check_times(where, "timesteps", times)
        return [*times, 0.0]
    times = [float(s) for s in sigmas]
    check_times(where, "sigmas", times)
    if not config["use_pipeline_sigmas"] and is_stock_grid(times):
        return walk.times(len(times))
    return walk.shifted([*times, 0.0])


def _distinct(values: Sequence[float]) -> list[float]:
    seen: dict[float, None] = {}
    for value in values:
        rounded = np.float32(value)
        while float(rounded) in seen:
            rounded = np.nextafter(rounded, np.float32(-np.inf))
        seen[float(rounded)] = None
    return list(seen)


def _brief(values: list[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:8])
    return f"{shown}, ... ({len(values)} timesteps)" if len(values) > 8 else shown
