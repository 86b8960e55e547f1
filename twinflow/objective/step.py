"""`Step`: the tensors of one training step while its plan runs; one method per kind of network call."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from twinflow.distributed import unwrap, without_collectives
from twinflow.errors import ArgumentError
from twinflow.interface import Student, Teacher, guidance_times
from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.draws import Draws
from twinflow.objective.plan import NetworkCall, Plan
from twinflow.objective.random_state import StepRandomState
from twinflow.objective.row_coefficients import RowCoefficients
from twinflow.objective.rows import Rows, RowSelector, concatenate, positions
from twinflow_kernels import rollout_start, rollout_step_

Times = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # t, r and t - r of a call's entries


@dataclass(frozen=True)
class StepInputs:
    """What a step is computed from.

    Args:
        student, teacher: the networks; teacher None where the plan asks none.
        latents: (B, ...), detached.
        cond, uncond: any pytrees of tensors with B rows, or None.
        draws: the step's random numbers; None before they are drawn.
    """

    student: Student
    teacher: Teacher | None
    latents: torch.Tensor
    cond: Any
    uncond: Any
    draws: Draws | None


class Step:
    """Runs network calls and keeps their results.

    Args:
        config: the objective's settings.
        inputs: networks, tensors and draws.
        plan: the calls to come.
        coefficients: numbers per row, on the latents' device; their dtype is that of the step's arithmetic.
    """

    def __init__(self, config: TwinFlowConfig, inputs: StepInputs, plan: Plan, coefficients: RowCoefficients) -> None:
        self.config, self.inputs, self.plan = config, inputs, plan
        assert inputs.draws is not None
        latents, self.draws = inputs.latents, inputs.draws
        draws = self.draws
        self.dtype = coefficients.dtype
        self.select = RowSelector(plan.batch, latents.device)
        self.coefficients = coefficients
        self.random = StepRandomState(latents.device)
        self._student_without_gradient = without_collectives(inputs.student)
        self._noise = _cast(draws.z, self.dtype)
        self._times = self._times_by_call()
        self._next = 0
        self._samples: torch.Tensor | None = None
        self._queries: dict[str, torch.Tensor] = {}
        self._states: dict[tuple, torch.Tensor] = {}
        self.rollout_ends: dict[str, torch.Tensor] = {}
        self.predictions: dict[tuple[str, int], tuple[Rows, torch.Tensor]] = {}
        self.rectify_velocities: dict[str, torch.Tensor] = {}
        self.discarded: list[torch.Tensor] = []

    def _times_by_call(self) -> list[Times]:
        """t, r and t - r of each call in order, moved to the device at once."""
        times = torch.from_numpy(self.plan.times).to(self.draws.t.dtype)
        times = times.to(self.inputs.latents.device, non_blocking=True)
        sizes = [len(call.rows) for call in self.plan.calls]
        return [(t, r, step) for t, r, step in (part.unbind() for part in times.split_with_sizes(sizes, 1))]

    def run(self, call: NetworkCall) -> None:
        """Runs the next call of the plan."""
        times = self._times[self._next]
        self._next += 1
        if call.discarded:
            velocity = self._velocity_of(call, self.select.take(self._noise, call.rows), times)
            if call.gradient:
                self.discarded.append(velocity)
            return
        self._METHODS[call.name](self, call, times)

    def rehearse(self, announce: Callable[[NetworkCall], None]) -> None:
        """Makes every call of the plan with latents in the place of what is not known yet, and drops the results.

        Args:
            announce: is told each call before it is made.
        """
        student = unwrap(self.inputs.student)
        for call, times in zip(self.plan.calls, self._times, strict=True):
            announce(call)
            x_t = self.select.take(self.inputs.latents, call.rows)
            run_call(call, student, self.inputs.teacher, x_t, times, self._condition(call))

    @cached_property
    def x(self) -> torch.Tensor:
        """Data x: the caller's latents, with one-step samples in the rows that have them (equations 5, 9)."""
        return _cast(self.inputs.latents, self.dtype) if self._samples is None else self._samples

    @cached_property
    def v(self) -> torch.Tensor:
        """Velocity v = z - x of the path (equation 1)."""
        return self._noise - self.x

    @cached_property
    def x_t(self) -> torch.Tensor:
        """Path x_t = |t| z + (1 - |t|) x (equation 1)."""
        t = self._per_row(self.coefficients.noise)
        return t * self._noise + (1 - t) * self.x

    @cached_property
    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Enhanced target v* and the rollout's first point x_m (equations 8 to 10)."""
        v_target, cond, uncond = self.v, self._queries.get("cond"), self._queries.get("uncond")
        teacher = self.inputs.teacher
        if self.config.data_free and teacher is not None and teacher.frozen and uncond is not None:
            rows = tuple(sorted(self.plan.enhanced))
            v_target = v_target.clone()
            self.select.put(v_target, rows, uncond.index_select(0, self.select.index(rows)))
        coefficients = self.coefficients
        return rollout_start(v_target, self.x_t, cond, uncond, coefficients.ratio, coefficients.delta)

    @cached_property
    def generated_start(self) -> torch.Tensor:
        """First point of the rollout from pure noise: x = z at t = 1, with the same v* (equation 28)."""
        delta = torch.full_like(self.coefficients.delta, self.config.delta_t)
        return rollout_start(self.targets[0], self._noise, None, None, torch.zeros_like(delta), delta)[1]

    def samples(self, micro_batch: int, rows: Rows) -> torch.Tensor:
        """One-step samples x_hat = x_t - |t| F of some rows of a micro-batch, detached (equation 2)."""
        all_terms = self.plan.recipe == "all_terms"
        run, velocity = self.predictions["generate" if all_terms else "student", micro_batch]
        velocity = velocity.detach()
        if rows != run:
            velocity = velocity.index_select(0, self.select.index(positions(rows, run)))
        velocity = _cast(velocity, self.dtype)
        if all_terms:
            return self.select.take(self._noise, rows) - velocity
        t = self._per_row(self.select.take(self.coefficients.noise, rows))
        return self.select.take(self.x_t, rows) - t * velocity

    def forget(self, micro_batch: int) -> None:
        """Drops the predictions of a micro-batch whose loss is taken."""
        self.predictions = {key: value for key, value in self.predictions.items() if key[1] != micro_batch}
        self.discarded.clear()

    def _per_row(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, *[1] * (self.inputs.latents.dim() - 1))

    def _velocity_of(self, call: NetworkCall, x_t: torch.Tensor, times: Times) -> torch.Tensor:
        """One network call: the random state of its micro-batch, its conditions, a checked result."""
        inputs, cond = self.inputs, self._condition(call)
        x_t = _cast(x_t, inputs.latents.dtype)
        student = inputs.student if call.gradient else self._student_without_gradient
        self.random.before_call(call.micro_batch)
        velocity = run_call(call, student, inputs.teacher, x_t, times, cond)
        if call.gradient:
            self.random.after_student_call()
        if not isinstance(velocity, torch.Tensor) or velocity.shape != x_t.shape or not velocity.is_floating_point():
            got = f"{velocity.dtype} {tuple(velocity.shape)}" if isinstance(velocity, torch.Tensor) else type(velocity)
            wanted = f"a floating velocity {tuple(x_t.shape)}"
            raise ArgumentError("TwinFlowLoss", call.who, wanted, got, verb="return")
        # Without gradient: a view of a parameter would start a graph.
        return velocity if call.gradient and torch.is_grad_enabled() else velocity.detach()

    def _condition(self, call: NetworkCall) -> Any:
        """The condition of a call's entries."""
        kind, entries = call.parts[0]
        if len(call.parts) == 1:
            return self.select.take_condition(self.inputs.uncond if kind == "uncond" else self.inputs.cond, call.rows)
        if kind != "cond":  # two branches of the same condition
            return self.select.take_condition(self.inputs.cond, call.rows)
        cond = self.select.take_condition(self.inputs.cond, call.rows[:entries])
        return concatenate([cond, self.select.take_condition(self.inputs.uncond, call.rows[entries:])])

    def _sample(self, call: NetworkCall, times: Times, z: torch.Tensor) -> None:
        """x <- z - F(z, 1, 0 | c) in rows of the data."""
        if self._samples is None:
            self._samples = self.inputs.latents.to(self.dtype, copy=True)
        self.select.put(self._samples, call.rows, z - self._velocity_of(call, z, times))

    def _fake(self, call: NetworkCall, times: Times) -> None:
        self._sample(call, times, self._noise_rows(self.draws.z_fake, self.draws.rows_of("adv"), call.rows))

    def _data(self, call: NetworkCall, times: Times) -> None:
        self._sample(call, times, self._noise_rows(self.draws.z_data, self.select.all_rows, call.rows))

    def _noise_rows(self, noise: torch.Tensor | None, rows: Rows, chosen: Rows) -> torch.Tensor:
        """The chosen ones of the rows that a noise was drawn for."""
        assert noise is not None
        noise = _cast(noise, self.dtype)
        return noise if chosen == rows else noise.index_select(0, self.select.index(positions(chosen, rows)))

    def _cfg(self, call: NetworkCall, times: Times) -> None:
        velocity = self._velocity_of(call, self.select.take(self.x_t, call.rows), times)
        self._scatter(self._queries, call, velocity)

    def _scatter(self, where: dict[str, torch.Tensor], call: NetworkCall, velocity: torch.Tensor) -> None:
        """Keeps the entries of a call by kind, in tensors of B rows of which only the queried ones are written."""
        first = 0
        for kind, entries in call.parts:
            values = velocity if len(call.parts) == 1 else velocity.narrow(0, first, entries)
            rows = call.rows[first : first + entries]
            first += entries
            if entries == self.plan.batch:
                where[kind] = values
                continue
            if kind not in where:
                where[kind] = velocity.new_empty((self.plan.batch, *velocity.shape[1:]))
            self.select.put(where[kind], rows, values)

    def _rollout(self, call: NetworkCall, times: Times) -> None:
        """One Euler segment of the teacher's rollout from x_m (equations 11, 12)."""
        key = (call.micro_batch, call.rows, call.parts)
        if call.segment == 0:
            starts, first = [], 0
            for kind, entries in call.parts:
                start = self.targets[1] if kind == "main" else self.generated_start
                rows = call.rows[first : first + entries]
                starts.append(start.index_select(0, self.select.index(rows)))
                first += entries
            self._states[key] = torch.cat(starts) if len(starts) > 1 else starts[0]
        state = self._states[key]
        rollout_step_(state, self._velocity_of(call, state, times), _cast(times[2], state.dtype))
        if call.segment + 1 == self.plan.order:
            self._scatter(self.rollout_ends, call, self._states.pop(key))

    def _student(self, call: NetworkCall, times: Times) -> None:
        """F(x_t, t, r | c) with gradient, at the call's own times."""
        velocity = self._velocity_of(call, self.select.take(self.x_t, call.rows), times)
        self.predictions[call.name, call.micro_batch] = (call.rows, velocity)

    def _generate(self, call: NetworkCall, times: Times) -> None:
        """F(z, 1, 0 | c) with gradient (equation 26)."""
        velocity = self._velocity_of(call, self.select.take(self._noise, call.rows), times)
        self.predictions[call.name, call.micro_batch] = (call.rows, velocity)

    def _fake_velocity(self, call: NetworkCall, times: Times) -> None:
        """F(t z + (1 - t) x_f, -t, -t | c) with gradient (equation 26)."""
        t = self._per_row(self.select.take(self.coefficients.noise, call.rows))
        fake = self.samples(call.micro_batch, call.rows)
        x_t = t * self.select.take(self._noise, call.rows) + (1 - t) * fake
        self.predictions[call.name, call.micro_batch] = (call.rows, self._velocity_of(call, x_t, times))

    def _rectify(self, call: NetworkCall, times: Times) -> None:
        """F(x', -t', -t') and F(x', t', t') at re-noised samples x' (equation 21)."""
        rows = call.rows[: call.parts[0][1]]
        t = self._per_row(self.select.take(self.coefficients.rectify_noise, rows))
        drawn = self.select.all_rows if self.draws.roles is None else self.draws.rows_of("e2e")
        again = self._noise_rows(self.draws.z_rectify, drawn, rows)
        x_t = t * again + (1 - t) * self.samples(call.micro_batch, rows)
        x_t = torch.cat([x_t] * len(call.parts)) if len(call.parts) > 1 else x_t  # fake and real: the same samples
        self._scatter(self.rectify_velocities, call, self._velocity_of(call, x_t, times))

    # Name of a call -> what runs it.
    _METHODS: ClassVar[dict[str, Callable[["Step", NetworkCall, Times], None]]] = {
        "fake": _fake,
        "data": _data,
        "cfg": _cfg,
        "rollout": _rollout,
        "student": _student,
        "velocity": _student,
        "generate": _generate,
        "fake_velocity": _fake_velocity,
        "rectify": _rectify,
    }


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def run_call(
    call: NetworkCall, student: Student, teacher: Teacher | None, x_t: torch.Tensor, times: Times, cond: Any
) -> Any:
    """What a call's network answers.

    Args:
        call: the call; it says who is asked, and whether with gradient.
        student, teacher: the networks; the teacher is needed where it is asked.
        x_t: latents of the call's rows.
        times: t and r, (B,) each, first.
        cond: their condition.
    """
    t, r = times[0], times[1]
    if call.name == "cfg":
        t, r = guidance_times(student, t, r)
    if call.gradient and torch.is_grad_enabled():
        return student(x_t, t, r, cond)  # only the student is differentiated
    # Autocast would cache weights cast without a graph and hand them to the differentiated call.
    with torch.no_grad(), _NO_AUTOCAST_CACHE if torch.is_autocast_cache_enabled() else _NOTHING:
        if call.who == "student":
            return student(x_t, t, r, cond)
        assert teacher is not None
        return teacher.velocity(x_t, t, r, cond, query="cfg" if call.name == "cfg" else "rollout")


class _NoAutocastCache:
    """Autocast without its weight cache, where that was on."""

    def __enter__(self) -> None:
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_cache_enabled(True)


_NO_AUTOCAST_CACHE, _NOTHING = _NoAutocastCache(), nullcontext()
