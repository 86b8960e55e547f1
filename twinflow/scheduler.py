"""`TwinFlowScheduler`: the sampler of docs/method.md, section 6, for unmodified diffusers pipelines."""

import dataclasses
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

from twinflow.errors import ArgumentError
from twinflow.sampling.grid import check_steps, is_integer, is_number
from twinflow.sampling.sampler import (
    Evaluation,
    Generators,
    SamplerConfig,
    SamplerState,
    check_generators,
    own_generators,
    working_dtype,
)
from twinflow.sampling.timestep_schedule import TimestepSchedule, is_unasked, times_of

_NAME = "TwinFlowScheduler"
_CHOICES = {
    "prediction_type": ("flow_matching", "flow_prediction"), "time_condition": ("t", "midpoint"),
    "stock_sigmas": ("any", "array", "list"),
}  # fmt: skip
_ALIASES = {"gap_start": "rfba_gap_start", "gap_end": "rfba_gap_end", "stochasticity": "stochast_ratio"}
_FOREIGN_SHIFT = (
    "TwinFlowScheduler.from_config: the other scheduler's shift of {0} is not taken over, as few-step weights are "
    "trained without a shift. Pass shift={0} to have it."
)
_NOT_SET = "Please call `set_timesteps` before running inference."
_WRONG_LIST = "TwinFlowScheduler received a list of generators whose length does not match the batch size."


_thread = threading.local()  # its `used`: the schedulers that this thread walks, the latest last


def schedulers_in_use() -> "list[TwinFlowScheduler]":
    """The schedulers that this thread has set or stepped, the latest first."""
    held = [reference() for reference in getattr(_thread, "used", ())]
    return [scheduler for scheduler in reversed(held) if scheduler is not None]


