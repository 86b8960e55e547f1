"""`TwinFlowLoss`: plans a training step, runs the plan, and gives the loss; one named method per term."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from twinflow.coefficients import RowTable, row_table
from twinflow.config import TwinFlowConfig
from twinflow.draws import Draws, check_draws, draw_step
from twinflow.piece import PieceLoss
from twinflow.plan import TARGET_CALLS, Pass, Plan, Request, make_plan
from twinflow.roles import RoleCounter
from twinflow.rows import broadcast_condition, check_condition, same_leaf_shapes
from twinflow.step import Batch, Step
from twinflow.teacher import Student, Teacher, unwrap


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

    Args:
        config: the settings; None: the defaults.

    Raises:
        TypeError: config is not a TwinFlowConfig.

    Source: TwinFlow (arXiv 2512.05150).
    """

    def __init__(self, config: TwinFlowConfig | None = None) -> None:
        self.config = config or TwinFlowConfig()
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
        run = self._prepare(student, latents, cond, uncond, teacher, generator, draws, step_rows, schedule, None)
        return self._run(run, update_teacher, None)

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
        """Computes the same loss piece by piece and adds its gradients to `.grad`: the least memory.

        Args:
            micro_batch: most rows of a network call and of a graph.
            backward: called with each piece's loss, e.g. `accelerator.backward`. Under DDP gradients are
                synchronised on the last piece only.
            student, latents, cond, uncond, teacher, generator, draws, step_rows, update_teacher: as for the call.

        Returns:
            The output; its loss is detached.

        Raises:
            As for the call.
        """
        if isinstance(micro_batch, bool) or not isinstance(micro_batch, int) or micro_batch < 1:
            raise ValueError(f"backward: micro_batch must be an integer >= 1, got {micro_batch!r}")
        run = self._prepare(
            student, latents, cond, uncond, teacher, generator, draws, step_rows, "planned", micro_batch
        )  # fmt: skip
        return self._run(run, update_teacher, backward)

    @torch.no_grad()
    def evaluate(self, student: Student, latents: torch.Tensor, cond: Any = None, uncond: Any = None, **more: Any) -> TwinFlowOutput:  # fmt: skip
        """Computes the loss without gradient; moves neither teacher nor role counter. Arguments as for the call."""
        if more.get("draws") is None:
            generator = more.get("generator")
            self._check_latents(latents)
            more["draws"] = draw_step(self.config, latents, self._next_roles(latents)[0], generator, self._roles.rows)
        return self(student, latents, cond, uncond, **{**more, "update_teacher": False})

    def draw(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> Draws:
        """Draws the random numbers of a step and moves the role counter past it.

        Args:
            latents: (B, ...), for shape, dtype and device.
            generator: the source; None: torch's global streams.
        """
        self._check_latents(latents)
        draws = draw_step(self.config, latents, self._next_roles(latents)[0], generator, self._roles.rows)
        self._roles.take(latents.shape[0] * _world()[1])
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
        return make_plan(self.config, draws, self._request(None, teacher, has_uncond, has_uncond, schedule, micro_batch))

    def state_dict(self) -> dict[str, Any]:
        """The role counter; a generator's state is the caller's to save."""
        return {"roles": self._roles.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved state; ValueError if it was saved with other roles."""
        self._roles.load_state_dict(state["roles"])

    def _next_roles(self, latents: torch.Tensor) -> tuple[tuple[str, ...] | None, dict[str, float]]:
        """This process's roles of the next step, and the rows per role that it answers for in the mean over ranks."""
        rank, world = _world()
        batch = latents.shape[0]
        roles = self._roles.peek(batch * world)
        counts = {role: roles.count(role) / world for role in dict.fromkeys(roles)}
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
    ) -> Request:
        return Request(
            cfg_by=teacher.cfg_by if teacher else "teacher",
            rollout_by=teacher.rollout_by if teacher else "teacher",
            has_uncond=has_uncond,
            merge=merge,
            schedule=schedule,
            micro_batch=1 if self.config.rng_align == "rows" else micro_batch,
            keep=_keep(student),
        )

    def _check_latents(self, latents: torch.Tensor) -> None:
        if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
            kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise TypeError(f"TwinFlowLoss: latents must be a floating tensor, got {kind}")
        if latents.dim() < 2 or latents.numel() == 0:
            raise ValueError(f"TwinFlowLoss: latents must be (B, ...) with B >= 1, got shape {tuple(latents.shape)}")

    def _prepare(
        self,
        student: Student,
        latents: torch.Tensor,
        cond: Any,
        uncond: Any,
        teacher: Teacher | None,
        generator: torch.Generator | None,
        draws: Draws | None,
        step_rows: int | None,
        schedule: str,
        micro_batch: int | None,
    ) -> "_Run":
        """Checks everything, draws, plans; modifies nothing but the generator."""
        config = self.config
        if not callable(student):
            raise TypeError(f"TwinFlowLoss: student must be callable, got {type(student).__name__}")
        self._check_latents(latents)
        check_condition("TwinFlowLoss", "cond", cond, latents)
        check_condition("TwinFlowLoss", "uncond", uncond, latents, broadcast=True)
        if config.enhanced_ratio > 0 and uncond is None:
            raise ValueError(
                "TwinFlowLoss: uncond must be given where enhanced_ratio > 0, got None; "
                "pass the unconditional condition, or set enhanced_ratio=0"
            )
        if teacher is None and (config.enhanced_ratio > 0 or config.estimate_order > 0):
            raise ValueError("TwinFlowLoss: teacher must be given for guidance and rollouts, got None")
        if teacher is not None:
            if not isinstance(teacher, Teacher):
                raise TypeError(f"TwinFlowLoss: teacher must be a Teacher, got {type(teacher).__name__}")
            teacher.check(student)
        if step_rows is not None and (isinstance(step_rows, bool) or not isinstance(step_rows, int)):
            raise TypeError(f"TwinFlowLoss: step_rows must be an integer, got {type(step_rows).__name__}")
        if step_rows is not None and step_rows < latents.shape[0]:
            raise ValueError(f"TwinFlowLoss: step_rows must be >= the batch of {latents.shape[0]}, got {step_rows}")
        dealt = 0
        if draws is None:
            roles, counts = self._next_roles(latents)
            draws = draw_step(config, latents, roles, generator, self._roles.rows)
            dealt = latents.shape[0] * _world()[1]
        else:
            check_draws(draws, config, latents)
            counts = {role: draws.roles.count(role) for role in draws.roles or ()}  # type: ignore[union-attr]
        uncond = broadcast_condition(uncond, latents.shape[0])
        merge = uncond is not None and same_leaf_shapes(cond, uncond)
        request = self._request(student, teacher, uncond is not None, merge, schedule, micro_batch)
        plan = make_plan(config, draws, request)
        table = row_table(config, draws, plan, counts, step_rows)
        return _Run(student, teacher, Batch(latents, cond, uncond, draws), plan, table, dealt)

    def _run(
        self, run: "_Run", update_teacher: bool, backward: Callable[[torch.Tensor], Any] | None
    ) -> TwinFlowOutput:
        """Runs a plan: teacher update, calls in order, the loss of each piece after its last call."""
        if update_teacher and run.teacher is not None:
            run.teacher.update()
        step = Step(self.config, run.student, run.teacher, run.batch, run.plan, run.table)
        due = _losses_due(run.plan)
        losses: dict[int, torch.Tensor] = {}
        terms: dict[str, torch.Tensor] = {}
        with _student_step(run.student, run.plan), _Synchronisation(run, backward) as synchronisation:
            try:
                for i, call in enumerate(run.plan.passes):
                    synchronisation.before(call)
                    step.run(call)
                    for piece in due.get(i, ()):
                        losses[piece] = self._piece_loss(step, piece, terms, backward)
            finally:
                step.random.finish()
        self._roles.take(run.dealt)
        total = torch.stack([losses[k] for k in sorted(losses)]).sum() if losses else _zero(run.batch.latents, backward is None)
        return TwinFlowOutput(total if backward is None else total.detach(), terms, run.batch.draws)


    def _piece_loss(
        self,
        step: Step,
        number: int,
        terms: dict[str, torch.Tensor],
        backward: Callable[[torch.Tensor], Any] | None,
    ) -> torch.Tensor:
        """The loss of a piece; adds to `terms`; differentiated and detached where `backward` is given."""
        piece = PieceLoss(step, number)
        loss = piece.total()
        if self.config.check_finite:
            piece.require_finite()
        for name, value in piece.terms.items():
            terms[name] = terms[name] + value.detach() if name in terms else value.detach()
        step.forget(number)
        if backward is None:
            return loss
        if loss.requires_grad:
            backward(loss)
        return loss.detach()


def _losses_due(plan: Plan) -> dict[int, list[int]]:
    """Number of a call -> the pieces whose loss follows it: their last call, once every target is complete."""
    complete = max((i for i, c in enumerate(plan.passes) if c.name in TARGET_CALLS), default=0)
    due: dict[int, list[int]] = {}
    for piece in range(len(plan.pieces)):
        calls = [i for i, call in enumerate(plan.passes) if call.piece == piece and call.gradient]
        if calls:
            last = max(i for i, call in enumerate(plan.passes) if call.piece == piece)
            due.setdefault(max(last, complete), []).append(piece)
    return due


@dataclass(frozen=True)
class _Run:
    """A checked, drawn and planned step."""

    student: Student
    teacher: Teacher | None
    batch: Batch
    plan: Plan
    table: RowTable
    dealt: int


class _Synchronisation:
    """Under DDP, `backward` by pieces synchronises gradients on the last piece only."""

    def __init__(self, run: _Run, backward: Callable[[torch.Tensor], Any] | None) -> None:
        self._last = len(run.plan.pieces) - 1
        wrapped = isinstance(run.student, torch.nn.parallel.DistributedDataParallel)
        self._pause = run.student.no_sync() if wrapped and backward is not None and self._last > 0 else None

    def before(self, call: Pass) -> None:
        if self._pause is not None and call.gradient and call.piece == self._last:
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
def _student_step(student: Student, plan: Plan) -> Iterator[None]:
    """Tells a student that wants to know its calls in advance."""
    module = unwrap(student)
    begin, end = getattr(module, "begin_step", None), getattr(module, "end_step", None)
    try:
        if begin is not None:
            begin(plan)
        yield
    finally:
        if end is not None:
            end()


def _world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _keep(student: Student | None) -> str:
    """Which calls every rank must run alike (see plan.Request)."""
    if isinstance(student, torch.nn.parallel.DistributedDataParallel):
        return "student"
    module = unwrap(student) if student is not None else None
    if isinstance(module, torch.nn.Module) and distributed.is_available() and distributed.is_initialized():
        from torch.distributed.tensor import DTensor

        if any(isinstance(p, DTensor) for p in module.parameters()):
            return "all"
    return "none"


def _zero(latents: torch.Tensor, differentiable: bool) -> torch.Tensor:
    dtype = torch.promote_types(latents.dtype, torch.float32)
    return torch.zeros((), dtype=dtype, device=latents.device, requires_grad=differentiable)
