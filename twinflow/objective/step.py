"""`Step`: the tensors of one training step while its plan runs; one method per kind of network call."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from twinflow.distributed import unwrap, without_collectives
from twinflow.interface import Student, Teacher
from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.draws import Draws
from twinflow.objective.passes import NetworkCall, Plan
from twinflow.objective.plan import time_table
from twinflow.objective.query import run_call
from twinflow.objective.random_state import StepRandomState
from twinflow.objective.row_coefficients import RowCoefficients
from twinflow.objective.rows import Rows, RowSelector, concatenate
from twinflow_kernels import rollout_start, rollout_step_


@dataclass(frozen=True)
class Batch:
    """What the caller gave: latents (B, ...), conditions (any pytrees), and the step's draws."""

    latents: torch.Tensor
    cond: Any
    uncond: Any
    draws: Draws


class Step:
    """Runs network calls and keeps their results.

    Args:
        config: the objective's settings.
        student, teacher: the networks; teacher None where the plan asks none.
        batch: the caller's tensors.
        plan: the calls to come.
        table: numbers per row, on the host.
    """

    def __init__(
        self,
        config: TwinFlowConfig,
        student: Student,
        teacher: Teacher | None,
        batch: Batch,
        plan: Plan,
        table: RowCoefficients,
    ) -> None:
        self.config, self.student, self.teacher, self.batch, self.plan = config, student, teacher, batch, plan
        latents, draws = batch.latents, batch.draws
        self.dtype = torch.promote_types(torch.promote_types(latents.dtype, draws.z.dtype), torch.float32)
        self.select = RowSelector(plan.batch, latents.device)
        self.table = table.to(latents.device, self.dtype)
        self._times = time_table(plan, draws.t.dtype).to(latents.device, non_blocking=True)
        self._time_at = 0
        self.random = StepRandomState(latents.device)
        self._fake_row = {row: k for k, row in enumerate(draws.rows_of("adv"))}
        rectified = draws.rows_of("e2e") if draws.roles is not None else range(plan.batch)
        self._rectify_row = {row: k for k, row in enumerate(rectified)}
        self._samples: torch.Tensor | None = None
        self._queries: dict[str, torch.Tensor] = {}
        self._states: dict[tuple, torch.Tensor] = {}
        self.rollout_ends: dict[str, torch.Tensor] = {}
        self.predictions: dict[tuple[str, int], tuple[Rows, torch.Tensor]] = {}
        self.rectify_velocities: dict[str, torch.Tensor] = {}
        self.discarded: list[torch.Tensor] = []

    def run(self, call: NetworkCall) -> None:
        """Runs the next call of the plan."""
        width = len(call.rows)
        times = self._times[:, self._time_at : self._time_at + width]
        self._time_at += width
        if call.discarded:
            velocity = self._query(call, self.select.take(self._noise, call.rows), times)
            if call.gradient:
                self.discarded.append(velocity)
            return
        getattr(self, f"_{call.name}")(call, times)

    def rehearse(self, announce: Callable[[NetworkCall], None]) -> None:
        """Makes every call of the plan with latents in the place of what is not known yet, and drops the results.

        Args:
            announce: is told each call before it is made.
        """
        start = 0
        for call in self.plan.calls:
            times = self._times[:, start : start + len(call.rows)]
            start += len(call.rows)
            announce(call)
            x_t = self.select.take(self.batch.latents, call.rows)
            run_call(call, unwrap(self.student), self.teacher, x_t, times, self._condition(call))

    @property
    def _noise(self) -> torch.Tensor:
        return self.batch.draws.z.to(self.dtype)

    @cached_property
    def x(self) -> torch.Tensor:
        """Data x: the caller's latents, with one-step samples in the rows that have them (equations 5, 9)."""
        return self.batch.latents.to(self.dtype) if self._samples is None else self._samples

    @cached_property
    def v(self) -> torch.Tensor:
        """Velocity v = z - x of the path (equation 1)."""
        return self._noise - self.x

    @cached_property
    def x_t(self) -> torch.Tensor:
        """Path x_t = |t| z + (1 - |t|) x (equation 1)."""
        t = self._per_row(self.table.noise)
        return t * self._noise + (1 - t) * self.x

    @cached_property
    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Enhanced target v* and the rollout's first point x_m (equations 8 to 10)."""
        v_target, cond, uncond = self.v, self._queries.get("cond"), self._queries.get("uncond")
        if self.config.data_free and self.teacher is not None and self.teacher.frozen and uncond is not None:
            rows = tuple(sorted(self.plan.enhanced))
            v_target = v_target.clone()
            self.select.put(v_target, rows, uncond.index_select(0, self.select.index(rows)))
        return rollout_start(v_target, self.x_t, cond, uncond, self.table.ratio, self.table.delta)

    @cached_property
    def generated_start(self) -> torch.Tensor:
        """First point of the rollout from pure noise: x = z at t = 1, with the same v* (equation 28)."""
        delta = torch.full_like(self.table.delta, self.config.delta_t)
        return rollout_start(self.targets[0], self._noise, None, None, torch.zeros_like(delta), delta)[1]

    def _per_row(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, *[1] * (self.batch.latents.dim() - 1))

    def _query(self, call: NetworkCall, x_t: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """One network call: the random state of its micro-batch, its conditions, float32 times, a checked result."""
        cond, x_t = self._condition(call), x_t.to(self.batch.latents.dtype)
        network = self.student if call.gradient else without_collectives(self.student)
        with self.random.call(call.micro_batch, call.gradient):
            velocity = run_call(call, network, self.teacher, x_t, times, cond)
        if not isinstance(velocity, torch.Tensor) or velocity.shape != x_t.shape or not velocity.is_floating_point():
            got = f"{velocity.dtype} {tuple(velocity.shape)}" if isinstance(velocity, torch.Tensor) else type(velocity)
            raise ValueError(f"TwinFlowLoss: {call.who} must return a floating velocity {tuple(x_t.shape)}, got {got}")
        # Without gradient: a view of a parameter would start a graph.
        return velocity if call.gradient and torch.is_grad_enabled() else velocity.detach()

    def _condition(self, call: NetworkCall) -> Any:
        first = call.kinds.index("uncond") if "uncond" in call.kinds else len(call.rows)
        parts = []
        if first:
            parts.append(self.select.take_condition(self.batch.cond, call.rows[:first]))
        if first < len(call.rows):
            parts.append(self.select.take_condition(self.batch.uncond, call.rows[first:]))
        return concatenate(parts)

    def _sample(self, call: NetworkCall, times: torch.Tensor, z: torch.Tensor) -> None:
        """x <- z - F(z, 1, 0 | c) in rows of the data."""
        if self._samples is None:
            self._samples = self.batch.latents.to(self.dtype, copy=True)
        self.select.put(self._samples, call.rows, z - self._query(call, z, times))

    def _fake(self, call: NetworkCall, times: torch.Tensor) -> None:
        fake = self._rows_of(self.batch.draws.z_fake, tuple(self._fake_row[row] for row in call.rows))
        self._sample(call, times, fake)

    def _data(self, call: NetworkCall, times: torch.Tensor) -> None:
        self._sample(call, times, self._rows_of(self.batch.draws.z_data, call.rows))

    def _rows_of(self, noise: torch.Tensor | None, rows: Rows) -> torch.Tensor:
        assert noise is not None
        return noise.to(self.dtype).index_select(0, self.select.index(rows))

    def _cfg(self, call: NetworkCall, times: torch.Tensor) -> None:
        velocity = self._query(call, self.select.take(self.x_t, call.rows), times)
        self._scatter(self._queries, call, velocity)

    def _scatter(self, where: dict[str, torch.Tensor], call: NetworkCall, velocity: torch.Tensor) -> None:
        """Files the entries of a call by kind, in tensors of B rows of which only the queried ones are written."""
        for kind in dict.fromkeys(call.kinds):
            at = [i for i, k in enumerate(call.kinds) if k == kind]
            rows = tuple(call.rows[i] for i in at)
            if rows == tuple(range(self.plan.batch)):
                where[kind] = velocity.narrow(0, at[0], len(at))
                continue
            if kind not in where:
                where[kind] = velocity.new_empty((self.plan.batch, *velocity.shape[1:]))
            self.select.put(where[kind], rows, velocity.narrow(0, at[0], len(at)))

    def _rollout(self, call: NetworkCall, times: torch.Tensor) -> None:
        """One Euler segment of the teacher's walk from x_m (equations 11, 12)."""
        key = (call.micro_batch, call.rows, call.kinds)
        if call.segment == 0:
            starts = {"main": lambda: self.targets[1], "generated": lambda: self.generated_start}
            parts = []
            for kind in dict.fromkeys(call.kinds):
                rows = tuple(row for row, k in zip(call.rows, call.kinds, strict=True) if k == kind)
                parts.append(starts[kind]().index_select(0, self.select.index(rows)))
            self._states[key] = torch.cat(parts) if len(parts) > 1 else parts[0]
        state = self._states[key]
        rollout_step_(state, self._query(call, state, times), times[2].to(state.dtype))
        if call.segment + 1 == self.plan.order:
            self._scatter(self.rollout_ends, call, self._states.pop(key))

    def _student(self, call: NetworkCall, times: torch.Tensor) -> None:
        velocity = self._query(call, self.select.take(self.x_t, call.rows), times)
        self.predictions[call.name, call.micro_batch] = (call.rows, velocity)

    _velocity = _student

    def _generate(self, call: NetworkCall, times: torch.Tensor) -> None:
        """F(z, 1, 0 | c) with gradient (equation 26)."""
        velocity = self._query(call, self.select.take(self._noise, call.rows), times)
        self.predictions["generate", call.micro_batch] = (call.rows, velocity)

    def samples(self, micro_batch: int, rows: Rows) -> torch.Tensor:
        """One-step samples x_hat = x_t - |t| F of some rows of a micro-batch, detached (equation 2)."""
        all_terms = self.plan.recipe == "all_terms"
        run, velocity = self.predictions["generate" if all_terms else "student", micro_batch]
        at = self.select.index(tuple(run.index(row) for row in rows))
        velocity = velocity.detach().index_select(0, at).to(self.dtype)
        if all_terms:
            return self.select.take(self._noise, rows) - velocity
        t = self._per_row(self.select.take(self.table.noise, rows))
        return self.select.take(self.x_t, rows) - t * velocity

    def _fake_velocity(self, call: NetworkCall, times: torch.Tensor) -> None:
        """F(t z + (1 - t) x_f, -t, -t | c) with gradient (equation 26)."""
        t = self._per_row(self.select.take(self.table.noise, call.rows))
        fake = self.samples(call.micro_batch, call.rows)
        x_t = t * self.select.take(self._noise, call.rows) + (1 - t) * fake
        self.predictions["fake_velocity", call.micro_batch] = (call.rows, self._query(call, x_t, times))

    def _rectify(self, call: NetworkCall, times: torch.Tensor) -> None:
        """F(x', -t', -t') and F(x', t', t') at re-noised samples x' (equation 21)."""
        x_hat = self.samples(call.micro_batch, call.rows)
        again = self._rows_of(self.batch.draws.z_rectify, tuple(self._rectify_row[row] for row in call.rows))
        t = self._per_row(self.table.rectify_noise.index_select(0, self.select.index(call.rows)))
        self._scatter(self.rectify_velocities, call, self._query(call, t * again + (1 - t) * x_hat, times))

    def forget(self, micro_batch: int) -> None:
        """Drops the predictions of a micro-batch whose loss is taken."""
        self.predictions = {key: value for key, value in self.predictions.items() if key[1] != micro_batch}
        self.discarded.clear()