@dataclass
class TwinFlowSchedulerOutput(BaseOutput):
    """What a step returns: the next state and the data predicted, both of the sample's shape."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class TwinFlowScheduler(SchedulerMixin, ConfigMixin):
    """Samples along our grid inside a diffusers pipeline; guidance belongs off.

    Args:
        num_train_timesteps: timestep of a share of noise of 1.
        prediction_type: `flow_matching` or its synonym `flow_prediction`: the model returns the noise-ward velocity.
        shift: factor of equation 34, of the grid and of `sigmas` given to `set_timesteps`.
        time_dist_ctrl, gap_start, gap_end, stochasticity, style, extrapolation, order: see
            `twinflow.sampling.sampler.SamplerConfig`; None takes the published value for the number of steps.
        seed: of the noise drawn where `step` gets no generator, together with the sample that the first step gets: each
            image of a batch has its own noise, and the same first sample gives the same image.
        use_pipeline_sigmas: use the linspace(1, 1/N, N) that stock pipelines send unasked, not our grid of N steps.
        stock_sigmas: how the pipeline sends it: as an `array` of numpy's, as a `list` of float32 numbers (Z-Image), or
            `any`, a list then only together with `mu`. Whatever else has these values was asked for and is used.
        time_condition: `t`, or `midpoint`: the model gets (sigma - r/2) num_train_timesteps (equation 31).
        rfba_gap_start, rfba_gap_end, stochast_ratio: other names of gap_start, gap_end and stochasticity.

    Raises:
        ArgumentError: a setting is out of its range, or its two names have different values.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]  # noqa: RUF012
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        prediction_type: str = "flow_matching",
        shift: float = 1.0,
        time_dist_ctrl: Sequence[float] | None = (1.0, 1.0, 1.0),
        gap_start: float | None = None,
        gap_end: float | None = None,
        stochasticity: float | str | None = None,
        style: str = "few",
        extrapolation: float = 0.0,
        order: int = 1,
        seed: int = 0,
        use_pipeline_sigmas: bool = False,
        stock_sigmas: str = "any",
        time_condition: str = "t",
        rfba_gap_start: float | None = None,
        rfba_gap_end: float | None = None,
        stochast_ratio: float | str | None = None,
    ) -> None:
        self._sampler = _sampler_config(self.config)
        # JSON knows lists and plain numbers only; a configuration equals itself read back.
        self.register_to_config(**{name: _plain(value) for name, value in self.config.items()})
        self.order = order
        self.num_inference_steps: int | None = None
        self._generator: Generators | None = None
        self._grid: list[float] | None = None  # the times set, where they are our own grid's
        # Until `set_timesteps`: the times of training, 1 to 1/N.
        times = self._sampler.shifted([i / num_train_timesteps for i in range(num_train_timesteps, 0, -1)])
        self.sigma_max, self.sigma_min = times[0], times[-1]
        self._set_evaluations([Evaluation(t, 0.0, t, 0.0, "whole") for t in times], None)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    @property
    def shift(self) -> float:
        """The shift that the next `set_timesteps` applies."""
        return self._sampler.shift

    @property
    def step_index(self) -> int | None:
        """Index into `timesteps` of the evaluation to come; None before the first step."""
        return self._schedule.step_index

    @property
    def begin_index(self) -> int | None:
        """Index into `timesteps` of the first evaluation, where a pipeline has set one."""
        return self._schedule.begin_index

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler of a saved configuration, or of another scheduler's, whose shift is not taken over.

        Training draws its times without a shift; `shift=` is how to have one all the same.
        """
        if isinstance(config, Mapping) and "shift" not in kwargs and _is_foreign(config, cls._get_init_keys(cls)):
            shift = config.get("shift", 1.0)
            if shift != 1.0:
                kwargs["shift"] = 1.0
                warnings.warn(_FOREIGN_SHIFT.format(shift), stacklevel=2)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @property
    def generator(self) -> Generators | None:
        """The noise of steps that get no generator, where one was set; None: each image has its own."""
        return self._generator

    def set_generator(self, generator: Generators | None) -> None:
        """Draws from this generator (or list) where `step` gets none; None: from each image's own again."""
        check_generators(f"{_NAME}.set_generator", generator)
        self._generator = generator

    def set_shift(self, shift: float) -> None:
        """Sets the shift that the next `set_timesteps` applies."""
        sampler = dataclasses.replace(self._sampler, shift=shift)
        sampler.check(f"{_NAME}.set_shift")
        self._sampler = sampler

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts at this index into `timesteps`: 0, or later for image-to-image.

        A later start on our own grid is where a stock flow scheduler starts, at 1 - step / N before the shift, and the
        steps that are left are laid from there: our grid itself ends at 0.3 or more, far too noisy for a low strength.
        `timesteps` and `sigmas` change in place, as pipelines hold slices of them.
        """
        self._schedule.begin(f"{_NAME}.set_begin_index", begin_index)
        done, between = divmod(int(begin_index), self.order)
        if self._grid is None or between or self.step_index is not None:
            return
        times, count = self._grid, len(self._grid) - 1
        if done:
            left = self._sampler.times(count - done)
            start = self._sampler.shifted([1 - done / count])[0]
            times = [start * time / left[0] for time in left]
        evaluations = self._sampler.evaluations(self._grid)[: begin_index if done else 0]
        evaluations += self._sampler.evaluations(times)
        self._schedule.replace(evaluations, self._asked(evaluations))
        self.timesteps.copy_(torch.tensor(self._schedule.timesteps))
        self.sigmas.copy_(torch.tensor([*(call.t for call in evaluations), 0.0]))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Sets the grid: `timesteps` (one per evaluation, distinct) and `sigmas` (one more, the last 0).

        Args:
            num_inference_steps: number of steps n: n evaluations, or 2 n - 1 of second order.
            device: device of `timesteps` and `sigmas`.
            sigmas: falling shares of noise, in (0, 1], before the shift; see `use_pipeline_sigmas`.
            mu: shifts nothing (it is a shift by resolution, without which training draws its times); says that a
                pipeline sends the sigmas, see `stock_sigmas`.
            timesteps: falling times, in (0, num_train_timesteps], after the shift.

        Raises:
            ArgumentError: a number is out of its range, or the arguments disagree.
        """
        where = f"{_NAME}.set_timesteps"
        steps = num_inference_steps
        unasked = is_unasked(self.config, sigmas, mu) and timesteps is None
        if unasked:
            steps, sigmas = len(sigmas) if steps is None else steps, None  # type: ignore[arg-type]
        if sigmas is not None or timesteps is not None:
            times = times_of(where, self.config, self._sampler, sigmas, timesteps)
            steps = len(times) - 1 if steps is None else steps
            if steps != len(times) - 1:
                raise ArgumentError(where, "num_inference_steps", f"{len(times) - 1} as the times given", steps)
        else:
            check_steps(where, "num_inference_steps", steps)
            times = self._sampler.times(steps)  # type: ignore[arg-type]
        self.num_inference_steps = int(steps)  # type: ignore[arg-type]
        self._grid = times if sigmas is None and timesteps is None else None
        self._set_evaluations(self._sampler.evaluations(times), device)
        self._use()

    def _use(self) -> None:
        _thread.used = [*(weakref.ref(s) for s in reversed(schedulers_in_use()) if s is not self), weakref.ref(self)]

    def _set_evaluations(self, evaluations: list[Evaluation], device: str | torch.device | None) -> None:
        self._schedule = TimestepSchedule(evaluations, self._asked(evaluations))
        self._state = SamplerState(self._sampler)
        self.timesteps = torch.tensor(self._schedule.timesteps, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor([*(call.t for call in evaluations), 0.0], dtype=torch.float32, device=device)
        self._own: list[torch.Generator] | None = None  # each image's, from its first step on

    def _asked(self, evaluations: list[Evaluation]) -> list[float]:
        """The timesteps that a model is told."""
        midpoint = self.config["time_condition"] == "midpoint"
        times = [call.t - call.r / 2 if midpoint else call.t for call in evaluations]
        return [t * self.config["num_train_timesteps"] for t in times]

    def times(self) -> tuple[float, float]:
        """The times (t, r) of the evaluation to come; raises ValueError before `set_timesteps` and at the end."""
        if self.num_inference_steps is None:
            raise ValueError(_NOT_SET)
        evaluation = self._schedule.evaluations[self._schedule.due(f"{_NAME}.times")]
        return evaluation.t, evaluation.r

    def asks_for(self, timestep: float, reversed: bool) -> float | None:
        """How far, relatively, a transformer's timestep is from the one of the evaluation to come.

        Args:
            timestep: as a pipeline tells it: ours, or over `num_train_timesteps`.
            reversed: the transformer's time runs from 0 at noise to 1 at data.

        Returns:
            The distance; None where no evaluation is to come.
        """
        done = self._schedule.step_index == len(self._schedule.timesteps)
        if self.num_inference_steps is None or done:
            return None
        value = self._schedule.timesteps[self._schedule.due(f"{_NAME}.asks_for")]
        share = value / self.config["num_train_timesteps"]
        units = (1 - share,) if reversed else (value, share)
        return min(abs(unit - timestep) / max(abs(unit), 1e-3) for unit in units)

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """The index of a number in `timesteps`; raises ValueError where it is none of them."""
        return self._schedule.find(f"{_NAME}.index_for_timestep", timestep)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is: flow matching scales nothing."""
        return sample

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Data noised to a time of the grid: sigma noise + (1 - sigma) sample.

        Args:
            sample: (B, ...) data.
            timestep: a number of `timesteps`, or a tensor of 1 or B of them.
            noise: (B, ...) normal noise.

        Returns:
            (B, ...), in the sample's dtype.

        Raises:
            ValueError: a timestep is none of `timesteps`, or shapes differ.
        """
        where = f"{_NAME}.scale_noise"
        if noise.shape != sample.shape:
            raise ArgumentError(where, "noise", f"of shape {tuple(sample.shape)}", tuple(noise.shape))
        levels = self._schedule.levels(where, timestep, sample.shape[0])
        dtype = working_dtype(sample, noise)
        sigma = torch.tensor(levels, dtype=dtype, device=sample.device).view(-1, *[1] * (sample.dim() - 1))
        return (sigma * noise.to(dtype) + (1 - sigma) * sample.to(dtype)).to(sample.dtype)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`scale_noise` under its older name."""
        return self.scale_noise(original_samples, timesteps, noise)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> TwinFlowSchedulerOutput | tuple[torch.Tensor, ...]:
        """Takes the model's answer to one evaluation, in float32 or wider.

        Args:
            model_output: (B, ...) noise-ward velocity at the sample and timestep.
            timestep: one of `timesteps`; or a Python int, an index into them.
            sample: (B, ...) state the model was asked at.
            generator: source of fresh noise, or a list of B; None: the one set, or each image's own (see `seed`).
            return_dict: False returns a tuple.

        Returns:
            The next state and the data predicted, in model_output's dtype.

        Raises:
            ValueError: before `set_timesteps` or after the last step; on an integer tensor, a timestep that is none, a
                list of another length than B; where shapes differ.
        """
        if self.num_inference_steps is None:
            raise ValueError(_NOT_SET)
        where = f"{_NAME}.step"
        if model_output.shape != sample.shape:
            raise ArgumentError(where, "model_output", f"of shape {tuple(sample.shape)}", tuple(model_output.shape))
        check_generators(where, generator)
        source = self._generator if generator is None else generator
        if isinstance(source, (list, tuple)) and len(source) != sample.shape[0]:
            raise ValueError(_WRONG_LIST)
        index = self._schedule.position(where, timestep)
        noisy = any(self._sampler.ratio(call.start, call.end) > 0 for call in self._schedule.evaluations[index:])
        if source is None and noisy:
            if self._own is None or len(self._own) != len(sample):
                self._own = own_generators(sample, self.config["seed"])
            source = self._own
        dtype = working_dtype(sample, model_output)
        evaluation = self._schedule.evaluations[index]
        following, predicted = self._state.advance(evaluation, sample.to(dtype), model_output.to(dtype), source)
        self._schedule.step_index = index + 1
        self._use()
        result = TwinFlowSchedulerOutput(following.to(model_output.dtype), predicted.to(model_output.dtype))
        return result if return_dict else result.to_tuple()


def _sampler_config(config: Mapping[str, Any]) -> SamplerConfig:
    """The sampler of a scheduler's configuration; raises ArgumentError naming the setting that is out of its range."""
    check_steps(_NAME, "num_train_timesteps", config["num_train_timesteps"])
    for name, choices in _CHOICES.items():
        if config[name] not in choices:
            raise ArgumentError(_NAME, name, f"one of {', '.join(choices)}", repr(config[name]))
    if not is_integer(config["seed"]) or not 0 <= config["seed"] < 2**63:
        raise ArgumentError(_NAME, "seed", "an integer in [0, 2^63)", repr(config["seed"]))
    if type(config["use_pipeline_sigmas"]) is not bool:
        raise ArgumentError(_NAME, "use_pipeline_sigmas", "True or False", repr(config["use_pipeline_sigmas"]))
    settings = {name: config[name] for name in ("style", "shift", "extrapolation", "order")}
    for name, alias in _ALIASES.items():
        settings[name] = _either(name, config[name], alias, config[alias])
    warp = config["time_dist_ctrl"]
    sampler = SamplerConfig(time_dist_ctrl=(1.0, 1.0, 1.0) if warp is None else warp, **settings)
    sampler.check(_NAME)
    return sampler


def _is_foreign(config: Mapping[str, Any], settings: Any) -> bool:
    """Whether a configuration is another scheduler's, and did not pass through one from ours."""
    ours = settings - {"num_train_timesteps", "prediction_type", "shift"}
    others = any(name not in settings and not name.startswith("_") for name in config)
    return not ours & config.keys() and (others or config.get("_class_name", _NAME) != _NAME)


def _either(name: str, value: Any, alias: str, other: Any) -> Any:
    """The value of a setting that has two names."""
    if value is not None and other is not None and value != other:
        raise ArgumentError(_NAME, alias, f"None or the value of {name}, {value!r}", repr(other))
    return other if value is None else value


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back: lists for tuples, Python floats for other numbers."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or not is_number(value):
        return value
    return int(value) if is_integer(value) else float(value)
