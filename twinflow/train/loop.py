"""`Loop`: optimizer steps, and between them what is due: measurements, validation, checkpoints."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from twinflow.distributed import data_parallel, world
from twinflow.interface import Student, Teacher
from twinflow.objective.loss import TwinFlowLoss, TwinFlowOutput
from twinflow.train.checkpoint.run_state import RunState
from twinflow.train.config.settings import TrainSettings
from twinflow.train.data.batches import Batches
from twinflow.train.data.cache import Cache, Entry, on_device, uploaded
from twinflow.train.logging.console import Display
from twinflow.train.logging.step_metrics import StepMetrics, require_finite
from twinflow.train.model.parallel import clip

Work = Callable[[int], None]


@dataclass
class Due:
    """What is done between steps, each with the number of steps taken.

    Args:
        record: gets the records of `StepMetrics.flush`.
    """

    record: Callable[[list[dict[str, Any]]], None]
    evaluate: Work
    draw: Work
    save: Work


@dataclass
class Loop:
    """A run that is assembled; `run` takes it to its last step, or to where it is asked to stop.

    Args:
        student: what is called, in its wrapper.
        teacher: None: plain flow matching without an average.
        state: of the run; `state.extra` has `step`, the number of steps taken, and `seconds` of training.
        generator: of the steps' random numbers.
        micro_batch: most rows of a network call.
        autocast: makes the context of a step's calls.
    """

    settings: TrainSettings
    student: Student
    teacher: Teacher | None
    criterion: TwinFlowLoss
    cache: Cache
    batches: Batches
    state: RunState
    generator: torch.Generator
    micro_batch: int
    autocast: Callable[[], AbstractContextManager]
    device: torch.device
    _unconds: dict[tuple[int, int], Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.state.extra["step"]

    def run(self, due: Due, display: Display, stop: Callable[[], bool]) -> None:
        """Trains; whatever is due at the last step is done at the end.

        Args:
            due: what is done between steps.
            display: shows them.
            stop: asked after each step, on every rank: whether to end there.

        Raises:
            FloatingPointError: a loss or gradients that are not finite, before anything of such steps is kept.
        """
        settings, total = self.settings, self.settings.max_train_steps
        rows = settings.step_rows * world()[1]
        metrics = StepMetrics(rows, self.device, self.state.extra["seconds"], settings.twinflow is not None)
        with display.training(self.step, total):
            while self.step < total:
                self._step(metrics)
                display.advance(self.step)
                step = self.step
                stopped = stop() and step < total
                ended = stopped or step == total
                works = [due.save] if stopped else self._works(due)
                if ended or works or step % settings.logging_steps == 0:
                    records = metrics.flush()
                    self.state.extra["seconds"] = metrics.seconds
                    display.steps(records, total)
                    due.record(records)
                    require_finite(records)
                since = time.perf_counter()
                stopped = self._do(works, due.save, stopped, stop)
                if works:
                    metrics.skip(since)
                if stopped:
                    break

    def _do(self, works: list[Work], save: Work, stopped: bool, stop: Callable[[], bool]) -> bool:
        """Does what is due; a signal on the way leaves out all but the checkpoint. Whether there was one."""
        for work in works:
            if work is save or not stopped:
                work(self.step)
            stopped = stopped or stop()
        if stopped and save not in works:
            save(self.step)
        return stopped

    def _works(self, due: Due) -> list[Work]:
        """What is to be done after this step; the checkpoint last, so that a resumed run misses nothing."""
        settings, last = self.settings, self.step == self.settings.max_train_steps
        found = [due.evaluate] if _falls(self.step, settings.eval_steps, last) else []
        found += [due.draw] if _falls(self.step, settings.validation_steps, last) else []
        return found + ([due.save] if last or _falls(self.step, settings.checkpointing_steps, False) else [])

    def _step(self, metrics: StepMetrics) -> None:
        """One step of the optimizer: the rows of its micro-batches by size, the teacher moved with the first."""
        optimizer, scheduler, settings = self.state.optimizer, self.state.scheduler, self.settings
        assert optimizer is not None
        rate = float(optimizer.param_groups[0]["lr"])
        groups = self._groups()
        outs = []
        for number, entries in enumerate(groups):
            with self._unsynchronised() if number < len(groups) - 1 else nullcontext():
                outs.append(self._backward(entries, first=number == 0))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = clip(parameters, settings.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        terms: dict[str, torch.Tensor] = {}
        for out in outs:
            for name, value in out.terms.items():
                terms[name] = terms[name] + value if name in terms else value
        times = [pair for out in outs for pair in self._times(out)]
        self.state.extra["step"] += 1
        metrics.add(self.step, torch.stack([out.loss for out in outs]).sum(), terms, norm, rate, times)

    def _groups(self) -> list[list[Entry]]:
        """The entries of a step, those of one size together: a call plans its rows together."""
        found: dict[tuple[int, int], list[Entry]] = {}
        for _ in range(self.settings.gradient_accumulation_steps):
            for entry in self.batches.take():
                found.setdefault(entry.size, []).append(entry)
        return list(found.values())

    def _backward(self, entries: list[Entry], first: bool) -> TwinFlowOutput:
        latents = uploaded(self.cache.latents(entries), self.device).float()
        cond = on_device(self.cache.condition(entries), self.device)
        with self.autocast():
            return self.criterion.backward(
                self.student, latents, cond, self._uncond(entries[0].size), micro_batch=self.micro_batch,
                teacher=self.teacher, generator=self.generator, step_rows=self.settings.step_rows, update_teacher=first,
            )  # fmt: skip

    def _times(self, out: TwinFlowOutput) -> list[tuple[float, float]]:
        """Signed (t, r) of the rows; `all_terms` asks each row's fake velocity at (-t, -t) as well."""
        pairs = list(zip(out.draws.t.tolist(), out.draws.r.tolist(), strict=True))
        objective = self.settings.objective
        if objective.recipe == "all_terms" and objective.adversarial:
            pairs = [pair for t, r in pairs for pair in ((t, r), (-t, -t))]
        return pairs

    def _uncond(self, size: tuple[int, int]) -> Any:
        if size not in self._unconds:
            self._unconds[size] = on_device(self.cache.uncond_at(size), self.device)
        return self._unconds[size]

    def _unsynchronised(self) -> AbstractContextManager:
        wrapper = data_parallel(self.student)
        return nullcontext() if wrapper is None else wrapper.no_sync()


def _falls(step: int, every: int, last: bool) -> bool:
    """Whether something is due after a step, that is done every so many and after the last; 0: never."""
    return bool(every) and (last or step % every == 0)
