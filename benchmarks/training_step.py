"""The training step: the planned against the published schedule, on the same network and draws."""

import statistics
from collections.abc import Callable
from typing import Any

import environment
import networks
import torch

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.models import FlowModel

RECIPES = ("partition", "all_terms")


class Contest:
    """One recipe at one logical batch: the contestants run the same steps, one after the other.

    Args:
        student, teacher: the networks.
        recipe: of the objective.
        batch: logical batch size.
        steps: number of steps, each with draws of its own.
        inputs: latents, cond, uncond.
    """

    def __init__(
        self, student: FlowModel, teacher: EMATeacher, recipe: str, batch: int, steps: int, inputs: tuple
    ) -> None:
        self.student, self.teacher, self.inputs = student, teacher, inputs
        self.criterion = TwinFlowLoss(TwinFlowConfig(recipe=recipe))
        generator = torch.Generator(inputs[0].device).manual_seed(1)
        self.draws = [self.criterion.draw(inputs[0], generator) for _ in range(steps)]
        self.contestants: dict[str, Callable[[int], torch.Tensor]] = {
            "published schedule": lambda k: self.step(k, schedule="published"),
            "planned": lambda k: self.step(k),
            "planned, one row at a time": lambda k: self.step(k, micro_batch=1),
        }
        if batch > 4:
            self.contestants["planned, four rows at a time"] = lambda k: self.step(k, micro_batch=4)

    def step(self, k: int, micro_batch: int | None = None, **schedule: str) -> torch.Tensor:
        """Forward and backward of the k-th step; gradients replace the last step's."""
        self.student.zero_grad(set_to_none=True)
        arguments = dict(teacher=self.teacher, draws=self.draws[k])
        if micro_batch is not None:
            return self.criterion.backward(self.student, *self.inputs, micro_batch=micro_batch, **arguments).loss
        out = self.criterion(self.student, *self.inputs, **arguments, **schedule)
        out.loss.backward()
        return out.loss.detach()

    def rows(self, name: str) -> float:
        """Network rows without gradient per step, on average."""
        schedule = "published" if name == "published schedule" else "planned"
        plans = [self.criterion.plan(d, teacher=self.teacher, schedule=schedule) for d in self.draws]
        return statistics.mean(plan.rows_without_gradient for plan in plans)


def _first_losses(contest: Contest, device: torch.device) -> dict[str, float | None]:
    """The loss of step 0 by contestant, after a warm-up; None where it does not fit in memory."""
    losses: dict[str, float | None] = {}
    for name, run in contest.contestants.items():
        try:
            run(0)
            losses[name] = float(run(0))
        except torch.OutOfMemoryError:
            losses[name] = None
        environment.free_memory(device)
    return losses


def measure_contest(
    contest: Contest, recipe: str, batch: int, device: torch.device, rtol: float
) -> list[dict[str, Any]]:
    """Checks that the contestants compute the same loss, times them in turn, measures their peak memory."""
    losses = _first_losses(contest, device)
    fitting = {name: loss for name, loss in losses.items() if loss is not None}
    values = list(fitting.values())
    if values and max(values) - min(values) > rtol * abs(max(values)):
        raise AssertionError(f"{recipe}, batch {batch}: losses differ, nothing is timed: {fitting}")
    seconds: dict[str, list[float]] = {name: [] for name in fitting}
    names = list(fitting)
    for k in range(len(contest.draws)):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            seconds[name].append(environment.timed(lambda k=k, name=name: contest.contestants[name](k), device)[0])
    lines = []
    for name in contest.contestants:
        line = {"recipe": recipe, "batch": batch, "schedule": name, "rows_without_gradient": contest.rows(name)}
        if name in fitting:
            peak = environment.peak_bytes(lambda run=contest.contestants[name]: run(0), device)
            times = {"median_s": statistics.median(seconds[name]), "steps": len(seconds[name])}
            line |= {**times, "min_s": min(seconds[name]), "max_s": max(seconds[name]), "peak_bytes": peak}
        lines.append(line)
    return lines


def measure_training(
    model: str, device: torch.device, dtype: torch.dtype, batches: list[int], steps: int, depth: int | None = None
) -> list[dict[str, Any]]:
    """Every recipe at every batch; a line per schedule, without times where it does not fit in memory."""
    student = networks.build(model, device, dtype, depth)
    teacher = EMATeacher(student, 0.99)
    lines = []
    # In bf16 a call's rounding depends on its batch, and 1 / delta amplifies it before the clamp.
    rtol = 1e-4 if dtype == torch.float32 else 0.05
    for batch in batches:
        inputs = networks.random_batch(model, student, batch, device, dtype)
        for recipe in RECIPES:
            contest = Contest(student, teacher, recipe, batch, steps, inputs)
            found = measure_contest(contest, recipe, batch, device, rtol)
            trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
            lines += [{"model": model, "trained_parameters": trained, **line} for line in found]
            del contest
            student.zero_grad(set_to_none=True)
    return lines
