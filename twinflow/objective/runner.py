"""`run_step()`: runs the plan of a step, and takes the loss of each piece when its calls are done."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from twinflow.interface import Student, Teacher, data_parallel, unwrap
from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.passes import TARGET_CALLS, Pass, Plan
from twinflow.objective.row_coefficients import RowTable
from twinflow.objective.step import Batch, Step
from twinflow.objective.terms import PieceLoss


@dataclass(frozen=True)
class StepRun:
    """A step that is checked, drawn and planned: the networks, the caller's tensors, the calls, numbers per row."""

    student: Student
    teacher: Teacher | None
    batch: Batch
    plan: Plan
    table: RowTable


def run_step(
    config: TwinFlowConfig, run: StepRun, update_teacher: bool, backward: Callable[[torch.Tensor], Any] | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Runs a plan: teacher update, calls in order, the loss of each piece after its last call.

    Args:
        config: the objective's settings.
        run: the step.
        update_teacher: whether the teacher moves first.
        backward: differentiates the loss of each piece as it comes; None keeps the graph.

    Returns:
        The loss and its terms; the loss is detached where `backward` is given.
    """
    if update_teacher and run.teacher is not None:
        run.teacher.update()
    step = Step(config, run.student, run.teacher, run.batch, run.plan, run.table)
    due = _losses_due(run.plan)
    losses: dict[int, torch.Tensor] = {}
    terms: dict[str, torch.Tensor] = {}
    with _student_step(run.student, step, backward is not None), _Synchronisation(run, backward) as synchronisation:
        try:
            for i, call in enumerate(run.plan.passes):
                synchronisation.before(call)
                step.run(call)
                for piece in due.get(i, ()):
                    losses[piece] = _piece_loss(config, step, piece, terms, backward)
        finally:
            step.random.finish()
    if not losses:
        return _zero(run.batch.latents, backward is None), terms
    return torch.stack([losses[piece] for piece in sorted(losses)]).sum(), terms


def _piece_loss(
    config: TwinFlowConfig,
    step: Step,
    number: int,
    terms: dict[str, torch.Tensor],
    backward: Callable[[torch.Tensor], Any] | None,
) -> torch.Tensor:
    """The loss of a piece; adds to `terms`; differentiated and detached where `backward` is given."""
    piece = PieceLoss(step, number)
    loss = piece.total()
    if config.check_finite:
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


class _Synchronisation:
    """Under DDP, `backward` by pieces synchronises gradients on the last piece only."""

    def __init__(self, run: StepRun, backward: Callable[[torch.Tensor], Any] | None) -> None:
        self._last = len(run.plan.pieces) - 1
        self._pause: AbstractContextManager | None = None
        wrapper = data_parallel(run.student)
        if wrapper is not None and backward is not None and self._last > 0:
            self._pause = wrapper.no_sync()

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
def _student_step(student: Student, step: Step, by_pieces: bool) -> Iterator[None]:
    """Tells a student that wants to know its calls in advance, and rehearses them where it asks for that."""
    module = unwrap(student)
    begin, rehearsal, end = (getattr(module, name, None) for name in ("begin_step", "rehearsal", "end_step"))
    try:
        if begin is not None:
            begin(step.plan)
        rehearsed = None if rehearsal is None else rehearsal(by_pieces)
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
