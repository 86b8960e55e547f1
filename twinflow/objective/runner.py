"""`run_step()`: runs the plan of a step, and takes the loss of each micro-batch when its calls are done."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from twinflow.distributed import data_parallel, unwrap
from twinflow.interface import Student, Teacher
from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.passes import TARGET_CALLS, NetworkCall, Plan
from twinflow.objective.row_coefficients import RowCoefficients
from twinflow.objective.step import Batch, Step
from twinflow.objective.terms import MicroBatchLoss


@dataclass(frozen=True)
class StepRun:
    """A step that is checked, drawn and planned: the networks, the caller's tensors, the calls, numbers per row."""

    student: Student
    teacher: Teacher | None
    batch: Batch
    plan: Plan
    table: RowCoefficients


def run_step(
    config: TwinFlowConfig, run: StepRun, update_teacher: bool, backward: Callable[[torch.Tensor], Any] | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Runs a plan: teacher update, calls in order, the loss of each micro-batch after its last call.

    Args:
        config: the objective's settings.
        run: the step.
        update_teacher: whether the teacher moves first.
        backward: differentiates the loss of each micro-batch as it comes; None keeps the graph.

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
            for i, call in enumerate(run.plan.calls):
                synchronisation.before(call)
                step.run(call)
                for micro_batch in due.get(i, ()):
                    losses[micro_batch] = _micro_batch_loss(config, step, micro_batch, terms, backward)
        finally:
            step.random.finish()
    if not losses:
        return _zero(run.batch.latents, backward is None), terms
    return torch.stack([losses[micro_batch] for micro_batch in sorted(losses)]).sum(), terms


def _micro_batch_loss(
    config: TwinFlowConfig,
    step: Step,
    number: int,
    terms: dict[str, torch.Tensor],
    backward: Callable[[torch.Tensor], Any] | None,
) -> torch.Tensor:
    """The loss of a micro-batch; adds to `terms`; differentiated and detached where `backward` is given."""
    micro_batch = MicroBatchLoss(step, number)
    loss = micro_batch.total()
    if config.check_finite:
        micro_batch.require_finite()
    for name, value in micro_batch.terms.items():
        terms[name] = terms[name] + value.detach() if name in terms else value.detach()
    step.forget(number)
    if backward is None:
        return loss
    if loss.requires_grad:
        backward(loss)
    return loss.detach()


def _losses_due(plan: Plan) -> dict[int, list[int]]:
    """Number of a call -> the micro-batches whose loss follows it: their last call, once every target is complete."""
    complete = max((i for i, c in enumerate(plan.calls) if c.name in TARGET_CALLS), default=0)
    due: dict[int, list[int]] = {}
    for micro_batch in range(len(plan.micro_batches)):
        calls = [i for i, call in enumerate(plan.calls) if call.micro_batch == micro_batch and call.gradient]
        if calls:
            last = max(i for i, call in enumerate(plan.calls) if call.micro_batch == micro_batch)
            due.setdefault(max(last, complete), []).append(micro_batch)
    return due


class _Synchronisation:
    """Under DDP, `backward` by micro-batches synchronises gradients on the last micro-batch only."""

    def __init__(self, run: StepRun, backward: Callable[[torch.Tensor], Any] | None) -> None:
        self._last = len(run.plan.micro_batches) - 1
        self._pause: AbstractContextManager | None = None
        wrapper = data_parallel(run.student)
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
def _student_step(student: Student, step: Step, by_micro_batch: bool) -> Iterator[None]:
    """Tells a student that wants to know its calls in advance, and rehearses them where it asks for that."""
    module = unwrap(student)
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
