"""`TimestepSchedule`: a sampler's evaluations, the timesteps that name them, and which one comes next."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch

from twinflow.errors import ArgumentError
from twinflow.sampling.grid import check_times, is_integer, is_stock_array, is_stock_list
from twinflow.sampling.sampler import Evaluation, SamplerConfig


class TimestepSchedule:
    """A sampler's evaluations in order.

    Args:
        evaluations: the network calls.
        timesteps: the number a pipeline knows each call by. They are rounded to float32; a repeated one is moved down
            until it is new, so that a number finds its evaluation (at timestep 600 a move is 6e-5).

    Attributes:
        step_index: index of the evaluation to come; None before the first.
        begin_index: index of the first evaluation, where one was set.
    """

    def __init__(self, evaluations: Sequence[Evaluation], timesteps: Sequence[float]) -> None:
        self.replace(evaluations, timesteps)
        self.step_index: int | None = None
        self.begin_index: int | None = None

    def replace(self, evaluations: Sequence[Evaluation], timesteps: Sequence[float]) -> None:
        """Puts others in place of the evaluations and their timesteps."""
        self.evaluations = list(evaluations)
        self.timesteps = _distinct(timesteps)

    def begin(self, where: str, index: int) -> None:
        """Sets the first evaluation; raises ArgumentError unless it is an index."""
        if not is_integer(index) or not 0 <= index < len(self.timesteps):
            wanted = f"an index into the {len(self.timesteps)} timesteps"
            raise ArgumentError(where, "begin_index", wanted, repr(index))
        self.begin_index = int(index)

    def find(self, where: str, timestep: Any) -> int:
        """The index of a timestep given by value: a float or a floating tensor of one element."""
        is_tensor = isinstance(timestep, torch.Tensor)
        if (timestep.numel() != 1 or not timestep.is_floating_point()) if is_tensor else isinstance(timestep, Integral):
            raise ArgumentError(where, "timestep", "one floating number of `timesteps`", repr(timestep))
        value = float(np.float32(float(timestep)))
        if value not in self.timesteps:
            raise ArgumentError(where, "timestep", f"one of {_brief(self.timesteps)}", float(timestep))
        return self.timesteps.index(value)

    def levels(self, where: str, timesteps: Any, rows: int) -> list[float]:
        """The shares of noise at one timestep, or at one per row, given by value."""
        numbers = timesteps.reshape(-1).cpu().unbind() if isinstance(timesteps, torch.Tensor) else (timesteps,)
        if len(numbers) not in (1, rows):
            raise ArgumentError(where, "timestep", f"1 or {rows} numbers", len(numbers), verb="hold")
        return [self.evaluations[self.find(where, timestep)].t for timestep in numbers]

    def due(self, where: str) -> int:
        """The index of the evaluation to come; raises ArgumentError after the last one."""
        index = next(i for i in (self.step_index, self.begin_index, 0) if i is not None)
        if index == len(self.timesteps):
            raise ArgumentError(where, "timesteps", "an evaluation left", f"a call after all {index}", verb="have")
        return index

    def position(self, where: str, timestep: Any) -> int:
        """The index of the evaluation that a step answers.

        An int counts within `timesteps`, as `enumerate` does, and must be the index to come. A number names the first
        evaluation; after that, and where a begin index is set, evaluations are counted here.
        """
        if isinstance(timestep, torch.Tensor) and not timestep.is_floating_point():
            raise ArgumentError(where, "timestep", "a floating number of `timesteps`", timestep.dtype)
        started = self.step_index is not None or self.begin_index is not None
        if not isinstance(timestep, Integral):
            return self.due(where) if started else self.find(where, timestep)
        if not is_integer(timestep) or not 0 <= timestep < len(self.timesteps):
            wanted = f"a number of `timesteps` or an index in [0, {len(self.timesteps)})"
            raise ArgumentError(where, "timestep", wanted, f"{type(timestep).__name__} {timestep}")
        if started and timestep != self.due(where):
            raise ArgumentError(where, "timestep", f"the index to come, {self.due(where)}", timestep)
        return int(timestep)


def is_unasked(config: Mapping[str, Any], sigmas: Any, mu: float | None) -> bool:
    """Whether sigmas are the grid that a pipeline sends where its caller named none (see `TwinFlowScheduler`)."""
    form = config["stock_sigmas"]
    if config["use_pipeline_sigmas"] or sigmas is None:
        return False
    listed = form == "list" or (form == "any" and mu is not None)
    return is_stock_array(sigmas) or (listed and is_stock_list(sigmas))


def times_of(where: str, config: Mapping[str, Any], sampler: SamplerConfig, sigmas: Any, timesteps: Any) -> list[float]:
    """The n + 1 times of a user's sigmas or timesteps (see `TwinFlowScheduler.set_timesteps`)."""
    if sigmas is not None and timesteps is not None:
        raise ArgumentError(where, "timesteps", "None where sigmas are given", "both")
    if sigmas is None:
        times = [float(t) / config["num_train_timesteps"] for t in timesteps]
        check_times(where, "timesteps", times)
        return [*times, 0.0]
    times = [float(s) for s in sigmas]
    check_times(where, "sigmas", times)
    return sampler.shifted([*times, 0.0])


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
