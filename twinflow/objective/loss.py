"""`TwinFlowLoss`: plans a training step, runs the plan, and gives the loss."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from twinflow.distributed import calls_in_lockstep, data_parallel, unwrap, world
from twinflow.errors import ArgumentTypeError
from twinflow.interface import Student, Teacher
from twinflow.objective.checks import check_inputs, check_latents, check_micro_batch, check_step_rows, check_teacher
from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.draws import Draws, check_draws, check_roles_and_times, draw_step
from twinflow.objective.plan import TARGET_CALLS, NetworkCall, Plan, PlanOptions, make_plan
from twinflow.objective.roles import RoleCounter
from twinflow.objective.row_coefficients import RowCoefficients, row_coefficients
from twinflow.objective.rows import broadcast_condition, same_leaf_shapes
from twinflow.objective.step import Step, StepInputs
from twinflow.objective.terms import MicroBatchLoss


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
    """The TwinFlow objective, drop-in for any training loop.

    Where things are: docs/method.md holds the equations, terms.py one method per term of the loss, plan.py the order of
    the network calls, draws.py all randomness, `twinflow_kernels` the arithmetic on latents.

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
            raise ArgumentTypeError("TwinFlowLoss", "config", "a TwinFlowConfig", type(config).__name__)
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
        return self._step(
            StepInputs(student, teacher, latents, cond, uncond, draws), generator, step_rows=step_rows,
            schedule=schedule, update_teacher=update_teacher,
        )  # fmt: skip

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
        return self._step(
            StepInputs(student, teacher, latents, cond, uncond, draws), generator, step_rows=step_rows,
            micro_batch=micro_batch, update_teacher=update_teacher, backward=backward,
        )  # fmt: skip

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
        options = self._options(None, teacher, has_uncond, has_uncond, schedule, micro_batch)
        return make_plan(self.config, draws, options)

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

    def _options(
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
            pad_calls=calls_in_lockstep(student),
        )

    def _step(
        self,
        inputs: StepInputs,
        generator: torch.Generator | None,
        *,
        step_rows: int | None,
        update_teacher: bool,
        schedule: str = "planned",
        micro_batch: int | None = None,
        backward: Callable[[torch.Tensor], Any] | None = None,
    ) -> TwinFlowOutput:
        """Checks everything, draws, plans, runs; before the run only the generator has moved."""
        config, draws, dealt = self.config, inputs.draws, 0
        check_inputs(config, inputs)
        batch = inputs.latents.shape[0]
        check_step_rows(step_rows, batch)
        uncond = broadcast_condition(inputs.uncond, batch)
        merge = uncond is not None and same_leaf_shapes(inputs.cond, uncond)
        options = self._options(inputs.student, inputs.teacher, uncond is not None, merge, schedule, micro_batch)
        if draws is None:
            roles, counts = self._next_roles(batch)
            draws = draw_step(config, inputs.latents, roles, generator, self._roles.rows)
            dealt = batch * world()[1]
        else:
            check_draws(draws, config, inputs.latents)
            roles = draws.roles or ()
            counts = {role: float(roles.count(role)) for role in dict.fromkeys(roles)}
        student, teacher, latents = inputs.student, inputs.teacher, inputs.latents.detach()
        inputs = StepInputs(student, teacher, latents, inputs.cond, uncond, draws)
        plan = make_plan(config, draws, options)
        dtype = torch.promote_types(torch.promote_types(latents.dtype, draws.z.dtype), torch.float32)
        numbers = row_coefficients(config, draws, plan, counts, step_rows)
        coefficients = RowCoefficients(numbers, latents.device, dtype)
        if update_teacher and teacher is not None:
            teacher.update()
        loss, terms = _run_step(Step(config, inputs, plan, coefficients), backward)
        if dealt:
            self._roles.take(dealt)
        return TwinFlowOutput(loss, terms, draws)


