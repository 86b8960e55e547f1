"""`TwinFlowLoss`: plans a training step, runs the plan, and gives the loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from twinflow.distributed import calls_in_lockstep, world
from twinflow.interface import Student, Teacher
from twinflow.objective.checks import Given, check_arguments, check_latents, check_micro_batch, check_teacher
from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.draws import Draws, check_draws, check_roles_and_times, draw_step
from twinflow.objective.passes import Plan, PlanOptions
from twinflow.objective.plan import make_plan
from twinflow.objective.roles import RoleCounter
from twinflow.objective.row_coefficients import row_coefficients
from twinflow.objective.rows import broadcast_condition, same_leaf_shapes
from twinflow.objective.runner import StepRun, run_step
from twinflow.objective.step import Batch


@dataclass(frozen=True)
class TwinFlowOutput:
    """What a step gives.

    Args:
        loss: the total, 0-dim, float32 or wider; differentiable, or detached where backward has run.
        terms: name of a term -> its weighted contribution, detached, on the device; they sum to the loss.
        draws: the random numbers used.
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    draws: Draws


class TwinFlowLoss:
    """The TwinFlow objective, drop-in for any training loop; docs/method.md holds the equations.

    A student is any callable F(x_t, t, r, cond) -> velocity: x_t (B, ...) in the latents' dtype; t, r (B,) float32,
    signed; the velocity (B, ...) in any floating dtype. It may have `begin_step(plan)` and `end_step()`.
    Under torch.distributed roles are dealt over all ranks of the default group: each must give as many rows.

    Args:
        config: the settings; None: the defaults.

    Raises:
        TypeError: config is not a TwinFlowConfig.

    Source: TwinFlow (arXiv 2512.05150).
    """

    def __init__(self, config: TwinFlowConfig | None = None) -> None:
        self.config = TwinFlowConfig() if config is None else config
        if not isinstance(self.config, TwinFlowConfig):
            raise TypeError(f"TwinFlowLoss: config must be a TwinFlowConfig, got {type(config).__name__}")
        partition = self.config.recipe == "partition"
        self._roles = RoleCounter(self.config.active_shares() if partition else {"all": 1.0})

    def __call__(
        self,
        student: Student,
        latents: torch.Tensor,
        cond: Any = None,
        uncond: Any = None,
        *,
        teacher: Teacher | None = None,
        generator: torch.Generator | None = None,
        draws: Draws | None = None,
        step_rows: int | None = None,
        update_teacher: bool = True,
        schedule: str = "planned",
    ) -> TwinFlowOutput:
        """Computes the loss of a batch, with a graph to the student.

        Args:
            student: F(x_t, t, r, cond) -> velocity.
            latents: data x, (B, ...), any floating dtype; never modified.
            cond: condition, any pytree of tensors (B, ...), or None.
            uncond: the unconditional condition, (B, ...) or (1, ...); needed where `enhanced_ratio` > 0.
            teacher: needed for guidance and rollouts; updated first of all.
            generator: source of the step's random numbers; None: torch's global streams.
            draws: given random numbers instead; the role counter then stays.
            step_rows: rows that this process contributes to the optimizer step of which this batch is a part; fixes
                the means' denominators. None: the batch is the whole step.
            update_teacher: False for the later parts of a step.
            schedule: `planned`, or `published` for the published code's calls.

        Returns:
            The loss, its terms and the draws.

        Raises:
            ValueError, TypeError: an argument is wrong; nothing has then been modified.
            FloatingPointError: a non-finite loss, with `check_finite`.
        """
        given = Given(student, latents, cond, uncond, teacher, generator, draws, step_rows)
        return self._step(given, schedule, None, update_teacher, None)

    def backward(
        self,
        student: Student,
        latents: torch.Tensor,
        cond: Any = None,
        uncond: Any = None,
        *,
        micro_batch: int = 1,
        backward: Callable[[torch.Tensor], Any] = torch.autograd.backward,
        teacher: Teacher | None = None,
        generator: torch.Generator | None = None,
        draws: Draws | None = None,
        step_rows: int | None = None,
        update_teacher: bool = True,
    ) -> TwinFlowOutput:
        """Computes the same loss one micro-batch after the other and adds its gradients to `.grad`: the least memory.

        Args:
            micro_batch: most rows of a network call and of a graph.
            backward: called with each micro-batch's loss, e.g. `accelerator.backward`. Under DDP gradients are
                synchronised on the last micro-batch only.
            student, latents, cond, uncond, teacher, generator, draws, step_rows, update_teacher: as for the call.

        Returns:
            The output; its loss is detached.

        Raises:
            As for the call.
        """
        check_micro_batch("backward", micro_batch)
        given = Given(student, latents, cond, uncond, teacher, generator, draws, step_rows)
        return self._step(given, "planned", micro_batch, update_teacher, backward)

    @torch.no_grad()
    def evaluate(
        self, student: Student, latents: torch.Tensor, cond: Any = None, uncond: Any = None, **more: Any
    ) -> TwinFlowOutput:
        """Computes the loss without gradient; moves neither teacher nor role counter. Arguments as for the call.

        As the counter stays, a CUDA generator gives every evaluation the same times; pass `draws` for others.
        """
        counter = self._roles.state_dict()
        out = self(student, latents, cond, uncond, **{**more, "update_teacher": False})
        self._roles.load_state_dict(counter)
        return out

    def draw(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> Draws:
        """Draws the random numbers of a step and moves the role counter past it.

        Args:
            latents: (B, ...), for shape, dtype and device.
            generator: the source; None: torch's global streams.
        """
        check_latents(latents)
        roles, _ = self._next_roles(latents.shape[0])
        draws = draw_step(self.config, latents, roles, generator, self._roles.rows)
        self._roles.take(latents.shape[0] * world()[1])
        return draws

    def plan(
        self,
        draws: Draws,
        *,
        teacher: Teacher | None = None,
        has_uncond: bool = True,
        schedule: str = "planned",
        micro_batch: int | None = None,
    ) -> Plan:
        """The network calls of a step with these draws; `print` it to see them.

        Args:
            draws: the step's random numbers.
            teacher: decides who answers its queries; None: a teacher of its own weights.
            has_uncond: whether an unconditional condition will be there.
            schedule: `planned` or `published`.
            micro_batch: as in `backward`; None: the whole batch at once.
        """
        check_roles_and_times(draws, self.config, "plan")
        check_teacher("plan", teacher)
        if micro_batch is not None:
            check_micro_batch("plan", micro_batch)
        request = self._request(None, teacher, has_uncond, has_uncond, schedule, micro_batch)
        return make_plan(self.config, draws, request)

    def state_dict(self) -> dict[str, Any]:
        """The role counter; a generator's state is the caller's to save."""
        return {"roles": self._roles.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved state; ValueError if it was saved with other roles."""
        self._roles.load_state_dict(state["roles"])

    def _next_roles(self, batch: int) -> tuple[tuple[str, ...] | None, dict[str, float]]:
        """This process's roles of the next step, and the rows per role that it answers for in the mean over ranks."""
        rank, ranks = world()
        roles = self._roles.peek(batch * ranks)
        counts = {role: roles.count(role) / ranks for role in dict.fromkeys(roles)}
        own = roles[rank * batch : (rank + 1) * batch]
        return (None if self.config.recipe == "all_terms" else own), counts

    def _request(
        self,
        student: Student | None,
        teacher: Teacher | None,
        has_uncond: bool,
        merge: bool,
        schedule: str,
        micro_batch: int | None,
    ) -> PlanOptions:
        return PlanOptions(
            cfg_by=teacher.cfg_by if teacher else "teacher",
            rollout_by=teacher.rollout_by if teacher else "teacher",
            has_uncond=has_uncond,
            merge=merge,
            schedule=schedule,
            micro_batch=1 if self.config.rng_align == "rows" else micro_batch,
            keep=calls_in_lockstep(student),
        )

    def _step(
        self,
        given: Given,
        schedule: str,
        micro_batch: int | None,
        update_teacher: bool,
        backward: Callable[[torch.Tensor], Any] | None,
    ) -> TwinFlowOutput:
        """Checks everything, draws, plans, runs; before the run only the generator has moved."""
        config, draws, dealt = self.config, given.draws, 0
        check_arguments(config, given)
        batch = given.latents.shape[0]
        uncond = broadcast_condition(given.uncond, batch)
        merge = uncond is not None and same_leaf_shapes(given.cond, uncond)
        request = self._request(given.student, given.teacher, uncond is not None, merge, schedule, micro_batch)
        if draws is None:
            roles, counts = self._next_roles(batch)
            draws = draw_step(config, given.latents, roles, given.generator, self._roles.rows)
            dealt = batch * world()[1]
        else:
            check_draws(draws, config, given.latents)
            counts = {role: float(draws.roles.count(role)) for role in draws.roles or ()}  # type: ignore[union-attr]
        plan = make_plan(config, draws, request)
        table = row_coefficients(config, draws, plan, counts, given.step_rows)
        tensors = Batch(given.latents.detach(), given.cond, uncond, draws)
        run = StepRun(given.student, given.teacher, tensors, plan, table)
        loss, terms = run_step(config, run, update_teacher, backward)
        self._roles.take(dealt)
        return TwinFlowOutput(loss, terms, draws)