def _run_step(
    step: Step, backward: Callable[[torch.Tensor], Any] | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Runs a plan: calls in order, the loss of each micro-batch after its last call.

    Args:
        step: the step; its teacher has moved.
        backward: differentiates the loss of each micro-batch as it comes; None keeps the graph.

    Returns:
        The loss and its terms; the loss is detached where `backward` is given.
    """
    due = _losses_due(step.plan)
    losses: dict[int, torch.Tensor] = {}
    terms: dict[str, torch.Tensor] = {}
    with _student_step(step, backward is not None), _Synchronisation(step, backward) as synchronisation:
        try:
            for i, call in enumerate(step.plan.calls):
                synchronisation.before(call)
                step.run(call)
                for micro_batch in due.get(i, ()):
                    parts = MicroBatchLoss(step, micro_batch)
                    loss = parts.total()
                    step.forget(micro_batch)
                    losses[micro_batch] = _taken(parts, loss, terms, backward)
        finally:
            step.random.finish()
    if not losses:
        return _zero(step.inputs.latents, backward is None), terms
    if len(losses) == 1:
        return next(iter(losses.values())), terms
    return torch.stack([losses[micro_batch] for micro_batch in sorted(losses)]).sum(), terms


def _taken(
    parts: MicroBatchLoss,
    loss: torch.Tensor,
    terms: dict[str, torch.Tensor],
    backward: Callable[[torch.Tensor], Any] | None,
) -> torch.Tensor:
    """The loss of a micro-batch, whose parts are added to `terms`; differentiated where `backward` is given."""
    for name, value in parts.terms.items():
        terms[name] = terms[name] + value if name in terms else value
    if backward is None:
        return loss
    if loss.requires_grad:
        backward(loss)
    return loss.detach()


def _losses_due(plan: Plan) -> dict[int, list[int]]:
    """Number of a call -> the micro-batches whose loss follows it: their last call, once every target is complete."""
    complete = max((i for i, call in enumerate(plan.calls) if call.name in TARGET_CALLS), default=0)
    last = {call.micro_batch: i for i, call in enumerate(plan.calls)}
    due: dict[int, list[int]] = {}
    for micro_batch in sorted({call.micro_batch for call in plan.calls if call.gradient}):
        due.setdefault(max(last[micro_batch], complete), []).append(micro_batch)
    return due


class _Synchronisation:
    """Under DDP, `backward` by micro-batches synchronises gradients on the last micro-batch only."""

    def __init__(self, step: Step, backward: Callable[[torch.Tensor], Any] | None) -> None:
        self._last = len(step.plan.micro_batches) - 1
        self._pause: AbstractContextManager | None = None
        wrapper = data_parallel(step.inputs.student)
        if wrapper is not None and backward is not None and self._last > 0:
            self._pause = wrapper.no_sync()

    def before(self, call: NetworkCall) -> None:
        if self._pause is not None and call.gradient and call.micro_batch == self._last:
            self.__exit__()

    def __enter__(self) -> "_Synchronisation":
        if self._pause is not None:
            self._pause.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._pause is not None:
            pause, self._pause = self._pause, None
            pause.__exit__(None, None, None)


@contextmanager
def _student_step(step: Step, by_micro_batch: bool) -> Iterator[None]:
    """Tells a student that wants to know its calls in advance, and rehearses them where it asks for that."""
    module = unwrap(step.inputs.student)
    begin, rehearsal, end = (getattr(module, name, None) for name in ("begin_step", "rehearsal", "end_step"))
    try:
        if begin is not None:
            begin(step.plan)
        rehearsed = None if rehearsal is None else rehearsal(by_micro_batch)
        if rehearsed is not None:
            with rehearsed as announce:
                step.rehearse(announce)
        yield
    finally:
        if end is not None:
            end()


def _zero(latents: torch.Tensor, differentiable: bool) -> torch.Tensor:
    dtype = torch.promote_types(latents.dtype, torch.float32)
    return torch.zeros((), dtype=dtype, device=latents.device, requires_grad=differentiable)
